"""Cross-entropy over a large vocabulary without ever holding all logits (or their gradient) at once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

GROUP_LOGITS = 4 << 20  # logits held at once
CHUNK = 256  # positions; their logits stay in the cache of a core at the vocabularies of small models


def summed_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of -log softmax(hidden head^T)[target], in nats, fp32.

    Args:
        hidden: [positions, hidden_size] in the compute dtype.
        head: [vocab, hidden_size], the output projection in its own dtype.
        targets: int64 [positions]; positions with -100 do not count.

    Forward computes the gradient as well, chunk by chunk, so that logits are computed once and never stored. The
    same memory serves every chunk: on a CPU, fresh pages for the logits take as long as the product that fills them.
    """
    counted = (targets >= 0).nonzero().squeeze(1)
    if counted.numel() < targets.numel():
        hidden, targets = hidden.index_select(0, counted), targets.index_select(0, counted)
    return _SummedCrossEntropy.apply(hidden, head, targets)  # pyright: ignore[reportReturnType]


def _into_slopes(logits: Tensor, target: Tensor, wide: Tensor) -> Tensor:
    """Summed loss of logits [positions, vocab] at target [positions, 1]; the logits become its derivative by them.

    `wide` is fp32 room of the same shape.
    """
    wide.copy_(logits)
    largest, at_target = wide.amax(dim=-1, keepdim=True), wide.gather(1, target)
    total = wide.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    loss = (total.log() + largest - at_target).sum()
    logits.copy_(wide.div_(total).scatter_add_(1, target, wide.new_full(target.shape, -1)))
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
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
        wide = torch.empty(min(chunk, len(hidden)), weight.shape[0], dtype=torch.float32, device=hidden.device)
        for first in range(0, hidden.shape[0], group):
            members = hidden[first : first + group]
            logits = torch.mm(members, weight.t(), out=room[: len(members)])
            for start in range(0, len(members), chunk):
                here = logits[start : start + chunk]
                target = targets[first + start :, None][: len(here)]
                loss += _into_slopes(here, target, wide[: len(here)])
            if grad_hidden is not None and grad_head is not None:
                torch.mm(logits, weight, out=grad_hidden[first : first + group])
                grad_head += logits.t() @ members
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_head)
            ctx.head_dtype = head.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_head * grad).to(ctx.head_dtype), None
