"""The kernel of gated MLPs as functions with a gradient: routed experts, and a dense MLP, which is one expert for all.

Equal to `moe_reference` and to `MLP`; only gate and up of each row are kept for the backward pass.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from motley.model import native


def native_experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x fp32 or bf16 [tokens, hidden], chosen [tokens, k], weights fp32 [tokens, k] → [tokens, hidden].

    gate_up and down are fp32, [experts, 2 inner, hidden] and [experts, hidden, inner].
    """
    return _Experts.apply(x, chosen, weights, gate_up, down)  # pyright: ignore[reportReturnType]


def native_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x fp32 or bf16 [..., hidden], gate and up fp32 [inner, hidden], down fp32 [hidden, inner] → like x."""
    return _MLP.apply(x, gate, up, down)  # pyright: ignore[reportReturnType]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (tokens, k), (experts, hidden, inner) = chosen.shape, down.shape
        x, weights, chosen = x.contiguous(), weights.contiguous(), chosen.contiguous()
        sizes = (experts + 1, tokens * k, tokens * k)
        starts, slot_of_row, row_of_slot = (torch.empty(size, dtype=torch.int32) for size in sizes)
        native.call("experts_sort", None, tokens * k, experts, chosen, starts, slot_of_row, row_of_slot)
        kept, y = x.new_empty(tokens * k, 2 * inner), torch.empty_like(x)
        ctx.sizes = (tokens, k, experts, hidden, inner)
        up = gate_up[:, inner:]  # where it begins
        native.call(
            "experts_forward",
            x.dtype,
            *ctx.sizes,
            x,
            weights,
            gate_up,
            up,
            down,
            starts,
            slot_of_row,
            row_of_slot,
            kept,
            y,
        )
        ctx.save_for_backward(x, weights, gate_up, down, starts, slot_of_row, row_of_slot, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weights, gate_up, down, *rest = ctx.saved_tensors
        up = gate_up[:, down.shape[2] :]
        grad_x, grad_weights, *grads = (torch.empty_like(t) for t in (x, weights, gate_up, down))
        native.call(
            "experts_backward",
            x.dtype,
            *ctx.sizes,
            x,
            weights,
            gate_up,
            up,
            down,
            *rest,
            grad.contiguous(),
            grad_x,
            grad_weights,
            *grads,
        )
        return grad_x, None, grad_weights, *grads


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, (hidden, inner) = x.contiguous(), down.shape
        tokens = x.numel() // hidden
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        kept, y = x.new_empty(tokens, 2 * inner), torch.empty_like(x)
        ctx.sizes = (tokens, 1, 1, hidden, inner)
        native.call("experts_forward", x.dtype, *ctx.sizes, x, None, gate, up, down, starts, None, None, kept, y)
        ctx.save_for_backward(x, gate, up, down, starts, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate, up, down, starts, kept = ctx.saved_tensors
        grad_x, grad_down = torch.empty_like(x), torch.empty_like(down)
        both = gate.new_empty(2 * len(gate), gate.shape[1])
        native.call(
            "experts_backward",
            x.dtype,
            *ctx.sizes,
            x,
            None,
            gate,
            up,
            down,
            starts,
            None,
            None,
            kept,
            grad.contiguous(),
            grad_x,
            None,
            both,
            grad_down,
        )
        return grad_x, *both.split(len(gate)), grad_down
