"""Our forward and backward are those of transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM.

A sweep of configurations drawn by a seed: transformers saves random weights, we load them, and in fp32 the logits and
the gradient of every parameter differ by at most 1e-5 of the largest value.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from motley.model import Transformer, load
from motley.model.checkpoint import stored_tensors

TOLERANCE = 1e-5


def random_config(kind: str, seed: int) -> dict[str, Any]:
    """A small configuration; everything that changes what is computed varies."""
    chance = random.Random(f"{kind} {seed}")
    groups = chance.choice([1, 2, 4])
    experts = groups * chance.choice([2, 3, 4])
    topk_group = chance.randint(1, groups)
    layers = chance.choice([2, 3, 4])
    normalised = kind == "v3" and chance.choice([True, False])  # transformers does not read norm_topk_prob for V2
    # one expert whose weight is normalised to 1 leaves the router without a gradient: nothing to compare
    fewest = 2 if normalised else 1
    values: dict[str, Any] = {
        "vocab_size": chance.choice([61, 128]),
        "hidden_size": chance.choice([32, 48, 64]),
        "intermediate_size": chance.choice([40, 64]),
        "moe_intermediate_size": chance.choice([8, 24]),
        "num_hidden_layers": layers,
        "num_attention_heads": (heads := chance.choice([1, 2, 4])),
        "num_key_value_heads": heads,
        "q_lora_rank": chance.choice([None, 12, 24]),
        "kv_lora_rank": chance.choice([8, 20]),
        "qk_nope_head_dim": chance.choice([8, 16]),
        "qk_rope_head_dim": chance.choice([4, 8, 16]),
        "v_head_dim": chance.choice([8, 16, 24]),
        "n_routed_experts": experts,
        "n_shared_experts": chance.choice([1, 2]),
        "num_experts_per_tok": chance.randint(fewest, experts // groups * topk_group),
        "n_group": groups,
        "topk_group": topk_group,
        "first_k_dense_replace": chance.randint(0, layers - 1),
        "norm_topk_prob": normalised,
        "routed_scaling_factor": chance.choice([1.0, 2.5, 16.0]),
        "rms_norm_eps": chance.choice([1e-5, 1e-6]),
        "max_position_embeddings": 256,
        "attention_bias": chance.choice([True, False]),
        "tie_word_embeddings": chance.choice([True, False]),
        "rope_theta": chance.choice([10000.0, 50000.0]),
    }
    if chance.random() < 0.6:
        mscale = chance.choice([0.707, 1.0])
        values["rope_scaling"] = {
            "type": "yarn",
            "factor": chance.choice([4.0, 40.0]),
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": mscale,
            "mscale_all_dim": chance.choice([mscale, 1.0]),
        }
    if kind == "v3":
        values["num_nextn_predict_layers"] = 0
    else:
        values["topk_method"] = chance.choice(["greedy", "group_limited_greedy"])
    return values


def reference(kind: str, values: dict[str, Any], seed: int) -> torch.nn.Module:
    """transformers' model with random weights, the router's bias among them."""
    torch.manual_seed(seed)
    if kind == "v3":
        model: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**values))
    else:
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)
    return model.float().eval()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    scale = expected.abs().max()
    return float((found - expected).abs().max() / scale) if scale > 0 else float(found.abs().max())


def gradients_by_their_names(theirs: Any, ours: Transformer) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name on disk, our gradient, transformers' gradient) for every tensor of the checkpoint."""
    mine = {name: parameter.grad for name, parameter in ours.named_parameters()}
    found = []
    for name, parameter in theirs.named_parameters():
        grad = parameter.grad
        grad = torch.zeros_like(parameter) if grad is None else grad  # an expert that was never chosen
        own = mine[name]
        found.append((name, torch.zeros_like(grad) if own is None else own, grad))
    assert {name for name, _, _ in found} == set(mine), "a parameter was not compared"
    return found


SWEEP = [("v3", seed) for seed in range(12)] + [("v2", seed) for seed in range(8)]


@pytest.mark.parametrize(("kind", "seed"), SWEEP, ids=[f"{kind}-{seed}" for kind, seed in SWEEP])
def test_logits_and_all_gradients_are_those_of_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    values = random_config(kind, seed)
    theirs = reference(kind, values, seed)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = load(tmp_path)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(values["vocab_size"], (3, 40), generator=generator)
    upstream = torch.randn(3, 40, values["vocab_size"], generator=generator)

    expected = theirs(ids, use_cache=False).logits
    found = ours(ids)
    assert relative(found, expected) <= TOLERANCE, values
    (expected * upstream).sum().backward()
    (found * upstream).sum().backward()
    compared = gradients_by_their_names(theirs, ours)
    wrong = {name: relative(own, grad) for name, own, grad in compared if relative(own, grad) > TOLERANCE}
    assert wrong == {}, values


def test_the_sweep_reaches_everything_it_is_for() -> None:
    configs = [(kind, random_config(kind, seed)) for kind, seed in SWEEP]
    reached = {
        "compressed queries": any(values["q_lora_rank"] for _, values in configs),
        "plain queries": any(values["q_lora_rank"] is None for _, values in configs),
        "YaRN": sum("rope_scaling" in values for _, values in configs) > 3,
        "no YaRN": any("rope_scaling" not in values for _, values in configs),
        "unequal mscale": any(
            (yarn := values.get("rope_scaling")) and yarn["mscale"] != yarn["mscale_all_dim"] for _, values in configs
        ),
        "groups in V3": any(kind == "v3" and values["topk_group"] < values["n_group"] for kind, values in configs),
        "groups in V2": any(
            values.get("topk_method") == "group_limited_greedy" and values["topk_group"] < values["n_group"]
            for _, values in configs
        ),
        "greedy V2": any(values.get("topk_method") == "greedy" for _, values in configs),
        "dense layers": any(values["first_k_dense_replace"] > 1 for _, values in configs),
        "no dense layer": any(values["first_k_dense_replace"] == 0 for _, values in configs),
        "weights not normalised in V3": any(kind == "v3" and not v["norm_topk_prob"] for kind, v in configs),
        "tied embeddings": any(values["tie_word_embeddings"] for _, values in configs),
        "attention bias": any(values["attention_bias"] for _, values in configs),
        "two shared experts": any(values["n_shared_experts"] == 2 for _, values in configs),
    }
    assert [name for name, is_reached in reached.items() if not is_reached] == []


def test_every_tensor_on_disk_has_a_place_in_memory(tmp_path: Path) -> None:
    theirs = reference("v3", random_config("v3", 0), 0)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = load(tmp_path)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    assert len(stored_tensors(ours)) > 10
