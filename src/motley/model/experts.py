"""Routed experts, stacked: weights [experts, …], tokens sorted by expert, one grouped product a projection.

    tokens      a b c d                       each token goes to k experts: k slots
    slots       a0 a1 b0 b1 c0 c1 d0 d1       token * k + choice
    rows        b0 c1 d0 ·│ a0 b1 · ·│ …      sorted by expert; `·` fills each expert up to a multiple of PAD

On a CPU every new number of rows makes the matrix library compile another kernel, so that real routing, which never
gives the same counts twice, would run three times slower than a benchmark that repeats itself. Rounded counts come
from a small set. In fp8 each expert is filled up to whole tiles, so that no tile mixes two. A filling row copies the
last token of its expert and weighs nothing: neither values nor gradients notice it, nor a tile's largest value.

`moe_reference` is what one reads; `Experts.forward` is what runs; a test holds them equal.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from motley.model import native
from motley.model.fp8 import TILE, fp8_product
from motley.model.native_mlp import native_experts
from motley.model.products import grouped_product

PAD = 64  # rows, on a CPU


def moe_reference(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert after another: x [tokens, hidden], chosen and weights [tokens, k] → [tokens, hidden]."""
    y = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(chosen == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down[expert])
        y = y.index_add(0, token, out * weights[token, slot, None].to(x.dtype))
    return y


@dataclass(frozen=True)
class ExpertRows:
    """The order of the rows: which slot each row stands for, and the row of each slot.

    ends: int32 [experts], where each expert's rows end.
    token_of_row: [rows], the token a row copies.
    slot_of_row: [rows], the slot a row stands for; one past the last slot for a filling row.
    row_of_slot: [tokens * k].
    """

    ends: Tensor
    token_of_row: Tensor
    slot_of_row: Tensor
    row_of_slot: Tensor

    @classmethod
    def of(cls, chosen: Tensor, experts: int, pad: int) -> "ExpertRows":
        """Order the slots of chosen [tokens, k], each expert filled up to a multiple of `pad` rows."""
        slots, k = chosen.numel(), chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        ones = torch.ones_like(order)
        counts = order.new_zeros(experts).scatter_add_(0, chosen.flatten(), ones)  # bincount would wait for a GPU
        padded = (counts + pad - 1) // pad * pad
        ends = padded.cumsum(0)
        shift = (ends - padded) - (counts.cumsum(0) - counts)  # how far an expert's rows moved to make room
        rows_sorted = torch.arange(slots, device=chosen.device) + shift.repeat_interleave(counts, output_size=slots)
        rows = slots if pad == 1 else int(ends[-1])
        slot_of_row = order.new_full((rows,), slots)
        slot_of_row[rows_sorted] = order
        row_of_slot = torch.empty_like(order)
        row_of_slot[order] = rows_sorted
        slot_copied = slot_of_row
        if pad > 1:
            last = order[counts.cumsum(0) - 1]  # slot of each expert
            slot_copied = slot_of_row.where(slot_of_row < slots, last.repeat_interleave(padded, output_size=rows))
        return cls(ends.int(), slot_copied // k, slot_of_row, row_of_slot)


class Experts(nn.Module):
    """`experts` gated MLPs of equal shape in two stacked tensors."""

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.fp8 = False  # as in Linear

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden], chosen [tokens, k], weights fp32 [tokens, k] → [tokens, hidden]."""
        if self.uses_kernel(x):
            return native_experts(x, chosen, weights, self.gate_up_proj, self.down_proj)
        if self._few(x, chosen):
            return self._gathered(x, chosen, weights)
        layout, k = ExpertRows.of(chosen, len(self.gate_up_proj), self._pad(chosen)), chosen.shape[1]
        rows = _Dispatch.apply(x, layout.token_of_row, layout.row_of_slot, k)
        gate_up = self.grouped(rows, self.gate_up_proj, layout.ends)  # pyright: ignore[reportArgumentType]
        # Weighing the inner activation instead of the output is the same sum and narrower.
        weight_of_row = F.pad(weights.flatten().to(x.dtype), (0, 1))[layout.slot_of_row, None]
        gate, up = gate_up.chunk(2, dim=-1)
        inner = F.silu(gate) * up * weight_of_row
        out = self.grouped(inner, self.down_proj, layout.ends)
        return _Combine.apply(out, layout.token_of_row, layout.row_of_slot, k)  # pyright: ignore[reportReturnType]

    def uses_kernel(self, x: Tensor) -> bool:
        """Whether one kernel computes all of `forward`."""
        if self.fp8 and self.training:
            return False
        return native.fits(x, *self.down_proj.shape[1:]) and self.down_proj.dtype == torch.float32

    def _few(self, x: Tensor, chosen: Tensor) -> bool:
        """Whether a GPU decodes few tokens in a format whose grouped products PyTorch computes in a loop of the host:
        that would wait for the device in each layer. With more slots than experts too much would be copied.
        """
        waits = x.device.type != "cpu" and x.dtype != torch.bfloat16
        return waits and not torch.is_grad_enabled() and chosen.numel() <= len(self.gate_up_proj)

    def _gathered(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each slot beside a copy of its expert, all in one product."""
        slots, k = chosen.flatten(), chosen.shape[1]
        rows = x.repeat_interleave(k, dim=0)[..., None]
        gate, up = torch.bmm(self.gate_up_proj[slots].to(x.dtype), rows).chunk(2, dim=1)
        out = torch.bmm(self.down_proj[slots].to(x.dtype), F.silu(gate) * up)[..., 0]
        return (out * weights.flatten()[:, None].to(x.dtype)).unflatten(0, (-1, k)).sum(dim=1)

    def _pad(self, chosen: Tensor) -> int:
        """To what multiple of rows each expert is filled up."""
        if self.fp8 and self.training:
            return TILE
        return PAD if chosen.device.type == "cpu" and chosen.numel() >= PAD * len(self.gate_up_proj) else 1

    def grouped(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """rows [rows, in] sorted by expert, weight [experts, out, in] → [rows, out]."""
        if self.fp8 and self.training:
            return fp8_product(rows, weight, ends)
        return grouped_product(rows, weight.to(rows.dtype).transpose(1, 2), ends)


def _gather_sum(rows: Tensor, row_of_slot: Tensor, k: int) -> Tensor:
    """Sum of the k rows of each token, [tokens, hidden]; gathered and summed in one pass."""
    return F.embedding_bag(row_of_slot.view(-1, k), rows, mode="sum")


class _Dispatch(torch.autograd.Function):
    """Copies each token to its rows; the gradient gathers and sums, without a scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, token_of_row: Tensor, row_of_slot: Tensor, k: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(row_of_slot)
        ctx.k = k
        return x.index_select(0, token_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (row_of_slot,) = ctx.saved_tensors
        return _gather_sum(grad, row_of_slot, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """Sums the k rows of each token; the transpose of `_Dispatch` (filling rows may get any gradient: they weigh 0)."""

    @staticmethod
    def forward(ctx, rows: Tensor, token_of_row: Tensor, row_of_slot: Tensor, k: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(token_of_row)
        return _gather_sum(rows, row_of_slot, k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (token_of_row,) = ctx.saved_tensors
        return grad.index_select(0, token_of_row), None, None, None
