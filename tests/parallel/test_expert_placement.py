"""Experts move off a worker that has no room for its even part, and off no other."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from motley.fleet.device import Format
from motley.model import SIZES
from motley.parallel.build import _with_experts_that_fit
from motley.parallel.expert.placement import _even_up_to, experts_by_memory
from motley.parallel.layout import IslandLayout, Layout, PipelineGroup, coordinates_of
from motley.parallel.memory_fit import row_bytes
from motley.parallel.zero.partition import held_bytes
from motley.train.config import PretrainConfig

NANO = replace(SIZES["nano"], vocab_size=300)  # three sparse layers of eight experts
CONFIG = PretrainConfig(seq_len=64, micro_batch=2)
FP32: list[Format] = ["fp32"] * 4
FOUR = Layout((PipelineGroup(((0,), (1,), (2,), (3,)), (4,), experts=(2, 2, 2, 2), micro_batch=2),), zero=1)
PIPELINES = Layout((PipelineGroup(((0, 1), (2, 3)), (1, 3), experts=(4, 4), micro_batch=2),))


def need(layout: Layout, rank: int) -> float:
    """Bytes of a worker, as the check before the first step counts them."""
    row = row_bytes(NANO, coordinates_of(layout, rank), CONFIG.seq_len, 4, False)
    return held_bytes(NANO, layout, rank, CONFIG.optimizer).total + 2 * row


def fitting(layout: Layout, budgets: Sequence[float]) -> Layout:
    ranks = tuple(range(layout.workers))
    (island,) = experts_by_memory([IslandLayout(ranks, layout)], NANO, CONFIG, budgets, FP32)
    return island.layout


@pytest.mark.parametrize("layout", [FOUR, PIPELINES])
def test_a_plan_that_fits_stays_as_it_is(layout: Layout) -> None:
    uneven = replace(
        layout, groups=(replace(layout.groups[0], experts=(5, 3) if layout is PIPELINES else (3, 1, 2, 2)),)
    )
    for own in (layout, uneven):
        assert fitting(own, [need(own, rank) for rank in range(4)]) == own


@pytest.mark.parametrize(("layout", "short"), [(FOUR, 1), (FOUR, 3), (PIPELINES, 3)])
def test_a_worker_without_room_holds_fewer_experts_and_then_fits(layout: Layout, short: int) -> None:
    budgets = [2 * need(layout, rank) for rank in range(4)]
    budgets[short] = 0.98 * need(layout, short)
    found = fitting(layout, budgets)
    own, place = found.groups[0].experts, short // layout.groups[0].stages
    assert sum(own) == 8
    assert 1 <= own[place] < layout.groups[0].experts[place]
    others = [count for number, count in enumerate(own) if number != place]
    assert max(others) - min(others) <= 1
    assert all(need(found, rank) <= budgets[rank] for rank in range(4))


def test_what_no_deal_can_hold_stays_as_planned_and_is_refused_by_the_check_of_memory() -> None:
    assert fitting(FOUR, [need(FOUR, 0) / 2] * 4) == FOUR


@pytest.mark.parametrize("seed", range(30))
def test_experts_are_dealt_as_evenly_as_room_allows(seed: int) -> None:
    chance = random.Random(seed)
    replicas, whole = chance.randint(2, 6), chance.randint(8, 40)
    most = [chance.choice([math.inf, chance.randint(1, 12)]) for _ in range(replicas)]
    planned = (whole - replicas + 1, *[1] * (replicas - 1))
    dealt = _even_up_to(most, planned)
    if sum(most) < whole:
        assert dealt == planned
        return
    assert sum(dealt) == whole
    assert all(1 <= own <= room for own, room in zip(dealt, most, strict=True))
    free = [own for own, room in zip(dealt, most, strict=True) if own < room]
    assert not free or max(dealt) - min(free) <= 1, "whoever has more room than it uses has as many as any other"


def test_the_leader_says_which_workers_share_their_experts_otherwise_than_planned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    budgets = [2 * need(FOUR, rank) for rank in range(3)] + [0.98 * need(FOUR, 3)]
    islands = [IslandLayout((0, 1, 2, 3), FOUR)]
    found = _with_experts_that_fit(islands, NANO, CONFIG, budgets, FP32, True)
    assert found[0].layout != FOUR
    assert (
        f"share experts as {list(found[0].layout.groups[0].experts)} instead of [2, 2, 2, 2]" in capsys.readouterr().err
    )
