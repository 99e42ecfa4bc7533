"""Slow cables between pools, pretended by waiting: what passes between workers of two pools arrives later.

    message      leaves when the sender's cable is free and takes bytes / bandwidth to leave, then latency to arrive.
                 Its time of arrival travels ahead of it: who asks late waits no longer than on a real cable.
    collective   of workers in m pools takes, on top of the real one,
                     log2(m) x latency  +  max(bytes that leave a pool, bytes that enter it) / bandwidth
                 all-reduce           2 (m-1)/m x bytes leave and enter (a ring of pools, each summed inside first)
                 reduce, broadcast    the bytes once, in one direction
                 tokens of experts    those for other pools leave, those from other pools enter

Every worker has a cable of its own; of two ends the smaller bandwidth and the greater latency count. Workers of one
pool talk as fast as they can. Times of arrival are compared between processes, so all must be on one machine.
"""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass
class DelayedLinks:
    """The cables of all workers, seen from one of them.

    Attributes:
        rank: of this worker.
        pools: of each rank.
        latencies: seconds, of each rank's cable.
        rates: bytes/s of each rank's cable; infinity where nothing is pretended.
    """

    rank: int
    pools: tuple[str, ...]
    latencies: tuple[float, ...]
    rates: tuple[float, ...]
    _free_at: float = 0.0

    def among(self, members: tuple[int, ...]) -> "DelayedLinks":
        """The same cables for some of the workers, numbered from 0 again."""
        return DelayedLinks(
            members.index(self.rank),
            tuple(self.pools[rank] for rank in members),
            tuple(self.latencies[rank] for rank in members),
            tuple(self.rates[rank] for rank in members),
        )

    def crosses(self, other: int) -> bool:
        """Whether messages between this worker and `other` take a cable."""
        return self.pools[self.rank] != self.pools[other]

    def arrival(self, to: int, size: int) -> float:
        """When (monotonic clock, seconds) a message of `size` bytes arrives that is ready to leave now."""
        ends = (self.rank, to)
        self._free_at = max(self._free_at, time.monotonic()) + size / min(self.rates[end] for end in ends)
        return self._free_at + max(self.latencies[end] for end in ends)

    def collectives(self, messages: Sequence[tuple[Sequence[int], int | None, int]]) -> None:
        """Wait as long as collectives take that run at once: (workers, the one that sends or receives, bytes) of each.

        None for that one: all send and receive (all-reduce).
        """
        loads = {True: 0.0, False: 0.0}  # one direction and the other
        for ranks, root, size in messages:
            pools = len({self.pools[rank] for rank in ranks})
            if pools > 1 and root is None:
                loads = {way: load + 2 * (pools - 1) / pools * size for way, load in loads.items()}
            elif pools > 1 and root is not None:
                loads[self.crosses(root)] += size
        self.exchange({rank for ranks, _, _ in messages for rank in ranks}, loads[True], loads[False])

    def exchange(self, ranks: Collection[int], leaving: float, entering: float) -> None:
        """Wait as long as workers take whose pool sends and receives so many bytes."""
        pools = len({self.pools[rank] for rank in ranks})
        if pools > 1:
            seconds = max(leaving, entering) / min(self.rates[rank] for rank in ranks)
            time.sleep(seconds + math.ceil(math.log2(pools)) * max(self.latencies[rank] for rank in ranks))
