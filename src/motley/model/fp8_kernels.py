"""Products of fp8 operands on chips that multiply in fp8, in Triton: what `fp8.py` emulates elsewhere.

    out [m, n]  =  sum over intervals of 128 numbers        left 128 x 128 │ right 128 x 128     in fp8, fresh sums
                   scale of left's row and interval    ×    the interval's sums                  to fp32, added up
                   scale of right's interval and column

So sums leave the tensor core every 128 numbers, as DeepSeek-V3 did it (3.3.2), and tiles of 128 along the sum never
meet within one. One kernel computes all three products of a linear map: only strides and the width of right's tiles
differ. Experts are runs of rows of `left` (each with a right operand of its own) or, for the gradients of weights, runs
of the numbers that are summed; runs end at multiples of 128.

Triton comes with PyTorch's builds for NVIDIA; only `fp8.py` imports this module, when there is something to multiply.
"""

# pyright: reportCallIssue=false
# Triton gives launches a type of their own, with options beside what a kernel takes.

import torch
import triton
import triton.language as tl
from torch import Tensor

from motley.model.quantize import E4M3, LARGEST, LEAST_SCALE, TILE, Block


def multiply(
    left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, right_tile: int, ends: Tensor | None
) -> Tensor:
    """left [rows, sum] times right [sum, columns] → fp32 [rows, columns].

    Args:
        left: E4M3, in tiles of 1 x 128.
        left_scale: [rows, intervals].
        right: E4M3, in tiles of 128 x right_tile; with runs of rows a stack [experts, sum, columns].
        right_scale: [intervals, tiles of columns], or a stack of them.
        right_tile: 128, or 1.
        ends: int32 [experts], where runs end: of rows where `right` is a stack, else of what is summed, and the
            result is [experts, rows, columns].
    """
    rows, total = left.shape
    stacked, scales = (right, right_scale) if right.dim() == 3 else (right[None], right_scale[None])
    runs = "none" if ends is None else "rows" if right.dim() == 3 else "sum"
    experts = len(ends) if ends is not None and runs == "sum" else 1
    out = left.new_empty((experts, rows, right.shape[-1]), dtype=torch.float32)
    if ends is not None and runs == "rows":  # the expert of each block of rows is what the kernel needs
        first = torch.arange(0, rows, TILE, device=left.device, dtype=ends.dtype)
        ends = torch.searchsorted(ends, first, right=True, out_int32=True).clamp_(max=len(ends) - 1)
    if out.numel():
        blocks = triton.cdiv(rows, TILE), triton.cdiv(right.shape[-1], TILE), experts
        with torch.cuda.device_of(left):  # where Triton launches; nothing on a CPU
            _multiply[blocks](
                left, left_scale, stacked, scales, out, ends, rows, right.shape[-1], total,
                *left.stride(), *left_scale.stride(), *stacked.stride(), *scales.stride(), *out.stride(),
                right_tile, runs, TILE, num_warps=8,
            )  # fmt: skip
    return out if runs == "sum" else out[0]


