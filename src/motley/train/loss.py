"""Cross-entropy over a large vocabulary without ever holding all logits (or their gradient) at once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from motley.model import native
from motley.model.products import product, wide

GROUP_LOGITS = 4 << 20  # logits held at once
CHUNK = 256  # positions; their logits stay in the cache of a core at the vocabularies of small models


def summed_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, slope: float = 1.0) -> Tensor:
    """Sum over positions of -log softmax(hidden head^T)[target], in nats, fp32.

    Args:
        hidden: [positions, hidden_size] in the compute dtype.
        head: [vocab, hidden_size], the output projection in its own dtype.
        targets: int64 [positions]; positions with -100 do not count.
        slope: about what the gradient that comes back will be, a power of two: derivatives by the logits are rounded
            to the compute dtype in that size, which in fp16 decides whether small ones survive.

    Forward computes the gradient as well, chunk by chunk, so that logits are computed once and never stored. The
    same memory serves every chunk: on a CPU, fresh pages for the logits take as long as the product that fills them.
    """
    counted = (targets >= 0).nonzero().squeeze(1)
    if counted.numel() < targets.numel():
        hidden, targets = hidden.index_select(0, counted), targets.index_select(0, counted)
    here = native.fits(hidden, *head.shape) and head.dtype == torch.float32
    function = _NativeCrossEntropy if here else _SummedCrossEntropy
    return function.apply(hidden, head, targets, slope)  # pyright: ignore[reportReturnType]


def _into_slopes(logits: Tensor, target: Tensor, room: Tensor, slope: float) -> Tensor:
    """Summed loss of logits [positions, vocab] at target [positions, 1]; the logits become `slope` times its derivative
    by them.

    `room` is fp32 and of the same shape.
    """
    room.copy_(logits)
    largest, at_target = room.amax(dim=-1, keepdim=True), room.gather(1, target)
    total = room.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    loss = (total.log() + largest - at_target).sum()
    logits.copy_(room.div_(total / slope).scatter_add_(1, target, room.new_full(target.shape, -slope)))
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, slope: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = any(ctx.needs_input_grad)
        weight = head.to(hidden.dtype)
        chunk = CHUNK if hidden.device.type == "cpu" else 4096
        # Logits of a group are computed at once and turned into slopes in place, chunk by chunk: few large products,
        # and what is done value by value stays in the cache.
        group = chunk * max(1, GROUP_LOGITS // (chunk * weight.shape[0]))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_head = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        room = hidden.new_empty(min(group, len(hidden)), weight.shape[0])
        wide_room = torch.empty(min(chunk, len(hidden)), weight.shape[0], dtype=torch.float32, device=hidden.device)
        for first in range(0, hidden.shape[0], group):
            members = hidden[first : first + group]
            logits = _into(room[: len(members)], members, weight.t())
            for start in range(0, len(members), chunk):
                here = logits[start : start + chunk]
                target = targets[first + start :, None][: len(here)]
                loss += _into_slopes(here, target, wide_room[: len(here)], slope)
            if grad_hidden is not None and grad_head is not None:
                _into(grad_hidden[first : first + group], logits, weight)
                grad_head += product(logits.t(), members)
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_head)
            ctx.head_dtype, ctx.slope = head.dtype, slope
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_head = ctx.saved_tensors
        grad = grad / ctx.slope
        grad_hidden = (grad_hidden.float() * grad).to(grad_hidden.dtype)
        return grad_hidden, (grad_head * grad).to(ctx.head_dtype), None, None


class _NativeCrossEntropy(_SummedCrossEntropy):
    """The same in one kernel (`motley/model/native/loss.cpp`), logits in fp32."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, slope: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, head, targets = hidden.contiguous(), head.contiguous(), targets.contiguous()
        (positions, size), vocab = hidden.shape, len(head)
        losses = torch.empty(positions)
        wanted = any(ctx.needs_input_grad)
        grads = (torch.empty_like(hidden), torch.zeros_like(head)) if wanted else (None, None)
        group = 32 * max(1, GROUP_LOGITS // (32 * vocab))
        native.call("loss_forward", positions, size, vocab, group, hidden, head, targets, slope, losses, *grads)
        if wanted:
            ctx.save_for_backward(*grads)
            ctx.head_dtype, ctx.slope = head.dtype, slope
        return losses.sum()


def _into(room: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ right, written to `room`."""
    if wide(left) is left:
        return torch.mm(left, right, out=room)
    return room.copy_(product(left, right))
