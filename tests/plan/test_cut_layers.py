"""Cutting a chain into stages: equal to trying every cut, within memory, also where stages lie on different chips."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from motley.plan.cost_model.stage_balance import balanced
from motley.plan.search.cut_layers import PieceCosts, cut_stages


def every_cut(pieces: int, stages: int):
    for cut in combinations(range(1, pieces), stages - 1):
        yield tuple(zip((0, *cut), (*cut, pieces), strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_the_slowest_stage_is_as_fast_as_any_cut_makes_it(seed: int):
    random = np.random.default_rng(seed)
    costs = random.uniform(0.1, 3, int(random.integers(4, 11))).tolist()
    together = int(random.integers(1, 4))
    parted = len(costs) - together + 1
    stages = int(random.integers(1, min(5, parted) + 1))
    parts = balanced(costs, stages, together)
    assert [parts[0].start, parts[-1].stop] == [0, len(costs)]
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert all(part.stop > part.start for part in parts)
    cuts = [cut for cut in every_cut(len(costs), stages) if cut[-1][0] < parted]
    best = min(max(sum(costs[a:b]) for a, b in cut) for cut in cuts)
    assert parts[-1].start < parted
    assert max(sum(costs[part]) for part in parts) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_two_kinds_of_chips_share_a_pipeline_as_well_as_any_cut_within_memory(seed: int):
    random = np.random.default_rng(seed)
    pieces, kinds = 8, [0, 1, 1, 2, 1, 2, 2, 3]
    pools = [
        PieceCosts(
            seconds=random.uniform(0.5, 2, (4, 1)) * speed,
            held=random.uniform(1, 3, (4, 1)),
            apart=np.zeros((4, 1)),
            saved=random.uniform(0.1, 0.5, (4, 1)),
            constant=np.array([1.0]),
            capacity=float(random.uniform(7, 16)),
        )
        for speed in (1.0, 2.5)
    ]
    stages, on = 4, np.array([[0], [0], [1], [1]])
    flights = np.array([[4.0], [3.0], [2.0], [1.0]])
    together = int(random.integers(1, 3))
    found = cut_stages(pools, kinds, on, np.array([stages]), flights, together)
    best = np.inf
    for cut in every_cut(pieces, stages):
        if cut[-1][0] > pieces - together:
            continue
        slowest = 0.0
        for number, (start, stop) in enumerate(cut):
            pool = pools[on[number, 0]]
            own = kinds[start:stop]
            size = pool.constant[0] + sum(pool.held[k, 0] + pool.saved[k, 0] * flights[number, 0] for k in own)
            if size > pool.capacity:
                break
            slowest = max(slowest, sum(pool.seconds[k, 0] for k in own))
        else:
            best = min(best, slowest)
    assert bool(found.feasible[0]) == np.isfinite(best)
    if np.isfinite(best):
        assert found.slowest[0] == pytest.approx(best, rel=2e-5)
