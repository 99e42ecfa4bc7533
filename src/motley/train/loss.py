"""Cross-entropy over a large vocabulary without ever holding all logits (or their gradient) at once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from motley.data.stream import NO_LOSS
from motley.model import native
from motley.model.bounds import check_tokens
from motley.model.products import product, wide
from motley.train.ngram_targets import ORDERS, Expected

GROUP_LOGITS = 4 << 20  # logits held at once
CHUNK = 256  # positions; their logits stay in the cache of a core at the vocabularies of small models


def summed_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, slope: float = 1.0) -> Tensor:
    """Sum over positions of -log softmax(hidden head^T)[target], in nats, fp32.

    Args:
        hidden: [positions, hidden_size] in the compute dtype.
        head: [vocab, hidden_size], the output projection in its own dtype.
        targets: int64 [positions]; positions with -100 do not count. InputError for anything else outside of the
            vocabulary.
        slope: about what the gradient that comes back will be, a power of two: derivatives by the logits are rounded
            to the compute dtype in that size, which in fp16 decides whether small ones survive.

    Forward computes the gradient as well, chunk by chunk, so that logits are computed once and never stored. The
    same memory serves the logits of every chunk: on a CPU, fresh pages for them take as long as the product that fills
    them.
    """
    return _cross_entropy(hidden, head, targets, None, 0.0, slope)[0]


def blended_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, expected: Expected, weight: float, slope: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(what is learned, what is seen): the sums over positions of

        -(1 - weight) log p[target]  -  weight * sum over c of expected(c) log p[c]         -log p[target]

    with p = softmax(hidden head^T). The second has no gradient. The rest is as in `summed_cross_entropy`.

    expected: of the same positions, over the vocabulary of `head`.
    """
    assert len(expected.floor) == len(targets), "a distribution for each position"
    assert len(expected.ngrams.vocabulary) == len(head), "over the same vocabulary"
    return _cross_entropy(hidden, head, targets, expected, weight, slope)


def _cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, expected: Expected | None, weight: float, slope: float
) -> tuple[Tensor, Tensor]:
    counted = (targets != NO_LOSS).nonzero().squeeze(1)
    if counted.numel() < targets.numel():
        hidden, targets = hidden.index_select(0, counted), targets.index_select(0, counted)
        expected = None if expected is None else expected[counted]
    check_tokens(targets, len(head), "target", counted)  # neither a kernel nor a GPU looks where it reads
    here = native.fits(hidden, *head.shape) and head.dtype == torch.float32
    function = _NativeCrossEntropy if here else _SummedCrossEntropy
    return function.apply(hidden, head, targets, expected, weight, slope)  # pyright: ignore[reportReturnType]


def _into_slopes(
    logits: Tensor, target: Tensor, expected: Expected | None, weight: float, room: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    """(what is learned, what is seen), summed, of logits [positions, vocab] at target [positions, 1]; the logits become
    `slope` times the derivative of the first by them.

    `room` is fp32 and of the same shape.
    """
    room.copy_(logits)
    largest, at_target = room.amax(dim=-1, keepdim=True), room.gather(1, target)
    hints = None if expected is None else expected.dense().mul_(weight)
    hinted = 0.0 if hints is None else torch.bmm(hints[:, None], room[:, :, None])[:, 0]
    total = room.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    to_all = total.log() + largest
    room.div_(total / slope).scatter_add_(1, target, room.new_full(target.shape, -slope * (1 - weight)))
    logits.copy_(room if hints is None else room.sub_(hints.mul_(slope)))
    return (to_all - (1 - weight) * at_target - hinted).sum(), (to_all - at_target).sum()


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, hidden: Tensor, head: Tensor, targets: Tensor, expected: Expected | None, weight: float, slope: float
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        matrix = head.to(hidden.dtype)
        chunk = CHUNK if hidden.device.type == "cpu" else 4096 if expected is None else 512
        # Logits of a group are computed at once and turned into slopes in place, chunk by chunk: few large products,
        # and what is done value by value stays in the cache.
        group = chunk * max(1, GROUP_LOGITS // (chunk * matrix.shape[0]))
        learned, seen = torch.zeros(2, dtype=torch.float32, device=hidden.device).unbind()
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_head = torch.zeros_like(matrix, dtype=torch.float32) if wanted else None
        room = hidden.new_empty(min(group, len(hidden)), matrix.shape[0])
        wide_room = torch.empty(min(chunk, len(hidden)), matrix.shape[0], dtype=torch.float32, device=hidden.device)
        for first in range(0, hidden.shape[0], group):
            members = hidden[first : first + group]
            logits = _into(room[: len(members)], members, matrix.t())
            for start in range(0, len(members), chunk):
                here = logits[start : start + chunk]
                which = slice(first + start, first + start + len(here))
                hints = None if expected is None else expected[which]
                losses = _into_slopes(here, targets[which, None], hints, weight, wide_room[: len(here)], slope)
                learned, seen = learned + losses[0], seen + losses[1]
            if grad_hidden is not None and grad_head is not None:
                _into(grad_hidden[first : first + group], logits, matrix)
                grad_head += product(logits.t(), members)
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_head)
            ctx.head_dtype, ctx.slope = head.dtype, slope
        ctx.mark_non_differentiable(seen)
        return learned, seen

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_head = ctx.saved_tensors
        grad = grad / ctx.slope
        grad_hidden = (grad_hidden.float() * grad).to(grad_hidden.dtype)
        return grad_hidden, (grad_head * grad).to(ctx.head_dtype), None, None, None, None


class _NativeCrossEntropy(_SummedCrossEntropy):
    """The same in one kernel (`motley/model/native/loss.cpp`), logits in fp32."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, hidden: Tensor, head: Tensor, targets: Tensor, expected: Expected | None, weight: float, slope: float
    ) -> tuple[Tensor, Tensor]:
        hidden, head, targets = hidden.contiguous(), head.contiguous(), targets.contiguous()
        (positions, size), vocab = hidden.shape, len(head)
        learned, seen = torch.empty(2, positions, dtype=torch.float32).unbind()
        wanted = any(ctx.needs_input_grad)
        grads = (torch.empty_like(hidden), torch.zeros_like(head)) if wanted else (None, None)
        group = 32 * max(1, GROUP_LOGITS // (32 * vocab))
        hints: list[Tensor | None] = [None] * 7
        if expected is not None:
            table, parts = expected.ngrams, (expected.floor, expected.begins, expected.ends, expected.factors)
            hints = [table.vocabulary, table.tokens, table.shares, *(part.contiguous() for part in parts)]
        native.call(
            "loss_forward", hidden.dtype, positions, size, vocab, group, hidden, head, targets, ORDERS, float(weight),
            *hints, slope, learned, seen, *grads,
        )  # fmt: skip
        if wanted:
            ctx.save_for_backward(*grads)
            ctx.head_dtype, ctx.slope = head.dtype, slope
        total = seen.sum()
        ctx.mark_non_differentiable(total)
        return learned.sum(), total


def _into(room: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ right, written to `room`."""
    if wide(left) is left:
        return torch.mm(left, right, out=room)
    return room.copy_(product(left, right))
