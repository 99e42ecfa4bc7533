"""Slow links between pools, emulated by waiting: messages between ranks of two pools arrive later.

    message      is sent when the sender's link is free: bytes / bandwidth to leave, then latency to arrive. Its time of
                 arrival is sent ahead of it, so that a late receiver waits no longer than on a real link.
    collective   of ranks in m pools takes, in addition to its real time,
                     log2(m) x latency  +  max(bytes that leave a pool, bytes that enter it) / bandwidth
                 all-reduce           2 (m-1)/m x bytes leave and enter (a ring of pools after a reduction in each)
                 reduce, broadcast    the bytes once, in one direction
                 all-to-all           tokens for other pools leave, tokens from other pools enter

Each rank has a link of its own; between two ranks the smaller bandwidth and the greater latency count. Ranks of one
pool communicate at full speed. Processes compare times of arrival, so all of them must run on one machine.
"""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass
class DelayedLinks:
    """The links of all ranks, as one of them sees them: a `parallel.communicator.LinkModel`.

    Attributes:
        rank: this one.
        pools: of each rank.
        latencies: seconds, of each rank's link.
        rates: bytes/s of each rank's link; infinity without an emulated bandwidth.
    """

    rank: int
    pools: tuple[str, ...]
    latencies: tuple[float, ...]
    rates: tuple[float, ...]
    _free_at: float = 0.0

    def among(self, members: tuple[int, ...]) -> "DelayedLinks":
        """The same links for some of the ranks, numbered from 0 again."""
        return DelayedLinks(
            members.index(self.rank),
            tuple(self.pools[rank] for rank in members),
            tuple(self.latencies[rank] for rank in members),
            tuple(self.rates[rank] for rank in members),
        )

    def crosses(self, other: int) -> bool:
        """Whether messages between this rank and `other` are delayed."""
        return self.pools[self.rank] != self.pools[other]

    def arrival(self, to: int, size: int) -> float:
        """When (monotonic clock, seconds) a message of `size` bytes that is sent now arrives."""
        ends = (self.rank, to)
        self._free_at = max(self._free_at, time.monotonic()) + size / min(self.rates[end] for end in ends)
        return self._free_at + max(self.latencies[end] for end in ends)

    def collectives(self, messages: Sequence[tuple[Sequence[int], int | None, int]]) -> None:
        """Sleep as long as collectives take that run at once.

        messages: (ranks, root, bytes) of each; root None: all ranks send and receive (all-reduce).
        """
        loads = {True: 0.0, False: 0.0}  # bytes in the two directions
        for ranks, root, size in messages:
            pools = len({self.pools[rank] for rank in ranks})
            if pools > 1 and root is None:
                loads = {key: load + 2 * (pools - 1) / pools * size for key, load in loads.items()}
            elif pools > 1 and root is not None:
                loads[self.crosses(root)] += size
        self.exchange({rank for ranks, _, _ in messages for rank in ranks}, loads[True], loads[False])

    def exchange(self, ranks: Collection[int], leaving: float, entering: float) -> None:
        """Sleep as long as an all-to-all among `ranks` takes in which this pool sends and receives so many bytes."""
        pools = len({self.pools[rank] for rank in ranks})
        if pools > 1:
            seconds = max(leaving, entering) / min(self.rates[rank] for rank in ranks)
            time.sleep(seconds + math.ceil(math.log2(pools)) * max(self.latencies[rank] for rank in ranks))
