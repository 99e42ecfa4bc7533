"""DeepSeek's block-scaled FP8 weights (V3 report, 3.3): one scale for each block of 128 x 128 values.

weight            float8_e4m3fn [out, in]
weight_scale_inv  fp32, or ue8m0 (powers of two, V3.1), [ceil(out / 128), ceil(in / 128)]
real value        weight * scale of its block
"""

import torch
from torch import Tensor

SCALE_SUFFIX = "_scale_inv"


def scale_as_float(scale: Tensor) -> Tensor:
    """A scale in fp32, whichever way it is stored (ue8m0: the exponent of a power of two, biased by 127)."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """weight [out, in] in FP8 with scale [blocks of out, blocks of in] → real values in `dtype`.

    Computed in fp32 a band of blocks at a time, so that no fp32 copy of the whole matrix exists.
    """
    rows, columns = block
    result = torch.empty(weight.shape, dtype=dtype)
    factors = scale_as_float(scale).repeat_interleave(columns, dim=1)[:, : weight.shape[1]]
    for band, start in enumerate(range(0, weight.shape[0], rows)):
        result[start : start + rows] = (weight[start : start + rows].float() * factors[band]).to(dtype)
    return result
