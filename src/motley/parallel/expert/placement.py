"""Experts of equal chips with unequal memory: as evenly as their memories can hold them.

    four replicas share 16 experts   4 4 4 4 ──▶ 5 5 4 2     the last has room for two; the others share what is left

What a plan says stays wherever it fits.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from motley.fleet.device import Format
from motley.model import ModelConfig
from motley.parallel.layout import IslandLayout, Layout, PipelineGroup
from motley.parallel.memory_fit import held_and_row
from motley.train.config import TrainingConfig


def experts_by_memory(
    islands: Sequence[IslandLayout],
    shape: ModelConfig,
    config: TrainingConfig,
    budgets: Sequence[float],
    formats: Sequence[Format],
) -> list[IslandLayout]:
    """The islands, with fewer experts on ranks that could not hold theirs, where the others of their group can.

    budgets, formats: bytes that each rank of the job may hold, and what it computes in.
    """
    found = []
    for island in islands:
        room = [budgets[rank] for rank in island.ranks]
        computing: list[Format] = [formats[rank] for rank in island.ranks]
        numbers = range(len(island.layout.groups))
        groups = [_fitting(island.layout, number, shape, config, room, computing) for number in numbers]
        found.append(replace(island, layout=replace(island.layout, groups=tuple(groups))))
    return found


def _fitting(
    layout: Layout,
    number: int,
    shape: ModelConfig,
    config: TrainingConfig,
    budgets: Sequence[float],
    formats: Sequence[Format],
) -> PipelineGroup:
    """Pipeline group `number` with experts that fit its ranks; unchanged where they do, or where nothing would."""
    group = layout.groups[number]
    most = [math.inf] * len(group.experts)
    for replica, ranks in enumerate(group.replicas) if group.experts else ():
        own = replica % group.expert_replicas
        fewer = _with_experts(layout, number, _one_fewer(group.experts, own))
        for rank in ranks:
            held, row = held_and_row(shape, config, layout, rank, formats[rank])
            each = held - held_and_row(shape, config, fewer, rank, formats[rank])[0]
            if each > 0:  # a stage without sparse layers holds no experts
                left = budgets[rank] - held - group.micro_batch * row
                most[own] = min(most[own], group.experts[own] + left // each)
    if all(room >= count for room, count in zip(most, group.experts, strict=True)):
        return group
    return replace(group, experts=_even_up_to(most, group.experts))


def _one_fewer(experts: tuple[int, ...], index: int) -> tuple[int, ...]:
    """The same with one expert moved from a rank of the group to the next one."""
    moved = list(experts)
    moved[index] -= 1
    moved[(index + 1) % len(moved)] += 1
    return tuple(moved)


def _with_experts(layout: Layout, group: int, experts: tuple[int, ...]) -> Layout:
    groups = list(layout.groups)
    groups[group] = replace(groups[group], experts=experts)
    return replace(layout, groups=tuple(groups))


def _even_up_to(most: Sequence[float], experts: tuple[int, ...]) -> tuple[int, ...]:
    """As many experts in all, dealt as evenly as may be, at most so many each; `experts` where that cannot be."""
    if sum(most) < sum(experts) or min(most) < 1:
        return experts
    dealt, left = list(experts), sum(experts)
    for done, index in enumerate(sorted(range(len(most)), key=lambda index: most[index])):
        dealt[index] = int(min(most[index], left // (len(most) - done)))
        left -= dealt[index]
    return tuple(dealt)
