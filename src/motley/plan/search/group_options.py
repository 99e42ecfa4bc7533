"""All ways in which a group of pools can run replicas of the model, costed at once (candidates.py, step_lines.py)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from motley.fleet.inventory import Pool
from motley.plan.cost_model.configs import SCHEDULES, Floats, Ints, ParallelConfigs
from motley.plan.cost_model.memory import in_flight
from motley.plan.cost_model.operators import LayerSeconds, summed
from motley.plan.cost_model.step_time import (
    HeldParameters,
    NetworkPieces,
    exchange_seconds,
    network_pieces,
    update_seconds,
)
from motley.plan.search.candidates import GroupMember, candidates_of, members_of
from motley.plan.search.cut_layers import cut_stages
from motley.plan.search.step_lines import (
    GroupOptions,
    border_seconds,
    costed_options,
    joined,
    piece_costs,
    piece_kinds,
    pieces_at,
)
from motley.plan.workload import Workload

CHUNKS = (500, 1000, 2000, 4000)  # candidates cut into stages at a time
MANY_CHIPS = 64
PATIENCE = 1  # chunks without a better candidate after which larger groups of several pools are done


def group_options(
    pools: Sequence[Pool],
    workload: Workload,
    share: float = 1.0,
    to_beat: Callable[[int], float] = lambda sequences: np.inf,
    all_chips: bool = False,
) -> GroupOptions | None:
    """Every way worth considering; None where the model does not fit these pools at all.

    Args:
        pools: that form the group.
        workload: what to train.
        share: of the batch that these pools will probably get beside others.
        to_beat: sequences → seconds that these pools need for them without forming this group.
        all_chips: only ways in which every chip works.

    Candidates get a lower bound (all stages equal) first. They are cut into stages in that order, until no remaining
    bound is below the best known, for the whole batch and for likely shares of it.
    """
    members = members_of(pools, workload)
    candidates = candidates_of(members, workload)
    if candidates is None:
        return None
    configs, per_pool = candidates
    costed = [
        network_pieces(workload.shape, own, workload.seq_len, member.hardware, member.framework, member.precision)
        for own, member in zip(configs, members, strict=True)
    ]
    shares = [workload.global_batch * part for part in (1.0, share**0.5, share, share / 2)]
    fits = _could_fit(members, configs, per_pool, costed, workload)
    for pool, own, stages in zip(pools, configs, per_pool, strict=True) if all_chips else ():
        fits &= stages * own.tp * own.cp * own.dp == pool.chips
    keep = np.flatnonzero(fits)
    configs, per_pool, costed = [own[keep] for own in configs], per_pool[:, keep], [pieces_at(c, keep) for c in costed]
    if not len(keep):
        return None
    beat = np.array([to_beat(max(1, round(part))) for part in shares])
    found: list[GroupOptions] = []
    for alike in _comparable(members, configs[0].zero):
        own, pieces = [one[alike] for one in configs], [pieces_at(one, alike) for one in costed]
        found += _best_first(members, own, per_pool[:, alike], pieces, shares, beat, workload)
    return joined(found) if found else None


def _comparable(members: tuple[GroupMember, ...], zero: Ints) -> list[Ints]:
    """Indices of candidates that can replace each other: over an island, all groups use the same ZeRO stage."""
    if members[0].framework.zero_over == "group":
        return [np.arange(len(zero))]
    return [np.flatnonzero(zero == stage) for stage in np.unique(zero)]


def _best_first(
    members: tuple[GroupMember, ...],
    configs: list[ParallelConfigs],
    per_pool: Ints,
    costed: list[NetworkPieces],
    shares: Sequence[float],
    beat: Floats,
    workload: Workload,
) -> list[GroupOptions]:
    """Cut candidates into stages in the order of their bounds, while one may be better than all before, and `beat`."""
    bounds = _lower_bounds(members, configs, per_pool, costed, shares, workload)
    order = np.argsort((bounds / np.maximum(bounds.min(axis=1, keepdims=True), 1e-300)).min(axis=0), kind="stable")
    found: list[GroupOptions] = []
    best = beat.copy()
    start, size, in_vain = 0, 0, 0
    patience = (
        PATIENCE if len(members) > 1 and sum(member.pool.chips for member in members) > MANY_CHIPS else len(order)
    )
    while start < len(order) and in_vain < patience:
        chunk = order[start : start + CHUNKS[min(size, len(CHUNKS) - 1)]]
        if (bounds[:, order[start:]].min(axis=1) > best).all():
            break
        start, size = start + len(chunk), size + 1
        placed = _placed(
            members,
            [own[chunk] for own in configs],
            per_pool[:, chunk],
            [pieces_at(c, chunk) for c in costed],
            workload,
        )
        if placed is None or not len(placed):
            continue
        found.append(placed)
        before = best.copy()
        for number, part in enumerate(shares):
            times = placed.seconds(np.maximum(np.ceil(part / placed.grain), 1), crossing=False)
            best[number] = min(best[number], times[placed.own_states].min(initial=np.inf))
        in_vain = 0 if (best < before).any() else in_vain + 1
    return found


def _could_fit(
    members: tuple[GroupMember, ...],
    configs: list[ParallelConfigs],
    per_pool: Ints,
    costed: list[NetworkPieces],
    workload: Workload,
) -> NDArray[np.bool_]:
    """Whether all weights and gradients together, and one micro-batch of each piece, fit the chips of one replica."""
    needed, room = np.full(len(configs[0]), np.inf), np.zeros(len(configs[0]))
    for member, own, pieces, stages in zip(members, configs, costed, per_pool, strict=True):
        kinds, first = piece_kinds(pieces)
        costs = piece_costs(member, own, pieces, first, workload, own_states=False)
        whole = sum(costs.held[kind] + costs.saved[kind] for kind in kinds)
        needed = np.minimum(needed, whole)
        room = room + stages * np.maximum(costs.capacity - costs.constant, 0.0)
    return needed <= room


def _lower_bounds(
    members: tuple[GroupMember, ...],
    configs: list[ParallelConfigs],
    per_pool: Ints,
    costed: list[NetworkPieces],
    shares: Sequence[float],
    workload: Workload,
) -> Floats:
    """[shares, candidates] seconds that no cut can beat: all work spread evenly over all stages.

    The bubble grows and shrinks with the slowest stage, but never by more than the micro-batches gain from it; a group
    of one pool also exchanges, updates and waits at least as much as its average stage.
    """
    first = configs[0]
    pp = first.pp
    whole = [summed(pieces.seconds) for pieces in costed]
    speed = np.sum([stages / own.total for stages, own in zip(per_pool, whole, strict=True)], axis=0)
    heaviest = np.min([np.max([piece.total for piece in _unique(pieces)], axis=0) for pieces in costed], axis=0)
    dual = first.schedule == SCHEDULES.index("dualpipe")
    slow = np.maximum(1 / speed, np.where(dual, heaviest / 2, heaviest))
    least = np.min([own.total for own in whole], axis=0)
    filling = np.maximum(least - slow, 0.0)
    mean = whole[0] * (1 / pp)
    weight = np.minimum(mean.weight, mean.total / 3)
    both = mean.total + mean.backward + mean.communication / 2 - 3 * weight
    bubble = np.select(
        [pp == 1, first.schedule == SCHEDULES.index("1f1b"), dual],
        [np.zeros(len(first)), filling / first.chunks, np.maximum((pp / 2 - 1) * both, 0.0)],
        np.zeros(len(first)),  # some cut may leave a zero bubble none
    )
    fixed = bubble + max(member.framework.step_seconds for member in members)
    once, hidden = np.zeros(len(first)), 0.0
    if len(members) == 1:
        member, pieces = members[0], costed[0]
        held = sum(pieces.held, start=HeldParameters(0.0, 0.0)) * (1 / pp)
        once, every = exchange_seconds(held, first, member.hardware, member.framework)
        hidden = member.framework.hidden_gradients
        fixed = fixed + update_seconds(held, first, member.hardware, member.framework)
        nodes = np.maximum(first.chips / member.hardware.chips_per_node, 1)
        slow = slow * (1 + member.framework.skew * np.log2(nodes)) + (1 - member.framework.hidden_shards) * every
    for (member, own), (neighbour, theirs) in pairwise(zip(members, configs, strict=True)):
        ends = ((member, own), (neighbour, theirs))
        border = np.maximum(*(border_seconds(end, one, workload, far=True) for end, one in ends))
        slow, fixed = np.maximum(slow, border), fixed + 2 * border
    grain = first.dp * first.micro_batch
    bounds = []
    for share in shares:
        running = np.maximum(np.ceil(share / grain), first.least_micro_batches) * slow
        bounds.append(fixed + running + once - hidden * np.minimum(once, running))
    return np.stack(bounds)


def _unique(pieces: NetworkPieces) -> list[LayerSeconds]:
    return list({id(piece): piece for piece in pieces.seconds}.values())


def _placed(
    members: tuple[GroupMember, ...],
    configs: list[ParallelConfigs],
    per_pool: Ints,
    costed: list[NetworkPieces],
    workload: Workload,
) -> GroupOptions | None:
    """Cut candidates into stages, with states on their own chips, or on other chips where they do not fit."""
    pp = configs[0].pp
    most = int(pp.max())
    bounds = np.cumsum(per_pool, axis=0)
    numbers = np.arange(most)[:, None]
    pool_of = (numbers[:, :, None] >= bounds.T[None]).sum(axis=2).clip(max=len(members) - 1)
    flights = np.stack([in_flight(configs[0], np.full(len(pp), stage)) for stage in range(most)])
    kinds, order = piece_kinds(costed[0])

    def placed(index: Ints, own_states: bool) -> tuple[GroupOptions | None, Ints]:
        """(the options, the candidates that did not fit)."""
        own, pieces = [one[index] for one in configs], [pieces_at(one, index) for one in costed]
        pools = [
            piece_costs(member, one, piece, order, workload, own_states)
            for member, one, piece in zip(members, own, pieces, strict=True)
        ]
        together = max(piece.together for piece in pieces)
        cuts = cut_stages(pools, kinds, pool_of[:, index], pp[index], flights[:, index], together)
        fits = np.flatnonzero(cuts.feasible)
        if not len(fits):
            return None, index
        options = costed_options(members, own, pieces, cuts, pool_of[:, index], fits, workload, own_states)
        return options, index[~cuts.feasible]

    made, left = placed(np.arange(len(pp)), True)
    elsewhere = (1, 2) if members[0].framework.zero_over == "group" else (1, 2, 3)
    left = left[np.isin(configs[0].zero[left], elsewhere)]  # what is sharded may be held by other chips
    helped = placed(left, False)[0] if len(left) else None
    both = [options for options in (made, helped) if options is not None]
    return joined(both) if both else None
