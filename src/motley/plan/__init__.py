"""What a model costs before it is trained: parameters, FLOPs, bytes."""

from motley.plan.network.flops import (
    NetworkPart,
    active_parameters,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    mtp_parameters,
    network_parts,
    parameters,
    training_flops_per_token,
)

__all__ = [
    "NetworkPart",
    "active_parameters",
    "forward_flops_per_token",
    "kv_cache_bytes_per_token",
    "mtp_parameters",
    "network_parts",
    "parameters",
    "training_flops_per_token",
]
