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

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from motley.model.quantize import TILE, Block, dequantize, quantize

ALONG_ROW, ALONG_TOKENS, SQUARE = (1, TILE), (TILE, 1), (TILE, TILE)
FAR = 2e-2
"""Largest relative error of a row that rounding explains: sums in a tensor core keep about 14 binary digits (V3 report,
3.3.2); a wrong scale or tile gives a larger one."""


def lacking() -> str | None:
    """The software that products in fp8 on a GPU need and that is missing, in a few words; None: nothing is missing."""
    return None if find_spec("triton") else "our kernels need Triton, which is not installed"


def wrong(device: torch.device) -> str | None:
    """Where the products on a device differ from their emulation, in words; None if they agree.

    Compared are both kinds of products in training, with rows in bf16 and with sizes that are not whole tiles.
    """
    for experts, rows, inputs, outputs, dtype in (
        (0, 256, 384, 512, torch.bfloat16), (2, 256, 384, 512, torch.bfloat16), (0, 130, 300, 200, torch.float32),
    ):  # fmt: skip
        ends = torch.tensor([128, 256], dtype=torch.int32) if experts else None
        x, upstream = (_uneven(number, rows, width).to(dtype) for number, width in enumerate((inputs, outputs)))
        w = _uneven(2, *[experts] * bool(experts), outputs, inputs)
        outcomes = [_learned(x, w, upstream, ends, place) for place in (torch.device("cpu"), device)]
        names = ("outputs", "gradients of inputs", "gradients of weights")
        for name, expected, found in zip(names, *outcomes, strict=True):
            far = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
            if not far < FAR:
                return f"{name} of {rows} x {inputs} x {outputs} in {dtype} are {far:.1e} away"
    return None


def _uneven(seed: int, *shape: int) -> Tensor:
    """Normal numbers whose rows and columns are of very different sizes, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.randint(-3, 4, edge, generator=generator) for edge in ((*shape[:-1], 1), (shape[-1],)))
    return torch.randn(shape, generator=generator) * 4.0 ** sum(sizes)


def _learned(x: Tensor, w: Tensor, upstream: Tensor, ends: Tensor | None, place: torch.device) -> list[Tensor]:
    """(outputs, gradients of inputs, gradients of weights) by the products of a device."""
    x, w = (tensor.to(place, copy=True).requires_grad_() for tensor in (x, w))
    y = fp8_product(x, w, None if ends is None else ends.to(place))
    return [tensor.detach().cpu().float() for tensor in (y, *torch.autograd.grad(y, (x, w), upstream.to(place)))]


def fp8_product(rows: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
    """rows [rows, in] times weight [out, in], transposed, → [rows, out].

    Args:
        rows: in the dtype of the activations.
        weight: the master weight; or [experts, out, in], each for a run of rows.
        ends: where the experts' runs end: multiples of TILE, so that no tile belongs to two.
    """
    return _Product.apply(rows, weight, ends)  # pyright: ignore[reportReturnType]


Operands = Sequence[Tensor]
"""What a product keeps for its backward pass: x in fp8, scales of its tiles, w in fp8, scales of its blocks."""


def forward_product(rows: Tensor, weight: Tensor, ends: Tensor | None) -> tuple[Tensor, Operands]:
    """(`fp8_product` without a gradient, what its gradients are computed from)."""
    (x, x_scale), (w, w_scale) = _to_fp8(rows, ALONG_ROW), _to_fp8(weight, SQUARE)
    return _multiply((x, x_scale), (w.mT, w_scale.mT), TILE, ends).to(rows.dtype), (x, x_scale, w, w_scale)


def gradient_of_rows(grad: Tensor, operands: Operands, ends: Tensor | None) -> Tensor:
    """dx, in the dtype of `grad`, which is dy [rows, out]."""
    _, _, w, w_scale = operands
    return _multiply(_to_fp8(grad, ALONG_ROW), (w, w_scale), TILE, ends).to(grad.dtype)


def gradient_of_weight(grad: Tensor, operands: Operands, ends: Tensor | None) -> Tensor:
    """dw in fp32; `grad` is dy [rows, out]."""
    x, x_scale, _, _ = operands
    dy, dy_scale = _to_fp8(grad, ALONG_TOKENS)
    again = _to_fp8(dequantize(x, x_scale, ALONG_ROW), ALONG_TOKENS)
    return _multiply((dy.mT, dy_scale.mT), again, 1, ends)


class _Product(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, operands = forward_product(rows, weight, ends)
        ctx.save_for_backward(*operands, ends)
        ctx.weight_dtype = weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        *operands, ends = ctx.saved_tensors
        of_weight = gradient_of_weight(grad, operands, ends).to(ctx.weight_dtype)
        return gradient_of_rows(grad, operands, ends), of_weight, None


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
