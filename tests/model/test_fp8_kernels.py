"""Kernels for chips that multiply in fp8 come to what the emulation comes to (held to the definition by test_fp8.py).

Where there is no such chip, Triton's interpreter runs them on the CPU, number for number."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_fp8 import SIZES_OF_PRODUCTS, drawn, far, found
from torch import Tensor

from motley.fleet.probe import formats_of
from motley.model import fp8, quantize
from motley.model.experts import Experts
from motley.model.fp8 import ALONG_ROW, ALONG_TOKENS, SQUARE

kernels = pytest.importorskip("motley.model.fp8_kernels", reason="Triton is not installed", exc_type=ImportError)
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = pytest.mark.skipif(ON_GPU and "fp8" not in formats_of(DEVICE), reason="this GPU has no fp8")
CLOSE = 1e-3 if ON_GPU else 1e-6  # sums of 128 inside a tensor core have about 14 binary digits


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (129, 257), (3, 130, 140)])
@pytest.mark.parametrize("tile", [ALONG_ROW, ALONG_TOKENS, SQUARE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_the_same_number_for_number(
    shape: tuple[int, ...], tile: tuple[int, int], dtype: torch.dtype
) -> None:
    real = drawn(0, *shape).to(dtype)
    for lies in (real, real.mT.contiguous().mT):
        values, scale = kernels.quantize(lies.to(DEVICE), tile)
        expected_values, expected_scale = quantize.quantize(real, tile)
        assert torch.equal(scale.cpu(), expected_scale)
        assert torch.equal(values.cpu().float(), expected_values.float())


def test_what_is_halfway_goes_to_the_even_neighbour_and_what_is_small_to_the_nearest_step() -> None:
    steps = torch.arange(-1024, 1025) / 1024
    halfway = torch.cat([steps * 448 * 2.0**-power for power in range(18)] + [torch.tensor([448.0])])[None]
    values, scale = kernels.quantize(halfway[:, -128:].to(DEVICE), ALONG_ROW)
    assert float(scale) == 1.0
    assert torch.equal(values.cpu().float(), halfway[:, -128:].to(torch.float8_e4m3fn).float())
    loudest = torch.cat([halfway[:, :-1].view(-1, 1), torch.full((halfway.numel() - 1, 1), 448.0)], dim=1)
    values, _ = kernels.quantize(loudest.to(DEVICE), ALONG_ROW)
    assert torch.equal(values.cpu().float(), loudest.to(torch.float8_e4m3fn).float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("tile", "same"), [(ALONG_ROW, (0, 100)), (ALONG_TOKENS, (100, 3)), (SQUARE, (100, 100))])
def test_what_is_not_finite_breaks_its_tile_and_no_other(
    broken: float, tile: tuple[int, int], same: tuple[int, int]
) -> None:
    """Such a number is NaN afterwards; what shares its tile may be anything, and nothing else changes."""
    real = drawn(0, 256, 256)
    intact = quantize.dequantize(*kernels.quantize(real.to(DEVICE), tile), tile).cpu()
    real[0, 3] = broken
    values, scale = kernels.quantize(real.to(DEVICE), tile)
    after = quantize.dequantize(values, scale, tile).cpu()
    assert after[0, 3].isnan()
    assert not scale[same[0] // tile[0], same[1] // tile[1]].isfinite()
    height, width = tile
    elsewhere = torch.ones_like(real, dtype=torch.bool)
    elsewhere[:height, :width] = False
    if tile == ALONG_TOKENS:
        elsewhere[:height, :width], elsewhere[:height, 3] = True, False
    assert torch.equal(after[elsewhere], intact[elsewhere])


def both(*case: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(the kernels', the emulation's) outputs, gradients of inputs and gradients of weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "_on_chip", lambda tensor: True)
        by_kernels = found(*(tensor.to(DEVICE) for tensor in case))
    for one, other in zip(by_kernels, found(*case), strict=True):
        yield one.cpu(), other


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [*SIZES_OF_PRODUCTS, (0, 40, 30)])
def test_all_three_products_are_those_of_the_emulation(tokens: int, inputs: int, outputs: int) -> None:
    for one, other in both(drawn(1, tokens, inputs), drawn(2, outputs, inputs), drawn(3, tokens, outputs)):
        assert one.shape == other.shape
        assert far(one, other) < CLOSE


@pytest.mark.parametrize("counts", [(128, 0, 384, 0), (0, 0, 0, 256), (128, 128, 128, 128)])
def test_a_stack_of_experts_is_that_of_the_emulation(counts: tuple[int, ...]) -> None:
    rows, ends = sum(counts), torch.tensor(counts).cumsum(0).int()
    for one, other in both(drawn(1, rows, 148), drawn(2, 4, 132, 148), drawn(3, rows, 132), ends):
        assert one.shape == other.shape
        assert far(one, other) < CLOSE
    assert not one[counts.index(0)].any() if 0 in counts else True, "an expert without tokens learns nothing"


def test_experts_learn_by_kernels_what_they_learn_by_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one product leaves is rounded for the next, where the last digit of a sum may tip a number over."""
    experts, x = Experts(4, 148, 72).to(DEVICE), drawn(5, 90, 148).clamp(-4, 4).to(DEVICE)
    experts.fp8 = True
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data = drawn(seed, *parameter.shape).clamp(-3, 3).to(DEVICE) / 5
    chosen = torch.arange(180, device=DEVICE).view(90, 2) % 3  # the fourth gets none
    outcomes: list[list[Tensor]] = []
    for by_kernels in (True, False):
        monkeypatch.setattr(fp8, "_on_chip", lambda tensor, answer=by_kernels: answer)
        y = experts(x, chosen, torch.ones(chosen.shape, device=DEVICE))
        outcomes.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(experts.parameters()))])
    for one, other in zip(*outcomes, strict=True):
        assert far(one, other) < 5e-3


