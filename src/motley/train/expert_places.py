"""Experts of equal chips with unequal memory: as evenly as their memories can hold them.

    four lanes share 16 experts     4 4 4 4 ──▶ 5 5 4 2     the last has room for two; the others share what is left

What a plan says stays wherever it fits.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from motley.fleet.device import ACTIVATIONS, Format
from motley.model import ModelConfig
from motley.train.config import TrainingConfig
from motley.train.layout import IslandLayout, Layout, Team, place_of
from motley.train.memory import row_bytes
from motley.train.parts import held_bytes


def experts_by_memory(
    islands: Sequence[IslandLayout],
    shape: ModelConfig,
    config: TrainingConfig,
    budgets: Sequence[float],
    formats: Sequence[Format],
) -> list[IslandLayout]:
    """The islands, with fewer experts on workers that could not hold theirs, where the others of their group can.

    budgets, formats: bytes that each worker of the job may hold, and what it computes in.
    """

    def fitting(island: IslandLayout) -> IslandLayout:
        layout = island.layout
        teams = [_fitting(layout, number, island) for number in range(len(layout.teams))]
        return replace(island, layout=replace(layout, teams=tuple(teams)))

    def _fitting(layout: Layout, number: int, island: IslandLayout) -> Team:
        team = layout.teams[number]
        if not team.experts:
            return team
        most = [math.inf] * team.expert_lanes
        for lane, ranks in enumerate(team.lanes):
            own = lane % team.expert_lanes
            fewer = _with_experts(layout, number, _one_fewer(team.experts, own))
            for rank in ranks:
                held, less = (
                    held_bytes(
                        shape, one, rank, config.optimizer, mtp=bool(config.mtp_weight), moments=config.moments
                    ).total
                    for one in (layout, fewer)
                )
                among_all = island.ranks[rank]
                number_bytes = ACTIVATIONS[formats[among_all]].itemsize
                row = row_bytes(shape, place_of(layout, rank), config.seq_len, number_bytes, config.recompute)
                left = budgets[among_all] - held - team.micro_batch * row
                if held > less:  # a stage without sparse layers holds no experts
                    most[own] = min(most[own], team.experts[own] + left // (held - less))
        if all(room >= count for room, count in zip(most, team.experts, strict=True)):
            return team
        return replace(team, experts=_even_up_to(most, team.experts))

    return [fitting(island) for island in islands]


def _one_fewer(experts: tuple[int, ...], place: int) -> tuple[int, ...]:
    """The same with one of a place's experts at the next one."""
    moved = list(experts)
    moved[place] -= 1
    moved[(place + 1) % len(moved)] += 1
    return tuple(moved)


def _with_experts(layout: Layout, team: int, experts: tuple[int, ...]) -> Layout:
    teams = list(layout.teams)
    teams[team] = replace(teams[team], experts=experts)
    return replace(layout, teams=tuple(teams))


def _even_up_to(most: Sequence[float], experts: tuple[int, ...]) -> tuple[int, ...]:
    """As many experts in all, dealt as evenly as may be, at most so many each; `experts` where that cannot be."""
    if sum(most) < sum(experts) or min(most) < 1:
        return experts
    dealt, left = list(experts), sum(experts)
    for done, place in enumerate(sorted(range(len(most)), key=lambda place: most[place])):
        dealt[place] = int(min(most[place], left // (len(most) - done)))
        left -= dealt[place]
    return tuple(dealt)
