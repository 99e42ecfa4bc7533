"""Cut thousands of pipelines into stages at once, within each chip's memory.

    pieces   |e|a|a|a|a|a|a|a|h|        for a limit T: from the end, each stage takes pieces until the next one would
    stages   |pool 0   |pool 1 |        exceed T seconds or the memory of its chip; then the stage before it goes on
    search   halve the interval of T down to the smallest one for which every piece finds a stage

For a fixed order of stages this is exact. Stages may be on different chips, so a piece's seconds and bytes depend on
the stage; the first stages, which hold most micro-batches in flight, get what remains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from motley.plan.cost_model.configs import Floats, Ints

TURNS = 24
CLOSE = 1e-9
NEAR = 1e-5  # relative width of T's interval at which halving ends


@dataclass(frozen=True)
class PieceCosts:
    """Seconds and bytes of each kind of piece on one pool's chips: arrays [kinds, candidates].

    Attributes:
        seconds: per micro-batch.
        held: bytes of weights, gradients, optimizer states that the chip must have room for.
        apart: bytes of those that other chips may hold instead.
        saved: bytes of activations per micro-batch in flight.
        constant: [candidates] bytes that every chip needs besides.
        capacity: bytes of a chip.
    """

    seconds: Floats
    held: Floats
    apart: Floats
    saved: Floats
    constant: Floats
    capacity: float

    def take(self, index: Ints) -> "PieceCosts":
        """Some candidates only."""
        return PieceCosts(
            self.seconds[:, index],
            self.held[:, index],
            self.apart[:, index],
            self.saved[:, index],
            self.constant[index],
            self.capacity,
        )


@dataclass(frozen=True)
class StageCuts:
    """Attributes: stage_of [pieces, candidates]; slowest [candidates] seconds; feasible [candidates]."""

    stage_of: Ints
    slowest: Floats
    feasible: NDArray[np.bool_]


def cut_stages(
    pools: Sequence[PieceCosts], kinds: Sequence[int], pool_of: Ints, stages: Ints, flights: Floats, together: int = 1
) -> StageCuts:
    """Cut every candidate's pipeline.

    Args:
        pools: the costs on each pool.
        kinds: kind of each piece, in order.
        pool_of: [most stages, candidates] index of each stage's pool.
        stages: [candidates] number of stages.
        flights: [most stages, candidates] micro-batches in flight.
        together: how many of the last pieces stay on one stage.
    """
    count = len(stages)
    unlimited = np.full(count, np.inf)
    feasible = _fill(pools, kinds, pool_of, stages, flights, unlimited, together)[1]
    stage_of = np.zeros((len(kinds), count), np.int64)
    slowest = np.full(count, np.inf)
    index = np.flatnonzero(feasible)
    if len(index):
        own = [pool.take(index) for pool in pools]
        placed, slowest[index] = _fastest(own, kinds, pool_of[:, index], stages[index], flights[:, index], together)
        stage_of[:, index] = placed
        used = np.zeros((int(stages.max()), count), bool)
        for piece in range(len(kinds)):
            used[stage_of[piece], np.arange(count)] = True
        feasible &= used.sum(axis=0) == stages  # a stage without a piece is a smaller pipeline, costed elsewhere
    return StageCuts(stage_of, slowest, feasible)


def _fastest(
    pools: Sequence[PieceCosts], kinds: Sequence[int], pool_of: Ints, stages: Ints, flights: Floats, together: int
) -> tuple[Ints, Floats]:
    """(stages of the pieces, slowest stage) at the smallest limit under which every piece finds a stage."""
    per_piece = np.stack([pool.seconds for pool in pools])[:, list(kinds)]
    heaviest = per_piece.min(axis=0).max(axis=0)  # piece, where it is fastest
    low = np.maximum(heaviest, per_piece.min(axis=0).sum(axis=0) / stages)
    most = per_piece.max(axis=0).sum(axis=0) * (1 + CLOSE)
    # Where memory does not interfere, no more than one heaviest piece above the mean is needed.
    likely = np.minimum(low + heaviest, most)
    high = np.where(_fill(pools, kinds, pool_of, stages, flights, likely, together)[1], likely, most)
    for _ in range(TURNS):
        if not (high - low > NEAR * high).any():
            break
        middle = (low + high) / 2
        placed = _fill(pools, kinds, pool_of, stages, flights, middle, together)[1]
        high, low = np.where(placed, middle, high), np.where(placed, low, middle)
    return _fill(pools, kinds, pool_of, stages, flights, high, together)[0], high


def _fill(
    pools: Sequence[PieceCosts],
    kinds: Sequence[int],
    pool_of: Ints,
    stages: Ints,
    flights: Floats,
    limit: Floats,
    together: int,
) -> tuple[Ints, NDArray[np.bool_]]:
    """(stage of each piece, whether all found one) when no stage may exceed `limit` seconds.

    `cost` and `size` hold what each kind of piece takes in the stage that is being filled; they change only for the
    candidates that go on to their next stage.
    """
    count = len(stages)
    stage = stages - 1
    ok = np.ones(count, bool)
    cost = np.empty((len(pools[0].seconds), count))
    size, constant, capacity = np.empty_like(cost), np.empty(count), np.empty(count)

    def enter(index: Ints) -> None:
        """Look up the stage that these candidates fill now."""
        at = np.maximum(stage[index], 0)
        here, flight = pool_of[at, index], flights[at, index]
        for number, pool in enumerate(pools):
            chosen = index if len(pools) == 1 else index[here == number]
            flying = flight if len(pools) == 1 else flight[here == number]
            cost[:, chosen] = pool.seconds[:, chosen]
            size[:, chosen] = pool.held[:, chosen] + pool.saved[:, chosen] * flying
            constant[chosen], capacity[chosen] = pool.constant[chosen], pool.capacity

    enter(np.arange(count))
    spent, filled = np.zeros(count), constant.copy()
    stage_of = np.empty((len(kinds), count), np.int64)
    for piece in range(len(kinds) - 1, -1, -1):
        kind = kinds[piece]
        spent_after, filled_after = spent + cost[kind], filled + size[kind]
        full = ((spent_after > limit) | (filled_after > capacity)) & (spent > 0)
        moved = np.flatnonzero(full & (piece < len(kinds) - together))
        if len(moved):
            stage[moved] -= 1
            enter(moved)
            spent_after[moved] = cost[kind, moved]
            filled_after[moved] = constant[moved] + size[kind, moved]
        spent, filled = spent_after, filled_after
        ok &= (filled <= capacity) & (spent <= limit)
        stage_of[piece] = stage
    ok &= stage >= 0
    return np.maximum(stage_of, 0, out=stage_of), ok
