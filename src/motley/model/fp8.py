"""Products of fp8 operands for training (V3 report, 3.3): a linear map, and a stack of them over experts.

    y  = x w^T      x  in tiles of 1 x 128, along the inputs          w in blocks of 128 x 128
    dx = dy w       dy in tiles of 1 x 128, along the outputs         w the same
    dw = dy^T x     dy and x in tiles of 128 x 1, along the tokens

Every tile has a scale of its own, taken from its values when they are there, so that an outlier costs only its tile
precision. All operands are E4M3, gradients too. What is kept for the backward pass are x and w in fp8; x is tiled anew
there, as V3 does. What comes in and goes out has the dtype of the activations, and dw is fp32.

Chips that multiply in fp8 do so (`fp8_kernels.py`); sums move to fp32 every 128 numbers. Elsewhere it is emulated:
operands are rounded to fp8 and back and multiplied in fp32. Two E4M3 values have a product of eight digits, which fp32
holds exactly, so what differs is the rounding of sums and no more.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from motley.model.products import add_gradient
from motley.model.quantize import Block, dequantize, quantize

TILE = 128
ALONG_ROW, ALONG_TOKENS, SQUARE = (1, TILE), (TILE, 1), (TILE, TILE)
FAR = 5e-3  # sums of 128 inside a tensor core keep about 14 digits (V3 report, 3.3.2); a mistake is of another size


def lacking(device: torch.device) -> str | None:
    """What a chip that multiplies in fp8 is not enough for, in a few words; None where nothing is missing."""
    if device.type == "cpu" or find_spec("triton"):
        return None
    return "our kernels for it need Triton, which is not installed"


def wrong(device: torch.device) -> str | None:
    """What the chip's products and their emulation disagree on, for a few random ones; None if they agree."""
    generator = torch.Generator().manual_seed(0)
    shapes = (256, 300), (2, 200, 300), (256, 200)
    rows, weight, upstream = (torch.randn(shape, generator=generator) for shape in shapes)
    ends = torch.tensor([128, 256], dtype=torch.int32)
    outcomes: list[list[Tensor]] = []
    for place in (torch.device("cpu"), device):
        x, w = rows.to(place, copy=True).requires_grad_(), weight.to(place, copy=True).requires_grad_()
        y = fp8_product(x, w, ends.to(place))
        outcomes.append([y.detach().cpu(), *(one.cpu() for one in torch.autograd.grad(y, (x, w), upstream.to(place)))])
    names = ("outputs", "gradients of inputs", "gradients of weights")
    for name, expected, found in zip(names, *outcomes, strict=True):
        far = float((found - expected).norm() / expected.norm())
        if not far < FAR:
            return f"{name} are {far:.1e} away"
    return None


def fp8_product(
    rows: Tensor, weight: Tensor, ends: Tensor | None = None, later: list[Callable[[], None]] | None = None
) -> Tensor:
    """rows [rows, in] times weight [out, in], transposed, → [rows, out].

    Args:
        rows: in the dtype of the activations.
        weight: the master weight; or [experts, out, in], each for a run of rows.
        ends: where the experts' runs end: multiples of TILE, so that no tile belongs to two.
        later: as in `Linear`.
    """
    return _Product.apply(rows, weight, ends, later)  # pyright: ignore[reportReturnType]


class _Product(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor | None, later: list[Callable[[], None]] | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, x_scale), (w, w_scale) = _to_fp8(rows, ALONG_ROW), _to_fp8(weight, SQUARE)
        ctx.save_for_backward(x, x_scale, w, w_scale, ends)
        ctx.weight, ctx.later = weight, later
        return _multiply((x, x_scale), (w.mT, w_scale.mT), TILE, ends).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, x_scale, w, w_scale, ends = ctx.saved_tensors

        def of_weight() -> Tensor:
            dy, dy_scale = _to_fp8(grad, ALONG_TOKENS)
            again = _to_fp8(dequantize(x, x_scale, ALONG_ROW), ALONG_TOKENS)
            return _multiply((dy.mT, dy_scale.mT), again, 1, ends)

        of_rows = _multiply(_to_fp8(grad, ALONG_ROW), (w, w_scale), TILE, ends).to(grad.dtype)
        if ctx.later is None:
            return of_rows, of_weight().to(ctx.weight.dtype), None, None
        ctx.later.append(lambda: add_gradient(ctx.weight, of_weight()))
        return of_rows, None, None, None


Narrow = tuple[Tensor, Tensor]
"""Values in fp8, and the scales of their tiles."""


def _on_chip(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _to_fp8(real: Tensor, tile: Block) -> Narrow:
    if _on_chip(real):
        from motley.model import fp8_kernels  # needs Triton

        return fp8_kernels.quantize(real, tile)
    return quantize(real, tile)


def _multiply(left: Narrow, right: Narrow, right_tile: int, ends: Tensor | None) -> Tensor:
    """left in tiles of 1 x 128 times right in tiles of 128 x right_tile, in fp32."""
    if _on_chip(left[0]):
        from motley.model import fp8_kernels

        return fp8_kernels.multiply(*left, *right, right_tile, ends)
    one, other = dequantize(*left, ALONG_ROW), dequantize(*right, (TILE, right_tile))
    return one @ other if ends is None else F.grouped_mm(one, other, offs=ends)
