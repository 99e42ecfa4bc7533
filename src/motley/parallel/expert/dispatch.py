"""Expert parallelism: each rank holds some experts, an all-to-all brings tokens to them and back.

    rank 0     tokens a b   experts 0 1 2     dispatch: each slot (a token for one expert) goes to the expert's rank
    rank 1     tokens c d   experts 3         combine:  its output comes back, is weighed and summed at home

The ranks of a group compute their micro-batches in step; how many experts each holds may differ.
"""

from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from motley.model.experts import Experts
from motley.parallel.communicator import Communicator


class ExpertParallel(Experts):
    """The experts of one rank out of a group, as a drop-in for `Experts`.

    Args:
        held: experts on this rank.
        spread: experts on each rank of the group, in order.
    """

    def __init__(self, held: int, spread: tuple[int, ...], hidden_size: int, intermediate_size: int) -> None:
        super().__init__(held, hidden_size, intermediate_size)
        self.ends = list(accumulate(spread))
        self.comm: Communicator | None = None
        self.ranks: tuple[int, ...] = ()

    def connect(self, comm: Communicator, ranks: tuple[int, ...]) -> None:
        """Say who the group is; `ranks` in the order of the experts they hold."""
        self.comm, self.ranks = comm, ranks

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden], chosen [tokens, k], weights fp32 [tokens, k] → [tokens, hidden]."""
        assert self.comm is not None
        k, slots = chosen.shape[1], chosen.flatten()
        ends = torch.tensor(self.ends, device=slots.device)
        target = torch.bucketize(slots, ends, right=True)  # index in the group of the rank that holds a slot's expert
        order = target.argsort(stable=True)
        leaving = torch.bincount(target, minlength=len(self.ranks))
        arriving = self._exchange_counts(leaving)
        out_splits, in_splits = leaving.tolist(), arriving.tolist()
        rows = _Travel.apply(x[order // k], out_splits, in_splits, self.comm, self.ranks)
        first = self.ends[index - 1] if (index := self.ranks.index(self.comm.rank)) else 0
        expert = self._plain(slots[order], out_splits, in_splits) - first
        ones = torch.ones(len(expert), 1, device=x.device)
        done = super().forward(rows, expert[:, None], ones) if len(expert) else rows
        back = _Travel.apply(done, in_splits, out_splits, self.comm, self.ranks)
        weighed = back * weights.flatten()[order, None].to(back.dtype)
        return torch.zeros_like(x).index_add(0, order // k, weighed.to(x.dtype))

    def _exchange_counts(self, leaving: Tensor) -> Tensor:
        return self._plain(leaving, [1] * len(self.ranks), [1] * len(self.ranks))

    def _plain(self, values: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        assert self.comm is not None
        return all_to_all(values, leaving, arriving, self.comm, self.ranks)


def all_to_all(
    values: Tensor, leaving: list[int], arriving: list[int], comm: Communicator, ranks: tuple[int, ...]
) -> Tensor:
    """Rows of `values` in runs of `leaving` to the ranks `ranks`; what they sent, in runs of `arriving`.

    Groups order their members by rank; runs here follow `ranks`.
    """
    by_rank = sorted(range(len(ranks)), key=lambda index: ranks[index])
    if by_rank != list(range(len(ranks))):
        raise ValueError(f"the ranks of an expert group must stand in the order of their ranks, not {ranks}")
    posted = comm.posted(values.contiguous())
    received = posted.new_empty(sum(arriving), *values.shape[1:])
    comm.talk(
        "exchanging tokens of experts",
        lambda: dist.all_to_all_single(received, posted, arriving, leaving, group=comm.group(ranks)),
        ranks,
    )
    row, own = values.element_size() * values.shape[1:].numel(), ranks.index(comm.rank)
    comm.timer.moved(row * (sum(leaving) - leaving[own]), row * (sum(arriving) - arriving[own]))
    if (links := comm.links) is not None:
        sent, got = (
            row * sum(count for count, rank in zip(counts, ranks, strict=True) if links.crosses(rank))
            for counts in (leaving, arriving)
        )
        comm.talk("exchanging tokens of experts", lambda: links.exchange(ranks, sent, got), ranks)
    return received.to(values.device)


class _Travel(torch.autograd.Function):
    """`all_to_all`, whose gradient travels back."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, leaving: list[int], arriving: list[int], comm: Communicator, ranks: tuple[int, ...]
    ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.back = (arriving, leaving, comm, ranks)
        return all_to_all(rows, leaving, arriving, comm, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_to_all(grad, *ctx.back), None, None, None, None
