"""Products of fp8 operands for training (V3 report, 3.3): a linear map, and a stack of them over experts.

    y  = x w^T      x  in tiles of 1 x 128, along the inputs          w in blocks of 128 x 128
    dx = dy w       dy in tiles of 1 x 128, along the outputs         w the same
    dw = dy^T x     dy and x in tiles of 128 x 1, along the tokens

Every tile has a scale of its own, taken from its values when they are there, so that an outlier costs only its tile
precision. All operands are E4M3, gradients too. What is kept for the backward pass are x and w in fp8; x is tiled anew
there, as V3 does. What comes in and goes out has the dtype of the activations, and dw is fp32.

This is an emulation: operands are rounded to fp8 and back and multiplied in fp32. Two E4M3 values have a product of
eight digits, which fp32 holds exactly, so what differs from products in fp8 whose sums move to fp32 every 128 numbers
is the rounding of fp32 sums and no more.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from motley.model.products import add_gradient
from motley.model.quantize import dequantize, quantize

TILE = 128
ALONG_ROW, ALONG_TOKENS, SQUARE = (1, TILE), (TILE, 1), (TILE, TILE)


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
        x, w = quantize(rows, ALONG_ROW), quantize(weight, SQUARE)
        ctx.save_for_backward(*x, *w, ends)
        ctx.weight, ctx.later = weight, later
        return _multiply(dequantize(*x, ALONG_ROW), dequantize(*w, SQUARE).mT, ends).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, x_scale, w, w_scale, ends = ctx.saved_tensors

        def of_weight() -> Tensor:
            dy, again = _rounded(grad, ALONG_TOKENS), _rounded(dequantize(x, x_scale, ALONG_ROW), ALONG_TOKENS)
            return _multiply(dy.mT, again, ends)

        of_rows = _multiply(_rounded(grad, ALONG_ROW), dequantize(w, w_scale, SQUARE), ends).to(grad.dtype)
        if ctx.later is None:
            return of_rows, of_weight().to(ctx.weight.dtype), None, None
        ctx.later.append(lambda: add_gradient(ctx.weight, of_weight()))
        return of_rows, None, None, None


def _rounded(real: Tensor, tile: tuple[int, int]) -> Tensor:
    """To fp8 and back."""
    return dequantize(*quantize(real, tile), tile)


def _multiply(left: Tensor, right: Tensor, ends: Tensor | None) -> Tensor:
    return left @ right if ends is None else F.grouped_mm(left, right, offs=ends)
