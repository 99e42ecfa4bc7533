"""Products in fp8 are the report's, tile by tile: which operands, which tiles, which scales, and where."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from motley.model import SIZES, ModelConfig, Transformer
from motley.model.experts import Experts
from motley.model.fp8 import TILE, fp8_product
from motley.model.layers import Linear
from motley.model.quantize import dequantize, quantize

SHAPE = dataclasses.replace(
    SIZES["nano"], vocab_size=60, hidden_size=144, intermediate_size=160, moe_intermediate_size=136,
    num_hidden_layers=2, num_attention_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)  # fmt: skip
Gradients = tuple[Tensor, Tensor, Tensor]


def pieces(size: int, of: int) -> list[slice]:
    return [slice(start, min(start + of, size)) for start in range(0, size, of)]


def to_e4m3(value: Tensor) -> Tensor:
    """Nearest number with four significant digits and exponents from -6 on, ties to even, in float64."""
    value = value.double()
    exponent = torch.floor(torch.log2(value.abs().clamp(min=1e-300))).clamp(min=-6)
    step = torch.exp2(exponent - 3)
    return torch.round(value / step) * step


def scale_of(tile: Tensor) -> Tensor:
    return (tile.float().abs().max() / 448).clamp(min=torch.finfo(torch.float32).tiny)


def rounded(real: Tensor, rows: int, columns: int) -> Tensor:
    """Every block of a matrix rounded by the definition, in float64."""
    result = torch.zeros(real.shape, dtype=torch.float64)
    for up in pieces(real.shape[0], rows):
        for across in pieces(real.shape[1], columns):
            scale = scale_of(real[up, across])
            result[up, across] = to_e4m3(real[up, across].float() / scale) * scale.double()
    return result


def sum_by_intervals(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float64, 128 numbers of the sum after another: what is promoted in between."""
    total = torch.zeros(left.shape[0], right.shape[1], dtype=torch.float64)
    for interval in pieces(left.shape[1], TILE):
        total += left[:, interval] @ right[interval]
    return total


def naive(x: Tensor, w: Tensor, dy: Tensor) -> Gradients:
    """(y, dx, dw) of y = x w^T for one matrix."""
    x8, w8 = rounded(x, 1, TILE), rounded(w, TILE, TILE)
    dw = sum_by_intervals(rounded(dy, TILE, 1).T, rounded(x8, TILE, 1))
    return sum_by_intervals(x8, w8.T), sum_by_intervals(rounded(dy, 1, TILE), w8), dw


def found(x: Tensor, w: Tensor, dy: Tensor, ends: Tensor | None = None) -> Gradients:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = fp8_product(x, w, ends)
    y.backward(dy)
    assert x.grad is not None
    assert w.grad is not None
    return y.detach(), x.grad, w.grad


