"""How pools are split into pipeline groups: the most sequences over all ways; how an update is divided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motley.plan.search.step_lines import GroupOptions


@dataclass(frozen=True)
class GroupOffer:
    """One option of a pipeline group: the sequences it computes in a step, the bytes it leaves free."""

    pools: frozenset[str]
    options: GroupOptions
    index: int
    sequences: int
    spare: float


@dataclass(frozen=True)
class Packing:
    """Options of disjoint groups together."""

    sequences: int
    spare: float
    picks: tuple[GroupOffer, ...]


def pack(pools: int, offers: Mapping[int, Sequence[GroupOffer]], needed: float, idle: bool = True) -> Packing | None:
    """The most sequences over all ways to split the pools (bits of a mask) into groups.

    pools: how many there are. offers: mask of a group's pools → its options. needed: spare bytes; ways that have them
    are preferred. idle: pools may be left out.
    """
    points: dict[int, list[Packing]] = {0: [Packing(0, 0.0, ())]}
    best: list[Packing] = []
    for mask in range(1 << pools):
        for point in points.get(mask, ()):
            lowest = next((bit for bit in range(pools) if not mask >> bit & 1), None)
            if lowest is None:
                best.append(point)
                continue
            if idle:
                _keep(points, mask | 1 << lowest, point)  # this pool is left out
            for own, picks in offers.items():
                if own >> lowest & 1 and not own & mask:
                    for pick in picks:
                        sequences, spare = point.sequences + pick.sequences, point.spare + pick.spare
                        _keep(points, mask | own, Packing(sequences, spare, (*point.picks, pick)))
    fitting = [point for point in best if point.spare >= needed]
    return max(fitting or best, key=lambda point: (point.sequences, point.spare), default=None)


def _keep(points: dict[int, list[Packing]], mask: int, new: Packing) -> None:
    """Add to a mask's points unless one is at least as good in both; drop those that it beats."""
    own = points.setdefault(mask, [])
    if any(point.sequences >= new.sequences and point.spare >= new.spare for point in own):
        return
    own[:] = [p for p in own if not (new.sequences >= p.sequences and new.spare >= p.spare)]
    own.append(new)


def divide_update(rates: Sequence[float], room: Sequence[float]) -> tuple[float, list[float]]:
    """(seconds, share of each) of an update that is divided so that all end together and no share exceeds its room.

    rates: whole updates a second. room: shares of the whole that fit each, together at least 1.
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
