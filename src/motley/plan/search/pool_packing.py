"""Into which teams a fleet falls: most sequences over all ways to split the pools; shares of the batch and of state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motley.plan.search.step_lines import Options


@dataclass(frozen=True)
class Pick:
    """One option of a team, what it takes within the time asked for, and the bytes it leaves free."""

    team: frozenset[str]
    options: Options
    index: int
    sequences: int
    spare: float


@dataclass(frozen=True)
class Point:
    sequences: int
    spare: float
    picks: tuple[Pick, ...]


def pack(pools: int, offers: Mapping[int, Sequence[Pick]], needed: float, idle: bool = True) -> Point | None:
    """Most sequences over all ways to split the pools (bits of a mask) into teams or, where that is allowed, idleness.

    Of ways with enough spare bytes, if there are any; else of all ways.
    """
    points: dict[int, list[Point]] = {0: [Point(0, 0.0, ())]}
    best: list[Point] = []
    for mask in range(1 << pools):
        for point in points.get(mask, ()):
            lowest = next((bit for bit in range(pools) if not mask >> bit & 1), None)
            if lowest is None:
                best.append(point)
                continue
            if idle:
                _keep(points, mask | 1 << lowest, point)  # this pool does nothing
            for own, picks in offers.items():
                if own >> lowest & 1 and not own & mask:
                    for pick in picks:
                        sequences, spare = point.sequences + pick.sequences, point.spare + pick.spare
                        _keep(points, mask | own, Point(sequences, spare, (*point.picks, pick)))
    fitting = [point for point in best if point.spare >= needed]
    return max(fitting or best, key=lambda point: (point.sequences, point.spare), default=None)


def _keep(points: dict[int, list[Point]], mask: int, new: Point) -> None:
    """Add to a mask's points unless one is at least as good in both; drop those that it beats."""
    own = points.setdefault(mask, [])
    if any(point.sequences >= new.sequences and point.spare >= new.spare for point in own):
        return
    own[:] = [p for p in own if not (new.sequences >= p.sequences and new.spare >= p.spare)]
    own.append(new)


def dealt(rates: Sequence[float], room: Sequence[float]) -> tuple[float, list[float]]:
    """(seconds, part of each) of an update that is shared so that all are done together, no part above its room.

    rates: whole updates a second. room: parts of the whole, together at least 1.
    """
    full: set[int] = set()
    while len(full) < len(rates):
        left = 1 - sum(room[i] for i in full)
        seconds = left / sum(rate for i, rate in enumerate(rates) if i not in full)
        more = {i for i, rate in enumerate(rates) if i not in full and seconds * rate > room[i]}
        if not more:
            return seconds, [room[i] if i in full else seconds * rate for i, rate in enumerate(rates)]
        full |= more
    return max(part / rate for part, rate in zip(room, rates, strict=True)), list(room)


def apportion(whole: int, weights: Sequence[float], most: bool = False) -> list[int]:
    """`whole` in parts proportional to `weights`, by largest remainder; with `most`, no part exceeds its weight."""
    total = sum(weights)
    if total == 0:
        return [0] * len(weights)
    exact = [whole * weight / total for weight in weights]
    parts = [math.floor(part) for part in exact]
    order = sorted(range(len(weights)), key=lambda i: (parts[i] - exact[i], i))
    for index in order[: whole - sum(parts)]:
        parts[index] += 1
    if most and any(part > weight for part, weight in zip(parts, weights, strict=True)):
        raise ValueError("the weights are too small for the whole")
    return parts
