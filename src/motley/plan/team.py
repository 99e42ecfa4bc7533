"""All ways in which a team of pools can run whole copies of the model, costed at once (candidates.py, options.py)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from motley.fleet.inventory import Pool
from motley.plan.candidates import Member, candidates_of, members_of
from motley.plan.job import Job
from motley.plan.layout import SCHEDULES, Floats, Ints, Layouts
from motley.plan.memory import in_flight
from motley.plan.operators import LayerSeconds
from motley.plan.options import Options, items_at, joined, kinds_of, lines_of, pieces_of
from motley.plan.place import place
from motley.plan.step import Items, items

CHUNKS = (500, 1000, 2000, 4000)


def options_of(pools: Sequence[Pool], job: Job, share: float = 1.0) -> Options | None:
    """Every way worth considering; None where the model does not fit these pools at all.

    Args:
        pools: that form the team.
        job: what to train.
        share: of the batch that these pools will probably get beside others.

    Candidates are costed with a lower bound (all stages equal) first and placed exactly in that order, until no bound
    that is left can beat what was found, for the team's whole batch as for its likely share of it.
    """
    members = members_of(pools, job)
    candidates = candidates_of(members, job)
    if candidates is None:
        return None
    layouts, per_pool = candidates
    costed = [
        items(job.shape, own, job.seq_len, member.hardware, member.engine, member.precision)
        for own, member in zip(layouts, members, strict=True)
    ]
    found: list[Options] = []
    shares = [job.global_batch, job.global_batch * share]
    keep = np.flatnonzero(_could_fit(members, layouts, per_pool, costed, job))
    layouts, per_pool, costed = [own[keep] for own in layouts], per_pool[:, keep], [items_at(c, keep) for c in costed]
    if not len(keep):
        return None
    bounds = _lower_bounds(members, layouts, per_pool, costed, shares)
    order = np.argsort((bounds / np.maximum(bounds.min(axis=1, keepdims=True), 1e-300)).min(axis=0), kind="stable")
    best = np.full(len(shares), np.inf)
    start, size = 0, 0
    while start < len(order):
        chunk = order[start : start + CHUNKS[min(size, len(CHUNKS) - 1)]]
        if (bounds[:, order[start:]].min(axis=1) > best).all():
            break
        start, size = start + len(chunk), size + 1
        placed = _placed(
            members, [own[chunk] for own in layouts], per_pool[:, chunk], [items_at(c, chunk) for c in costed], job
        )
        if placed is None or not len(placed):
            continue
        found.append(placed)
        for number, share in enumerate(shares):
            times = placed.seconds(np.maximum(np.ceil(share / placed.grain), 1), crossing=False)
            own = times[placed.own_states]
            best[number] = min(best[number], own.min(initial=np.inf))
    if not found:
        return None
    return joined(found)


def _could_fit(
    members: tuple[Member, ...], layouts: list[Layouts], per_pool: Ints, costed: list[Items], job: Job
) -> NDArray[np.bool_]:
    """Whether all weights and gradients together, and one micro-batch of each piece, fit the chips of one copy."""
    needed, room = np.full(len(layouts[0]), np.inf), np.zeros(len(layouts[0]))
    for member, own, pieces, stages in zip(members, layouts, costed, per_pool, strict=True):
        kinds, first = kinds_of(pieces)
        costs = pieces_of(member, own, pieces, first, job, own_states=False)
        whole = sum(costs.held[kind] + costs.saved[kind] for kind in kinds)
        needed = np.minimum(needed, whole)
        room = room + stages * np.maximum(costs.capacity - costs.constant, 0.0)
    return needed <= room


def _lower_bounds(
    members: tuple[Member, ...], layouts: list[Layouts], per_pool: Ints, costed: list[Items], shares: Sequence[float]
) -> Floats:
    """[shares, candidates] seconds that no placement can beat: all work spread evenly over all stages."""
    work = [np.sum([piece.total for piece in pieces.seconds], axis=0) for pieces in costed]
    speed = np.sum([stages / own for stages, own in zip(per_pool, work, strict=True)], axis=0)
    heaviest = np.min([np.max([piece.total for piece in _unique(pieces)], axis=0) for pieces in costed], axis=0)
    dual = layouts[0].schedule == SCHEDULES.index("dualpipe")
    slow = np.maximum(1 / speed, np.where(dual, heaviest / 2, heaviest))
    grain = layouts[0].dp * layouts[0].micro_batch
    zero = np.full(len(slow), np.inf)
    for member, own in zip(members, layouts, strict=True):
        each = member.engine.step_seconds + np.zeros(len(own))
        zero = np.minimum(zero, each)
    return np.stack([np.maximum(np.ceil(share / grain), 1) * slow + zero for share in shares])


def _unique(pieces: Items) -> list[LayerSeconds]:
    return list({id(piece): piece for piece in pieces.seconds}.values())


def _placed(
    members: tuple[Member, ...], layouts: list[Layouts], per_pool: Ints, costed: list[Items], job: Job
) -> Options | None:
    """Place candidates, with their states on their own chips and, failing that, with states kept elsewhere."""
    pp = layouts[0].pp
    most = int(pp.max())
    bounds = np.cumsum(per_pool, axis=0)
    numbers = np.arange(most)[:, None]
    pool_of = (numbers[:, :, None] >= bounds.T[None]).sum(axis=2).clip(max=len(members) - 1)
    flights = np.stack([in_flight(layouts[0], np.full(len(pp), stage)) for stage in range(most)])
    kinds, order = kinds_of(costed[0])

    def placed(index: Ints, own_states: bool) -> tuple[Options | None, Ints]:
        """(the options, the candidates that found no place)."""
        own, pieces = [one[index] for one in layouts], [items_at(one, index) for one in costed]
        pools = [
            pieces_of(member, one, piece, order, job, own_states)
            for member, one, piece in zip(members, own, pieces, strict=True)
        ]
        placement = place(pools, kinds, pool_of[:, index], pp[index], flights[:, index])
        fits = np.flatnonzero(placement.feasible)
        if not len(fits):
            return None, index
        options = lines_of(members, own, pieces, placement, pool_of[:, index], fits, job, own_states)
        return options, index[~placement.feasible]

    made, left = placed(np.arange(len(pp)), True)
    left = left[np.isin(layouts[0].zero[left], (1, 2))]  # sharded states may lie on chips elsewhere
    elsewhere = placed(left, False)[0] if len(left) else None
    both = [options for options in (made, elsewhere) if options is not None]
    return joined(both) if both else None
