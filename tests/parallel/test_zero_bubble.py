"""Gradients of weights that a zero-bubble schedule defers are those of a backward pass that computes all at once."""

import dataclasses

import pytest
import torch

from motley.model import SIZES, Transformer, native
from motley.parallel.pipeline.zero_bubble import defer_weight_gradients

SHAPE = dataclasses.replace(
    SIZES["nano"], vocab_size=60, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
    n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, num_nextn_predict_layers=1,
)  # fmt: skip
FORMATS = {"fp32": (None, False), "bf16": (torch.bfloat16, False), "fp8": (torch.bfloat16, True)}


def a_model(form: str) -> Transformer:
    model = Transformer(SHAPE)
    model.initialize(0)
    model.compute_dtype, fp8 = FORMATS[form]
    model.train_in_fp8(fp8)
    return model


def backward(model: Transformer) -> None:
    model.zero_grad()
    ids = torch.randint(SHAPE.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    hidden = model.hidden(ids)
    sum(state.float().square().sum() for state in (hidden.main, *hidden.further)).backward()  # pyright: ignore


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_deferred_gradients_equal_those_of_one_backward_pass_bit_by_bit(form: str, recompute: bool) -> None:
    plain, deferred = a_model(form), a_model(form)
    deferred.recompute = recompute
    queue = defer_weight_gradients(deferred)
    with native.switched_off():  # kernels sum in another order; deferring does without them
        backward(plain)
        backward(deferred)
        assert queue
        early = gradients(deferred)
        linear = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.experts.down_proj"
        assert not early.keys() & set(linear)
        for work in queue:
            work()
    expected = gradients(plain)
    assert gradients(deferred).keys() == expected.keys()
    for name, gradient in gradients(deferred).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_model_that_defers_evaluates_as_any_other() -> None:
    plain, deferred = a_model("fp32"), a_model("fp32")
    queue = defer_weight_gradients(deferred)
    ids = torch.arange(SHAPE.vocab_size)[None].expand(3, -1)
    with torch.no_grad():
        assert torch.equal(deferred(ids), plain(ids))
    assert not queue


def test_the_gradient_of_the_head_is_never_deferred() -> None:
    model = a_model("fp32")
    defer_weight_gradients(model)
    model.lm_head(torch.ones(1, SHAPE.hidden_size)).sum().backward()
    assert model.lm_head.weight.grad is not None
