"""Collectives over the holders of parameter shards: in buckets of bounded size, a few in flight, in one order for all.

    a tensor      ├─ 32 MB ─┼─ 32 MB ─┼─ 32 MB ─┼─ rest ─┤
    under way      █████████ █████████ █████████           the fourth waits until the first has arrived

All ranks start the collectives that they share in the same order, so none of them waits for one that is never started.
Numbers travel from where they lie, without a second copy. Only where CPUs and GPUs are in one process group does each
bucket go through the host's memory.
"""

from collections import deque
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from motley.parallel.communicator import Communicator

MESSAGE_BYTES = 32 << 20
AT_ONCE = 3  # messages of one rank under way


class Buckets:
    """The collectives that this rank has in flight. Their memory must not be touched until they are done."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._under_way: deque[tuple[str, tuple[int, ...], dist.Work | None, Tensor, Tensor]] = deque()
        self._travelled: list[tuple[tuple[int, ...], int | None, int]] = []  # ranks, owner, bytes
        self._doing = ""  # the newest message

    def sum(self, flat: Tensor, holders: tuple[int, ...], owner: int | None) -> None:
        """Reduce to `owner` (the others' memory is undefined afterwards); with None, all-reduce."""
        group = self._comm.group(holders)
        self._travelled.append((holders, owner, flat.nbytes))
        if owner is None:
            self._comm.timer.summed(flat.nbytes, len(holders))
            self._start(
                "reducing gradients", flat, holders, lambda piece: dist.all_reduce(piece, group=group, async_op=True)
            )
        else:
            self._comm.timer.passed(flat.nbytes, gives=owner != self._comm.rank)
            to = self._comm.among_all(owner)
            self._start(
                "reducing gradients", flat, holders, lambda piece: dist.reduce(piece, to, group=group, async_op=True)
            )

    def spread(self, flat: Tensor, holders: tuple[int, ...], owner: int) -> None:
        """Broadcast from the owner to all holders."""
        group, source = self._comm.group(holders), self._comm.among_all(owner)
        self._travelled.append((holders, owner, flat.nbytes))
        self._comm.timer.passed(flat.nbytes, gives=owner == self._comm.rank)
        self._start(
            "broadcasting weights",
            flat,
            holders,
            lambda piece: dist.broadcast(piece, source, group=group, async_op=True),
        )

    def settle(self, flat: Tensor) -> None:
        """Wait until nothing from or to this memory is under way."""
        first, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
        while any(first <= piece.data_ptr() < end for *_, piece in self._under_way):
            self._arrive(len(self._under_way) - 1)

    def finish(self) -> None:
        """Wait until everything has arrived, over emulated links too."""
        self._arrive(0)
        if self._travelled:
            self._comm.crossed(self._doing, self._travelled)
        self._travelled.clear()

    def _start(
        self, doing: str, flat: Tensor, holders: tuple[int, ...], message: Callable[[Tensor], dist.Work | None]
    ) -> None:
        self._doing = doing
        for piece in flat.split(MESSAGE_BYTES // flat.element_size()):
            self._arrive(AT_ONCE - 1)
            posted = self._comm.posted(piece)
            work = self._comm.talk(doing, lambda: message(posted), holders)  # noqa: B023  (called at once)
            self._under_way.append((doing, holders, work, posted, piece))

    def _arrive(self, left: int) -> None:
        while len(self._under_way) > left:
            doing, holders, work, posted, piece = self._under_way.popleft()
            if work is not None:
                self._comm.talk(doing, work.wait, holders)
            if posted is not piece:
                piece.copy_(posted)
