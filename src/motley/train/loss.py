"""Cross-entropy over a large vocabulary without ever holding all logits (or their gradient) at once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEPT_SLOPES = 16 << 20  # values
CHUNK = 256  # positions; their logits stay in the cache of a core at the vocabularies of small models


def summed_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of -log softmax(hidden head^T)[target], in nats, fp32.

    Args:
        hidden: [positions, hidden_size] in the compute dtype.
        head: [vocab, hidden_size], the output projection in its own dtype.
        targets: int64 [positions]; positions with -100 do not count.

    Forward computes the gradient as well, chunk by chunk, so that logits are computed once and never stored.
    """
    counted = (targets >= 0).nonzero().squeeze(1)
    if counted.numel() < targets.numel():
        hidden, targets = hidden.index_select(0, counted), targets.index_select(0, counted)
    return _SummedCrossEntropy.apply(hidden, head, targets)  # pyright: ignore[reportReturnType]


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = any(ctx.needs_input_grad)
        weight = head.to(hidden.dtype)
        chunk = CHUNK if hidden.device.type == "cpu" else 4096
        # The slopes of some chunks are kept, so that their products with the gradient are few and large.
        group = chunk * max(1, KEPT_SLOPES // (chunk * weight.shape[0]))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_head = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        for first in range(0, hidden.shape[0], group):
            members = hidden[first : first + group]
            slopes = hidden.new_empty(len(members), weight.shape[0]) if wanted else None
            for start in range(0, len(members), chunk):
                target = targets[first + start : first + start + chunk, None][: len(members) - start]
                log_p = torch.log_softmax(members[start : start + chunk] @ weight.t(), dim=-1, dtype=torch.float32)
                loss -= log_p.gather(1, target).sum()
                if slopes is not None:
                    slope = log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
                    slopes[start : start + chunk] = slope
            if grad_hidden is not None and grad_head is not None and slopes is not None:
                torch.mm(slopes, weight, out=grad_hidden[first : first + group])
                grad_head += slopes.t() @ members
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_head)
            ctx.head_dtype = head.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_head * grad).to(ctx.head_dtype), None