@triton.jit
def _multiply(
    left, left_scale, right, right_scale, out, ends,
    rows, columns, total,
    left_row, left_sum, left_scale_row, left_scale_sum,
    right_expert, right_sum, right_column, right_scale_expert, right_scale_sum, right_scale_column,
    out_expert, out_row, out_column,
    RIGHT_TILE: tl.constexpr, RUNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A block of 128 x 128 results."""
    within = tl.arange(0, TILE)
    row = tl.program_id(0) * TILE + within
    column = tl.program_id(1) * TILE + within
    begin, end = 0, total
    if RUNS == "rows":
        expert = tl.load(ends + tl.program_id(0)).to(tl.int64)
        right += expert * right_expert
        right_scale += expert * right_scale_expert
    if RUNS == "sum":
        expert = tl.program_id(2)
        end = tl.load(ends + expert)
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        out += expert.to(tl.int64) * out_expert
    row_there, column_there = row < rows, column < columns
    left += row.to(tl.int64)[:, None] * left_row
    left_scale += row.to(tl.int64) * left_scale_row
    right += column.to(tl.int64)[None, :] * right_column
    right_scale += (column // RIGHT_TILE).to(tl.int64) * right_scale_column
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    for first in range(begin, end, TILE):
        index = (first + within).to(tl.int64)
        there = index < end
        a = tl.load(left + index[None, :] * left_sum, mask=row_there[:, None] & there[None, :], other=0.0)
        b = tl.load(right + index[:, None] * right_sum, mask=there[:, None] & column_there[None, :], other=0.0)
        of_left = tl.load(left_scale + (first // TILE) * left_scale_sum, mask=row_there, other=0.0)
        of_right = tl.load(right_scale + (first // TILE) * right_scale_sum, mask=column_there, other=0.0)
        sums += tl.dot(a, b) * of_left[:, None] * of_right[None, :]
    out += row.to(tl.int64)[:, None] * out_row + column.to(tl.int64)[None, :] * out_column
    tl.store(out, sums, mask=row_there[:, None] & column_there[None, :])


def quantize(real: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """As `motley.model.quantize.quantize`, in one pass over `real` [rows, columns] or [experts, rows, columns]."""
    stack = real if real.dim() == 3 else real[None]
    experts, rows, columns = stack.shape
    values = torch.empty(stack.shape, dtype=E4M3, device=real.device)
    scale = real.new_empty((experts, triton.cdiv(rows, block[0]), triton.cdiv(columns, block[1])), dtype=torch.float32)
    if values.numel():
        with torch.cuda.device_of(stack):
            _quantize[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE), experts)](
                stack, values, scale, rows, columns, *stack.stride(), *values.stride(), *scale.stride(),
                *block, TILE, LARGEST, LEAST_SCALE, num_warps=8,
            )  # fmt: skip
    return (values, scale) if real.dim() == 3 else (values[0], scale[0])


@triton.jit
def _to_e4m3(x):
    """To the nearest E4M3, ties to even; x in fp32, at most 448.

    A sum with a number so large that its last digit is E4M3's last digit beside x rounds just there. What is then left
    for the conversion is exact, in whichever mode chips and Triton's interpreter round.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # of two, at most |x|
    large = tl.maximum(power, 0.015625) * 1572864.0  # 2^-6, E4M3's least normal number, and 1.5 * 2^20
    return ((x + large) - large).to(tl.float8e4nv)


@triton.jit
def _quantize(
    real, values, scale, rows, columns,
    real_expert, real_row, real_column, values_expert, values_row, values_column, scale_expert, scale_row, scale_column,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """128 x 128 numbers: 128 tiles of a row or a column, or one square."""
    expert = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = real + expert * real_expert + row[:, None] * real_row + column[None, :] * real_column
    x = tl.load(at, mask=there, other=0.0).to(tl.float32)
    # The largest of comparisons leaves NaN out, and x * 0 brings it in, infinities as well.
    size, broken = tl.abs(x), x * 0.0
    if TILE_COLUMNS > 1:
        size, broken = tl.max(size, axis=1, keep_dims=True), tl.sum(broken, axis=1, keep_dims=True)
    if TILE_ROWS > 1:
        size, broken = tl.max(size, axis=0, keep_dims=True), tl.sum(broken, axis=0, keep_dims=True)
    factor = tl.maximum(tl.div_rn(size, LARGEST), TINY) + broken
    rounded = _to_e4m3(tl.div_rn(x, tl.broadcast_to(factor, x.shape)))
    at = values + expert * values_expert + row[:, None] * values_row + column[None, :] * values_column
    tl.store(at, rounded, mask=there)
    scale += expert * scale_expert
    if TILE_ROWS > 1 and TILE_COLUMNS > 1:
        tl.store(scale + tl.program_id(0) * scale_row + tl.program_id(1) * scale_column, tl.max(factor))
    elif TILE_COLUMNS > 1:
        tile = scale + row * scale_row + tl.program_id(1) * scale_column
        tl.store(tile, tl.reshape(factor, (TILE,)), mask=row < rows)
    else:
        tile = scale + tl.program_id(0) * scale_row + column * scale_column
        tl.store(tile, tl.reshape(factor, (TILE,)), mask=column < columns)