def far(one: Tensor, other: Tensor) -> float:
    """Distance relative to the length of `other`."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal numbers; some rows are a thousand times larger, and a few numbers stick out of everything."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values[..., ::7, :] *= 1e3
    loud = torch.rand(shape, generator=generator) < 0.002
    return torch.where(loud, values * 1e4, values)


SIZES_OF_PRODUCTS = [(1, 1, 1), (128, 128, 128), (5, 300, 7), (129, 40, 257), (300, 129, 130), (256, 384, 20)]


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SIZES_OF_PRODUCTS)
def test_all_three_products_equal_the_definition_tile_by_tile(tokens: int, inputs: int, outputs: int) -> None:
    x, w, dy = drawn(1, tokens, inputs), drawn(2, outputs, inputs), drawn(3, tokens, outputs)
    for one, other in zip(found(x, w, dy), naive(x, w, dy), strict=True):
        assert far(one, other) < 1e-6


def test_a_product_of_no_tokens_is_empty_and_teaches_nothing() -> None:
    y, dx, dw = found(torch.zeros(0, 40), drawn(0, 30, 40), torch.zeros(0, 30))
    assert (y.shape, dx.shape) == ((0, 30), (0, 40))
    assert not dw.any()


@pytest.mark.parametrize("counts", [(128, 0, 384, 0), (0, 0, 0, 256), (128, 128, 128, 128)])
def test_a_stack_of_experts_is_each_expert_by_itself(counts: tuple[int, ...]) -> None:
    rows, ends = sum(counts), torch.tensor(counts).cumsum(0).int()
    x, w, dy = drawn(1, rows, 40), drawn(2, 4, 24, 40), drawn(3, rows, 24)
    y, dx, dw = found(x, w, dy, ends)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        expected = naive(x[start:end], w[expert], dy[start:end])
        for one, other in zip((y[start:end], dx[start:end], dw[expert]), expected, strict=True):
            assert far(one, other) < 1e-6
        start = end


def routed(kind: str, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    if kind == "one expert gets all":
        return torch.full((tokens, 1), 2)
    return torch.rand(tokens, 4, generator=generator).argsort(dim=1)[:, :2].clamp(max=2)  # expert 3 is chosen as 2


@pytest.mark.parametrize("kind", ["some experts get none", "one expert gets all"])
@pytest.mark.parametrize("tokens", [1, 60, 300])
def test_experts_in_fp8_tile_each_expert_s_own_tokens_and_nothing_else(kind: str, tokens: int) -> None:
    """The first token is loud: it fills up no other expert's tiles."""
    experts, chosen = Experts(4, 40, 24), routed(kind, tokens)
    experts.fp8 = True
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data = drawn(seed, *parameter.shape).clamp(-3, 3) / 5
    x, weights = drawn(5, tokens, 40).clamp(-4, 4), torch.rand(chosen.shape, generator=torch.Generator().manual_seed(6))
    x[0] *= 1e4
    upstream = drawn(7, tokens, 40).clamp(-4, 4)
    upstream[0] *= 1e4

    def outcome(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        experts.zero_grad()
        own = x.clone().requires_grad_()
        y = run(own)
        y.backward(upstream)
        grads = [own.grad, experts.gate_up_proj.grad, experts.down_proj.grad]
        return [y.detach(), *(grad.clone() for grad in grads if grad is not None)]

    def one_after_another(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(4):
            token, slot = torch.where(chosen == expert)
            gate, up = fp8_product(x[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = F.silu(gate) * up * weights[token, slot, None]
            y = y.index_add(0, token, fp8_product(inner, experts.down_proj[expert]))
        return y

    for one, other in zip(outcome(lambda x: experts(x, chosen, weights)), outcome(one_after_another), strict=True):
        assert max(map(far, one, other)) < 1e-5, "of every token, and of every expert's weights"


@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128)])
def test_rounding_loses_half_a_digit_of_the_value_or_of_the_tile_s_smallest_step(block: tuple[int, int]) -> None:
    real = drawn(0, 3, 150, 200)
    values, scale = quantize(real, block)
    assert values.dtype == torch.float8_e4m3fn
    assert values.shape == real.shape
    assert scale.shape == (3, math.ceil(150 / block[0]), math.ceil(200 / block[1]))
    for one, other in zip(real, dequantize(values, scale, block), strict=True):
        assert far(other, rounded(one, *block)) < 1e-7
    spread = scale.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)[:, :150, :200]
    error = (dequantize(values, scale, block) - real).abs()
    assert (error <= (real.abs() * 2**-4).maximum(spread * 2**-10) * (1 + 1e-6)).all()


