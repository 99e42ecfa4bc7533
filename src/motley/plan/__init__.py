"""What a model costs before it is trained: parameters, FLOPs, bytes."""

from motley.plan.network.flops import (
    Part,
    active_parameters,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    mtp_parameters,
    parameters,
    parts,
    training_flops_per_token,
)

__all__ = [
    "Part",
    "active_parameters",
    "forward_flops_per_token",
    "kv_cache_bytes_per_token",
    "mtp_parameters",
    "parameters",
    "parts",
    "training_flops_per_token",
]
