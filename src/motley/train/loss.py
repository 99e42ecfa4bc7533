"""Cross-entropy over a large vocabulary without ever holding all logits (or their gradient) at once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_head = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        for start in range(0, hidden.shape[0], chunk):
            here, target = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = (here @ weight.t()).float()
            logits -= logits.amax(dim=-1, keepdim=True)
            loss -= logits.gather(1, target).sum()
            total = logits.exp_().sum(dim=-1, keepdim=True)
            loss += total.log().sum()
            if grad_hidden is None or grad_head is None:
                continue
            slope = logits.div_(total).scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            slope = slope.to(hidden.dtype)
            grad_hidden[start : start + chunk] = slope @ weight
            grad_head += slope.t() @ here
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_head)
            ctx.head_dtype = head.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_head * grad).to(ctx.head_dtype), None
