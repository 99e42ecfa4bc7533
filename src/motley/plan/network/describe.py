"""`motley plan describe`: what a model is before anything trains it; every number computed from its configuration."""

from dataclasses import replace
from typing import Any

from motley.plan.network.flops import (
    active_parameters,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    mtp_parameters,
    network_parts,
    parameters,
    training_flops_per_token,
)
from motley.plan.network.spec import NetworkSpec, without_mtp

TRAINING_BYTES = {"weights, bf16": 2, "gradients, fp32": 4, "master weights, fp32": 4, "Adam's two moments, fp32": 8}


def describe_model(shape: NetworkSpec, context_length: int) -> dict[str, Any]:
    """Parameters, FLOPs, cache and memory. Published figures leave MTP modules out, so the main rows do too."""
    bare = without_mtp(shape)
    count = parameters(shape)
    everything = count + mtp_parameters(shape)
    return {
        "model": shape.name,
        "source": shape.source,
        "context_length": context_length,
        "parameters": count,
        "active_parameters": active_parameters(shape),
        "mtp_parameters": mtp_parameters(shape),
        "training_flops_per_token": training_flops_per_token(bare, context_length),
        "training_flops_per_token_with_mtp": training_flops_per_token(shape, context_length),
        "forward_flops_per_token": forward_flops_per_token(bare, context_length),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(shape),
        "memory": {
            "weights_bf16_bytes": 2 * count,
            "weights_fp8_bytes": count,
            "training_state_bytes": sum(TRAINING_BYTES.values()) * everything,
            "training_state_parts": {name: size * everything for name, size in TRAINING_BYTES.items()},
        },
        "parts": [vars(part) for part in network_parts(replace(shape), context_length)],
        "sources": {
            "parameters": "summed from the configuration (V2 report 2.1, 2.2; V3 report 2; or the family's own paper)",
            "training_flops_per_token": "3 x forward products, half of the context visible (arXiv 2505.09343, table 2)",
            "kv_cache_bytes_per_token": "bf16; MLA keeps latent and rotary key (V2 report 2.1.2)",
            "memory": "mixed precision with Adam: 18 bytes a parameter, MTP modules included",
        },
    }