def test_a_chip_that_scales_a_product_wrongly_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two places to compute the second takes the kernels, then such as mix up the right operand's scales."""
    expected: list[list[Tensor]] = []

    def second(tensor: Tensor) -> bool:
        return ON_GPU or len(expected) % 2 == 1

    def learned(*case: Any) -> list[Tensor]:
        expected.append(of_learning(*case))
        return expected[-1]

    def multiply(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, *more: Any) -> Tensor:
        return as_it_is(left, left_scale, right, right_scale.flip(-1), *more)

    of_learning, as_it_is = fp8._learned, kernels.multiply
    monkeypatch.setattr(fp8, "_learned", learned)
    monkeypatch.setattr(fp8, "_on_chip", second)
    assert fp8.wrong(DEVICE) is None
    monkeypatch.setattr(kernels, "multiply", multiply)
    assert "outputs of 256 x 384 x 512 in torch.bfloat16 are" in (fp8.wrong(DEVICE) or "")


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from motley.model import fp8_kernels as kernels

def compiled(kernel, capability, pointers, constants):
    names = kernel.arg_names
    kinds = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    whole = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, kinds, {(names.index(name),): value for name, value in constants.items()}, whole)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})

operands = {"left": "*fp8e4nv", "right": "*fp8e4nv", "left_scale": "*fp32", "right_scale": "*fp32"}
operands |= {"out": "*fp32", "ends": "*i32"}
instruction = {89: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", 90: "wgmma.mma_async.sync.aligned.m64n128k32"}
most = {89: 99 << 10, 90: 227 << 10}  # bytes of shared memory
near = {"left_sum": 1, "right_sum": 1}  # side by side in memory, as in a forward pass; rows of weights otherwise
for capability, (runs, tile, sides) in itertools.product((89, 90), (("none", 128, near), ("rows", 128, near),
                                                                    ("sum", 1, {"left_row": 1, "right_column": 1}))):
    constants = {"RIGHT_TILE": tile, "RUNS": runs, "TILE": 128, **sides, **{"out_column": 1}}
    constants |= {"ends": None} if runs == "none" else {}
    done = compiled(kernels._multiply, capability, operands, constants)
    assert instruction[capability] in done.asm["ptx"], (capability, runs)
    assert done.metadata.shared <= most[capability], (capability, runs, done.metadata.shared)
tiles = {"TILE_ROWS": 1, "TILE_COLUMNS": 128, "TILE": 128, "LARGEST": kernels.LARGEST, "TINY": kernels.LEAST_SCALE}
rounding = compiled(kernels._quantize, 90, {"real": "*bf16", "values": "*fp8e4nv", "scale": "*fp32"}, tiles)
assert "div.rn.f32" in rounding.asm["ptx"], "a scale is divided by exactly"
"""


def test_the_kernels_compile_into_fp8_products_of_ada_and_hopper_without_such_a_chip() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