def test_an_outlier_costs_only_its_own_tile_precision() -> None:
    real = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    loud = real.clone()
    loud[1, 200] = 1e8
    before, after = (dequantize(*quantize(one, (1, TILE)), (1, TILE)) for one in (real, loud))
    elsewhere = torch.ones_like(real, dtype=torch.bool)
    elsewhere[1, 128:] = False
    assert torch.equal(before[elsewhere], after[elsewhere])
    assert after[1, 200] == 1e8
    assert not after[1, 128:200].any(), "what is small beside it is gone"


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_no_scale_is_zero_and_no_size_overflows(size: float) -> None:
    real = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * size
    values, scale = quantize(real, (1, TILE))
    assert (scale > 0).all()
    assert torch.isfinite(values.float()).all()
    assert far(dequantize(values, scale, (1, TILE)), real) < 1e-6 or size < 1e-38


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(broken: float) -> None:
    real = torch.ones(2, 256)
    real[0, 3] = broken
    after = dequantize(*quantize(real, (1, TILE)), (1, TILE))
    assert after[0, 3].isnan()
    assert torch.equal(after[1], real[1])


# ---------------------------------------------------------------------------------------------- in the model


def random_model(config: ModelConfig = SHAPE) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator)
    return model


def teach(model: Transformer) -> dict[str, Tensor]:
    """Gradients of a sum over everything that the model computes."""
    model.zero_grad()
    ids = torch.randint(60, (2, 70), generator=torch.Generator().manual_seed(1))
    hidden = model.hidden(ids)
    (hidden.main.square().sum() + hidden.further[0].sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_linear_maps_of_blocks_and_mtp_are_in_fp8_and_nothing_else() -> None:
    model = Transformer(SHAPE)
    model.train_in_fp8(True)
    attention = {f"self_attn.{name}_proj" for name in ("q_a", "q_b", "kv_b", "o")} | {"self_attn.kv_a_proj_with_mqa"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    dense = attention | {f"mlp.{name}" for name in mlp}
    moe = attention | {"mlp.experts"} | {f"mlp.shared_experts.{name}" for name in mlp}
    expected = {f"model.layers.0.{name}" for name in dense} | {f"model.layers.1.{name}" for name in moe}
    expected |= {f"mtp.0.block.{name}" for name in moe} | {"mtp.0.eh_proj"}
    assert {name for name, module in model.named_modules() if getattr(module, "fp8", False)} == expected
    model.train_in_fp8(False)
    assert not any(getattr(module, "fp8", False) for module in model.modules())


def test_only_training_is_in_fp8() -> None:
    model, ids = random_model(), torch.arange(40)[None]
    with torch.no_grad():
        plain = model(ids)
        model.train_in_fp8(True)
        assert 1e-3 < far(model(ids), plain) < 0.5
        model.eval()
        assert torch.equal(model(ids), plain)


def test_weights_and_their_gradients_stay_fp32_while_activations_are_bf16() -> None:
    model = random_model()
    model.train_in_fp8(True)
    model.compute_dtype = torch.bfloat16
    gradients = teach(model)
    assert {grad.dtype for grad in gradients.values()} == {torch.float32}
    assert model.hidden(torch.arange(9)[None]).main.dtype == torch.bfloat16


def test_recomputing_a_block_changes_no_bit() -> None:
    model = random_model()
    model.train_in_fp8(True)
    plain = teach(model)
    model.recompute = True
    again = teach(model)
    assert all(torch.equal(again[name], grad) for name, grad in plain.items())


def test_what_is_kept_for_the_backward_pass_is_a_byte_a_number() -> None:
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    x, linear = drawn(0, 256, 256).bfloat16().requires_grad_(), Linear(256, 128)
    linear.fp8 = True
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x)
    assert sum(kept) == 256 * 256 + 256 * 2 * 4 + 128 * 256 + 2 * 4


def test_cuts_at_whole_tiles_of_tokens_change_no_gradient_and_others_do() -> None:
    x, w, dy = drawn(1, 384, 40), drawn(2, 24, 40), drawn(3, 384, 24)
    whole = found(x, w, dy)[2]
    for cut, same in ((128, True), (256, True), (100, False)):
        parts = found(x[:cut], w, dy[:cut])[2] + found(x[cut:], w, dy[cut:])[2]
        assert (far(parts, whole) < 1e-6) == same
        assert far(parts, whole) < 0.1
