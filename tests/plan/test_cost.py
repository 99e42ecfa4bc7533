"""The bill against numbers DeepSeek published."""

import dataclasses

import pytest
import torch

from motley.model import SIZES, ModelConfig, Transformer
from motley.plan import (
    active_parameters,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    mtp_parameters,
    network_parts,
    parameters,
    training_flops_per_token,
)


def v2() -> ModelConfig:
    """DeepSeek-V2 (236 billion parameters), from the table in section 3.1.2 of its report."""
    return dataclasses.replace(
        SIZES["v2-lite"],
        vocab_size=102_400,
        hidden_size=5120,
        intermediate_size=12_288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        num_attention_heads=128,
        q_lora_rank=1536,
        n_routed_experts=160,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        routed_scaling_factor=16.0,
    )


def without_mtp(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def billions(number: int) -> float:
    return round(number / 1e9, 2)


def test_parameters_are_the_published_ones():
    v3, v2_lite = SIZES["v3"], SIZES["v2-lite"]
    assert (billions(parameters(v3)), billions(active_parameters(v3))) == (671.03, 37.55)
    assert mtp_parameters(v3) / 1e9 == pytest.approx(11.5, rel=0.01)
    assert (billions(parameters(v2_lite)), billions(active_parameters(v2_lite))) == (15.71, 2.66)
    assert (billions(parameters(v2())), round(active_parameters(v2()) / 1e9)) == (235.74, 21)


def test_training_flops_are_the_published_ones():
    assert training_flops_per_token(without_mtp(SIZES["v3"]), 4096) / 1e9 == pytest.approx(250, rel=0.002)
    assert training_flops_per_token(v2(), 4096) / 1e9 == pytest.approx(155, rel=0.003)


def test_attention_grows_with_the_context_and_nothing_else_does():
    config = without_mtp(SIZES["v3"])
    at_zero, at_4k, at_8k = (training_flops_per_token(config, length) for length in (0, 4096, 8192))
    assert (at_4k - at_zero) / 1e9 == pytest.approx(30.7, abs=0.05)
    assert at_8k - at_4k == pytest.approx(at_4k - at_zero)
    assert at_zero / 1e9 == pytest.approx(219.5, rel=0.002)
    short, long = ({part.name: part for part in network_parts(config, length)} for length in (4096, 8192))
    assert {name for name in short if short[name] != long[name]} == {"attention between tokens"}
    name = "attention between tokens"
    assert long[name].forward_flops == 2 * short[name].forward_flops


def test_latent_cache_is_the_published_one():
    assert kv_cache_bytes_per_token(SIZES["v3"]) == 70_272
    assert kv_cache_bytes_per_token(SIZES["v3"], bytes_per_value=1) == 70_272 / 2
    assert kv_cache_bytes_per_token(v2()) == 60 * (512 + 64) * 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", sorted(SIZES))
def test_every_parameter_of_the_network_is_on_the_bill(size: str, bias: bool):
    config = dataclasses.replace(SIZES[size], attention_bias=bias)
    with torch.device("meta"):
        model = Transformer(config)
    assert parameters(config) + mtp_parameters(config) == sum(tensor.numel() for tensor in model.parameters())
    assert sum(part.parameters for part in network_parts(config, 0)) == parameters(config) + mtp_parameters(config)


@pytest.mark.parametrize("size", sorted(SIZES))
def test_a_token_works_with_the_experts_it_chooses_and_with_everything_else(size: str):
    config = without_mtp(SIZES[size])
    rows = {part.name: part for part in network_parts(config, 0)}
    routed = rows.pop("routed experts", None)
    assert all(part.active == part.parameters for part in rows.values())
    assert active_parameters(config) == sum(part.active for part in rows.values()) + (routed.active if routed else 0)
    if routed:
        assert routed.active * (config.n_routed_experts or 0) == routed.parameters * config.num_experts_per_tok


@pytest.mark.parametrize("size", sorted(SIZES))
def test_training_costs_three_forward_passes(size: str):
    """The backward pass multiplies by every matrix twice."""
    assert training_flops_per_token(SIZES[size], 512) == 3 * forward_flops_per_token(SIZES[size], 512)
    assert forward_flops_per_token(SIZES[size], 512) == sum(
        part.forward_flops for part in network_parts(SIZES[size], 512)
    )


def test_a_linear_layer_costs_two_flops_per_weight_and_token():
    """The bill of a dense model, summed by hand."""
    config = dataclasses.replace(
        SIZES["nano"],
        vocab_size=100,
        hidden_size=8,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=4,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=4,
        n_routed_experts=None,
        num_nextn_predict_layers=0,
        tie_word_embeddings=False,
    )
    query, latent, expansion, output = 8 * 12, 8 * 6, 4 * 16, 8 * 8
    layer = query + latent + expansion + output + 3 * 8 * 32
    norms = 2 * (8 + 8 + 4) + 8
    assert parameters(config) == 2 * layer + norms + 2 * 800
    assert active_parameters(config) == parameters(config)
    assert forward_flops_per_token(config, 0) == 2 * (2 * layer + 800)
    # two layers, two FLOPs, two heads, keys of 6 and values of 4, 5 of 10 tokens visible
    assert forward_flops_per_token(config, 10) - forward_flops_per_token(config, 0) == 2 * 2 * 2 * 10 * 5


def test_a_tied_head_is_held_once_and_multiplies_all_the_same():
    tied = dataclasses.replace(SIZES["nano"], tie_word_embeddings=True)
    untied = dataclasses.replace(SIZES["nano"], tie_word_embeddings=False)
    table = tied.vocab_size * tied.hidden_size
    assert parameters(untied) - parameters(tied) == table
    assert active_parameters(untied) - active_parameters(tied) == table
    assert forward_flops_per_token(tied, 512) == forward_flops_per_token(untied, 512)


def test_an_mtp_module_pays_for_its_block_and_for_the_shared_head():
    """Its block is what one more layer would be; its projection takes two hidden vectors, beside three norms."""
    config = without_mtp(SIZES["nano"])
    with_one = dataclasses.replace(config, num_nextn_predict_layers=1)
    one_more = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 1)
    hidden, head = config.hidden_size, config.vocab_size * config.hidden_size
    extra = network_parts(with_one, 512)[-1]
    assert extra.name == "MTP module 1"
    block = forward_flops_per_token(one_more, 512) - forward_flops_per_token(config, 512)
    assert extra.forward_flops == pytest.approx(block + 2 * 2 * hidden * hidden + 2 * head, rel=1e-12)
    assert extra.parameters == parameters(one_more) - parameters(config) + 2 * hidden * hidden + 3 * hidden
    assert extra.active == active_parameters(one_more) - active_parameters(config) + 2 * hidden * hidden + 3 * hidden
    assert mtp_parameters(with_one) == extra.parameters
    assert parameters(with_one) == parameters(config)
