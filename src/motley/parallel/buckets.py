"""Messages between all holders of something: of bounded size, a few under way at once, in one order for all.

    a tensor      ├─ 32 MB ─┼─ 32 MB ─┼─ 32 MB ─┼─ rest ─┤
    under way      █████████ █████████ █████████           the fourth waits until the first has arrived

Every worker starts the messages that it takes part in in the same order, so whatever is waited for is on its way.
Numbers travel from where they lie: there is no second copy, but in crews of several kinds of device, where each piece
goes through the host's memory.
"""

from collections import deque
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from motley.parallel.communicator import Communicator

MESSAGE_BYTES = 32 << 20
AT_ONCE = 3  # messages of one worker under way


class Buckets:
    """The messages that this worker has under way. Nobody may touch what travels until it has arrived."""

    def __init__(self, comm: Communicator) -> None:
        self._crew = comm
        self._under_way: deque[tuple[str, tuple[int, ...], dist.Work | None, Tensor, Tensor]] = deque()
        self._travelled: list[tuple[tuple[int, ...], int | None, int]] = []  # workers, owner, bytes
        self._doing = ""  # the newest message

    def sum(self, flat: Tensor, holders: tuple[int, ...], owner: int | None) -> None:
        """Add up what all holders have; then `owner` has the sum (the others, anything), or with None all have."""
        group = self._crew.group(holders)
        self._travelled.append((holders, owner, flat.nbytes))
        if owner is None:
            self._crew.timer.summed(flat.nbytes, len(holders))
            self._start(
                "summing gradients", flat, holders, lambda piece: dist.all_reduce(piece, group=group, async_op=True)
            )
        else:
            self._crew.timer.passed(flat.nbytes, gives=owner != self._crew.rank)
            to = self._crew.among_all(owner)
            self._start(
                "summing gradients", flat, holders, lambda piece: dist.reduce(piece, to, group=group, async_op=True)
            )

    def spread(self, flat: Tensor, holders: tuple[int, ...], owner: int) -> None:
        """Give all holders what the owner has."""
        group, source = self._crew.group(holders), self._crew.among_all(owner)
        self._travelled.append((holders, owner, flat.nbytes))
        self._crew.timer.passed(flat.nbytes, gives=owner == self._crew.rank)
        self._start(
            "spreading weights", flat, holders, lambda piece: dist.broadcast(piece, source, group=group, async_op=True)
        )

    def settle(self, flat: Tensor) -> None:
        """Wait until nothing from or to this memory is under way."""
        first, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
        while any(first <= piece.data_ptr() < end for *_, piece in self._under_way):
            self._arrive(len(self._under_way) - 1)

    def finish(self) -> None:
        """Wait until everything has arrived, over pretended cables too."""
        self._arrive(0)
        if self._travelled:
            self._crew.crossed(self._doing, self._travelled)
        self._travelled.clear()

    def _start(
        self, doing: str, flat: Tensor, holders: tuple[int, ...], message: Callable[[Tensor], dist.Work | None]
    ) -> None:
        self._doing = doing
        for piece in flat.split(MESSAGE_BYTES // flat.element_size()):
            self._arrive(AT_ONCE - 1)
            posted = self._crew.posted(piece)
            work = self._crew.talk(doing, lambda: message(posted), holders)  # noqa: B023  (called at once)
            self._under_way.append((doing, holders, work, posted, piece))

    def _arrive(self, left: int) -> None:
        while len(self._under_way) > left:
            doing, holders, work, posted, piece = self._under_way.popleft()
            if work is not None:
                self._crew.talk(doing, work.wait, holders)
            if posted is not piece:
                piece.copy_(posted)
