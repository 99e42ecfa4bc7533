"""DeepSeek's block-scaled FP8 (V3 report, 3.3): E4M3 values, and one scale for each block of them.

values  float8_e4m3fn [..., rows, columns]
scale   fp32, or ue8m0 (powers of two, V3.1), [..., blocks of rows, blocks of columns]; the last ones may be smaller
real    values * scale of their block

Weights have blocks of 128 x 128, in checkpoints (`weight_scale_inv` is the scale) as in training; what is multiplied
with them has tiles of 1 x 128 (`fp8.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_SUFFIX = "_scale_inv"
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
LEAST_SCALE = torch.finfo(torch.float32).tiny
TILE = 128

Block = tuple[int, int]


def quantize(real: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """real [..., rows, columns] → (values, scale): each block is scaled so that its largest becomes E4M3's largest.

    A block of zeros keeps a scale that is not zero; one with something that is not finite becomes NaN.
    """
    height, width = real.shape[-2:]
    blocks = _in_blocks(real.float(), block)
    scale = (blocks.abs().amax((-3, -1), keepdim=True) / LARGEST).clamp_(min=LEAST_SCALE)
    values = (blocks / scale).to(E4M3).flatten(-4, -3).flatten(-2)[..., :height, :width]
    return values, scale[..., 0, :, 0]


def dequantize(values: Tensor, scale: Tensor, block: Block) -> Tensor:
    """The inverse of `quantize`, in fp32: exact but for rounding in fp32."""
    height, width = values.shape[-2:]
    blocks = _in_blocks(values.float(), block)
    return blocks.mul_(scale[..., None, :, None]).flatten(-4, -3).flatten(-2)[..., :height, :width]


def dequantize_in_bands(weight: Tensor, scale: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """A checkpoint's weight [out, in] in `dtype`, made a band of blocks at a time: no fp32 copy of the whole exists."""
    result = torch.empty(weight.shape, dtype=dtype)
    factors = scale_as_float(scale)
    for band, start in enumerate(range(0, weight.shape[0], block[0])):
        rows = slice(start, start + block[0])
        result[rows] = dequantize(weight[rows], factors[band : band + 1], block).to(dtype)
    return result


def scale_as_float(scale: Tensor) -> Tensor:
    """A scale in fp32, whichever way it is stored (ue8m0: the exponent of a power of two, biased by 127)."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


def _in_blocks(real: Tensor, block: Block) -> Tensor:
    """[..., rows, columns] → [..., blocks of rows, rows of a block, blocks of columns, columns of a block].

    Blocks at the ends are filled up with zeros.
    """
    rows, columns = block
    height, width = real.shape[-2:]
    if height % rows or width % columns:
        real = F.pad(real, (0, -width % columns, 0, -height % rows))
        height, width = real.shape[-2:]
    return real.unflatten(-1, (width // columns, columns)).unflatten(-3, (height // rows, rows))
