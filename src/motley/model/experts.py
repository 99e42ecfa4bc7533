"""Routed experts, stacked: weights [experts, …], tokens sorted by expert, one grouped product a projection.

`moe_reference` is what one reads; `Experts.forward` is what runs; a test holds them equal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def moe_reference(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert after another: x [tokens, hidden], chosen and weights [tokens, k] → [tokens, hidden]."""
    y = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(chosen == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down[expert])
        y = y.index_add(0, token, out * weights[token, slot, None].to(x.dtype))
    return y


class Experts(nn.Module):
    """`experts` gated MLPs of equal shape in two stacked tensors."""

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden], chosen [tokens, k], weights fp32 [tokens, k] → [tokens, hidden]."""
        order = chosen.flatten().argsort(stable=True)  # slots (token * k + choice) sorted by expert
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        ends = torch.bincount(chosen.flatten(), minlength=self.gate_up_proj.shape[0]).cumsum(0).int()
        rows = Dispatch.apply(x, order, back, chosen.shape[1])
        gate, up = self._grouped(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        # Weighing the inner activation instead of the output is the same sum and narrower.
        inner = F.silu(gate) * up * weights.flatten()[order, None].to(x.dtype)
        return Combine.apply(self._grouped(inner, self.down_proj, ends), order, back, chosen.shape[1])

    @staticmethod
    def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """rows [slots, in] sorted by expert, weight [experts, out, in] → [slots, out]."""
        return F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends)


class Dispatch(torch.autograd.Function):
    """Copies each token to its k slots in expert order; the gradient gathers and sums, without a scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(order, back)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        _, back = ctx.saved_tensors
        return grad.index_select(0, back).unflatten(0, (-1, ctx.k)).sum(dim=1), None, None, None


class Combine(torch.autograd.Function):
    """Sums the k slots of each token; the transpose of `Dispatch`."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(order)
        ctx.k = k
        return rows.index_select(0, back).unflatten(0, (-1, k)).sum(dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order // ctx.k), None, None, None
