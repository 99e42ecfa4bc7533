"""Kernels for chips that multiply in fp8 come to what the emulation comes to (held to the definition by test_fp8.py).

Where there is no such chip, Triton's interpreter runs them on the CPU, number for number."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from test_fp8 import SIZES_OF_PRODUCTS, drawn, far, found
from torch import Tensor

from motley.model import fp8, quantize
from motley.model.experts import Experts
from motley.model.fp8 import ALONG_ROW, ALONG_TOKENS, SQUARE

kernels = pytest.importorskip("motley.model.fp8_kernels", reason="Triton is not installed", exc_type=ImportError)
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(ON_GPU and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no fp8")
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_breaks_its_tile_and_no_other(broken: float) -> None:
    real = torch.ones(2, 256)
    real[0, 3] = broken
    after = quantize.dequantize(*kernels.quantize(real.to(DEVICE), ALONG_ROW), ALONG_ROW).cpu()
    assert after[0, 3].isnan()
    assert torch.equal(after[0, 128:], real[0, 128:])
    assert torch.equal(after[1], real[1])


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


def test_a_chip_that_rounds_or_adds_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8.wrong(DEVICE) is None

    def transposed(left: fp8.Narrow, right: fp8.Narrow, right_tile: int, ends: Tensor | None) -> Tensor:
        return multiply(left, (right[0], right[1].flip(-1)), right_tile, ends)

    multiply, calls = fp8._multiply, 0

    def later(*case: object) -> Tensor:
        nonlocal calls
        calls += 1
        return (transposed if calls > 3 else multiply)(*case)  # type: ignore[arg-type]

    monkeypatch.setattr(fp8, "_multiply", later)
    assert "outputs are" in (fp8.wrong(DEVICE) or "")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from motley.model import fp8_kernels as kernels

def asm(kernel, capability, pointers, constants):
    names = kernel.arg_names
    kinds = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    source = ASTSource(kernel, kinds, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]

operands = {"left": "*fp8e4nv", "right": "*fp8e4nv", "left_scale": "*fp32", "right_scale": "*fp32"}
operands |= {"out": "*fp32", "ends": "*i32"}
product = {"RIGHT_TILE": 128, "RUNS": "rows", "TILE": 128}
assert "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32" in asm(kernels._multiply, 89, operands, product)
product = {"RIGHT_TILE": 1, "RUNS": "sum", "TILE": 128}
assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in asm(kernels._multiply, 90, operands, product)
tiles = {"TILE_ROWS": 1, "TILE_COLUMNS": 128, "TILE": 128, "LARGEST": kernels.LARGEST, "TINY": kernels.TINY}
rounding = asm(kernels._quantize, 90, {"real": "*bf16", "values": "*fp8e4nv", "scale": "*fp32"}, tiles)
assert "div.rn.f32" in rounding, "a scale is divided by exactly"
"""


def test_the_kernels_compile_into_fp8_products_of_ada_and_hopper_without_such_a_chip() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
