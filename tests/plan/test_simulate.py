"""The replay: agrees with Young and Daly where they hold, counts every second, never hides a loss."""

from typing import Any

import numpy as np
import pytest

from motley.errors import InputError
from motley.plan.simulate import (
    LOSSES,
    PoolRate,
    SimulateSettings,
    best_interval,
    expected_goodput,
    pool_rates,
    replay,
    simulate_plan,
)

DAY = 86400.0
CALM = SimulateSettings(stragglers_per_failure=0, replan_seconds=0, spare_share=1.0, runs=40)


def plan(days: float = 30, hours: float = 50_000.0, nodes: int = 256, availability: float = 1.0) -> dict[str, Any]:
    """2,048 chips by default, a copy of the model on every 16 of them."""
    chips = 8 * nodes
    return {
        "model": "v3", "fleet": "test", "steps": 1000, "step_seconds": days * DAY / 1000,
        "pools": [
            {
                "pool": "a", "chips": chips, "nodes": nodes, "chips_per_node": 8, "hours_between_failures": hours,
                "flops_share": 1.0, "availability": availability,
            }
        ],
        "teams": [{"pools": ["a"], "chips": {"a": chips}, "dp": chips // 16}],
    }  # fmt: skip


def test_goodput_with_spares_is_what_young_and_daly_expect():
    result = simulate_plan(plan(), CALM)
    assert result["goodput"] == pytest.approx(result["expected_goodput"], abs=0.005)
    assert result["hours_between_failures"] == pytest.approx(50_000 / 2048)
    assert result["failures_mean"] == pytest.approx(
        result["days_mean"] * 24 / result["hours_between_failures"], rel=0.1
    )
    assert result["days_p5"] <= result["days_p50"] <= result["days_p95"]


def test_the_suggested_interval_is_better_than_much_shorter_and_much_longer_ones():
    best = simulate_plan(plan(hours=5000), CALM)
    assert best["suggested_interval_seconds"] == best_interval(5000 / 2048, CALM.checkpoint_seconds)
    for factor in (0.2, 5):
        interval = factor * best["suggested_interval_seconds"]
        other = SimulateSettings(**{**vars(CALM), "checkpoint_interval_seconds": interval})
        assert simulate_plan(plan(hours=5000), other)["goodput"] < best["goodput"] - 0.01


def test_youngs_formula():
    assert best_interval(10, 60) == pytest.approx((2 * 60 * 36000) ** 0.5 - 60)
    assert best_interval(1e-6, 60) == 60
    goodput, interval = expected_goodput(float("inf"), 60, 600)
    assert (goodput, interval) == (1.0, float("inf"))


def test_lost_seconds_and_useful_ones_make_up_the_whole_run():
    settings = SimulateSettings(repair_hours=48, replan_seconds=120)
    pools = pool_rates(plan(hours=20_000, availability=0.95))
    for seed in range(5):
        run = replay(pools, 20 * DAY, 2000, settings, np.random.default_rng(seed))
        assert run["goodput"] + sum(run["lost"].values()) == pytest.approx(1, abs=1e-9)
        assert set(run["lost"]) == set(LOSSES)
        assert all(share > 0 for share in run["lost"].values())
        times, done = zip(*run["timeline"], strict=True)
        assert list(times) == sorted(times)
        assert done[-1] == 1


def test_without_failures_nothing_is_lost():
    settings = SimulateSettings(stragglers_per_failure=0, checkpoint_interval_seconds=1e12)
    run = replay(pool_rates(plan(hours=1e15)), 10 * DAY, float("inf"), settings, np.random.default_rng(0))
    assert (run["goodput"], run["failures"], run["days"]) == (1.0, 0, 10)


def test_the_same_seed_is_the_same_run_and_another_is_not():
    assert simulate_plan(plan(), SimulateSettings(runs=3)) == simulate_plan(plan(), SimulateSettings(runs=3))
    other = simulate_plan(plan(), SimulateSettings(runs=3, seed=1))
    assert other["runs"] != simulate_plan(plan(), SimulateSettings(runs=3))["runs"]


def test_a_pool_that_is_there_four_fifths_of_the_time_works_about_as_much():
    settings = SimulateSettings(stragglers_per_failure=0, replan_seconds=0, checkpoint_seconds=1e-6, runs=20)
    result = simulate_plan(plan(hours=1e9, availability=0.8), settings)
    assert result["goodput"] == pytest.approx(0.8, abs=0.02)


def test_more_failures_longer_repairs_and_slower_stragglers_cost_more():
    base = simulate_plan(plan(), SimulateSettings(runs=20))["goodput"]
    assert simulate_plan(plan(hours=10_000), SimulateSettings(runs=20))["goodput"] < base
    assert simulate_plan(plan(), SimulateSettings(runs=20, repair_hours=240))["goodput"] < base
    assert simulate_plan(plan(), SimulateSettings(runs=20, straggler_speed=0.1))["goodput"] < base
    assert simulate_plan(plan(), SimulateSettings(runs=20, spare_share=0.05))["goodput"] > base


def test_only_whole_copies_of_the_model_count():
    pool = PoolRate("a", 64, 8, 8, 1e5, 1.0, replica_chips=16, availability=1.0)
    assert pool.lacking(0, 0, 0.5) == 0
    assert pool.lacking(1, 0, 0.5) == pytest.approx(0.25)  # one node of two that hold a copy
    assert pool.lacking(2, 0, 0.5) == pytest.approx(0.25)  # the copy is formed again of what is left
    assert pool.lacking(0, 1, 0.5) == pytest.approx(0.125)  # one copy of four at half speed
    assert pool.lacking(9, 3, 0.5) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"runs": 0}, "--runs is 0"),
        ({"checkpoint_seconds": 0}, "--checkpoint-seconds is 0; it must be above 0"),
        ({"spare_share": -1}, "--spare-share is -1; it must be 0 or more"),
        ({"straggler_speed": 2}, "--straggler-speed is 2"),
        ({"checkpoint_interval_seconds": -5}, "--checkpoint-interval-seconds is -5"),
        ({"repair_hours": float("nan")}, "--repair-hours is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        SimulateSettings(**change)


@pytest.mark.parametrize("broken", [{}, {"pools": [], "teams": []}, {"pools": [{"chips": 8}], "teams": []}])
def test_a_file_that_is_no_plan_is_refused(broken: dict[str, Any]):
    with pytest.raises(InputError, match=r"this is no plan|uses no chips"):
        simulate_plan(broken, SimulateSettings())


def test_a_run_that_loses_as_much_as_it_gains_is_refused_instead_of_going_on_for_ever():
    with pytest.raises(InputError, match="hardly ever ends"):
        simulate_plan(plan(hours=1.0, nodes=2048), SimulateSettings(runs=1))
