"""Where to cut a chain of layers into pipeline stages so that the slowest stage is as fast as can be.

    costs  |e|a|a|a|a|a|a|h|      limit T: walk from the end, start a new stage when the next piece would exceed T
    stages |e a a a|a a a|h|      the smallest T that needs no more than `pp` stages is the answer (exact)

Stages are filled from the end, so that what is left over thins the first ones: those hold most micro-batches in flight.
"""

from collections.abc import Sequence

TURNS = 60  # halvings of the interval: beyond the precision of a float


def balanced(costs: Sequence[float], pp: int, together: int = 1) -> list[slice]:
    """Contiguous stages (each at least one piece) with the smallest possible maximum.

    The last `together` pieces stay on the last stage. `pp` is at most the number of pieces that can be parted.
    """
    alone = len(costs) - together
    costs = [*costs[:alone], sum(costs[alone:])]
    low, high = max(max(costs), sum(costs) / pp), sum(costs)
    for _ in range(TURNS):
        middle = (low + high) / 2
        if len(_fill(costs, middle)) <= pp:
            high = middle
        else:
            low = middle
        if high - low <= 1e-12 * high:
            break
    starts = _fill(costs, high * (1 + 1e-12))
    while len(starts) < pp:  # fewer would do: cut the longest stages, which never makes the slowest slower
        bounds = [*starts, len(costs)]
        widest = max(range(len(starts)), key=lambda i: bounds[i + 1] - bounds[i])
        starts.insert(widest + 1, (bounds[widest] + bounds[widest + 1]) // 2)
    bounds = [*starts, alone + together]
    return [slice(bounds[i], bounds[i + 1]) for i in range(pp)]


def _fill(costs: Sequence[float], limit: float) -> list[int]:
    """Starts of the stages when each takes, from the end, as much as fits under `limit`."""
    starts, filled = [], 0.0
    for index in range(len(costs) - 1, -1, -1):
        if filled + costs[index] > limit and filled > 0:
            starts.append(index + 1)
            filled = 0.0
        filled += costs[index]
    return [0, *reversed(starts)]
