"""The replay: agrees with Young and Daly where they hold, counts every second, never hides a loss."""

from typing import Any

import numpy as np
import pytest

from motley.errors import InputError
from motley.plan.report.simulation_html import simulation_page
from motley.plan.simulation.simulate import (
    LOSSES,
    SimulatedGroup,
    SimulatedPool,
    SimulateSettings,
    best_interval,
    expected_goodput,
    replay,
    simulate_plan,
    simulated_groups,
)

DAY = 86400.0
CALM = SimulateSettings(stragglers_per_failure=0, replan_seconds=0, spare_share=1.0, runs=40)


def plan(days: float = 30, hours: float = 50_000.0, nodes: int = 256, availability: float = 1.0) -> dict[str, Any]:
    """2,048 chips by default, a replica of the model on every 16 of them."""
    chips = 8 * nodes
    return {
        "model": "v3", "fleet": "test", "steps": 1000, "step_seconds": days * DAY / 1000,
        "pools": [
            {
                "pool": "a", "chips": chips, "nodes": nodes, "chips_per_node": 8, "hours_between_failures": hours,
                "flops_share": 1.0, "availability": availability, "memory_limit_bytes": 80e9,
            }
        ],
        "groups": [
            {
                "pools": ["a"], "chips": {"a": chips}, "share": 1.0, "dp": chips // 16, "cp": 1, "ep": 1, "zero": 1,
                "stages": [{"chips": chips, "memory_bytes": {"weights": 2e9, "gradients": 2e9, "optimizer": 1e8}}],
            }
        ],
    }  # fmt: skip


def group(replicas: int, *parts: SimulatedPool, state_bytes: float = 0.0) -> SimulatedGroup:
    return SimulatedGroup(1.0, replicas, state_bytes, parts)


def part(chips: int, replicas: int, work: float = 1.0, per_node: int = 8, memory_bytes: float = 80e9) -> SimulatedPool:
    return SimulatedPool("a", chips, chips // replicas, -(-chips // per_node), per_node, 1e5, 1.0, work, memory_bytes)


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
    groups = simulated_groups(plan(hours=20_000, availability=0.95))
    for seed in range(5):
        run = replay(groups, 20 * DAY, 2000, settings, np.random.default_rng(seed))
        assert run["goodput"] + sum(run["lost"].values()) == pytest.approx(1, abs=1e-9)
        assert set(run["lost"]) == set(LOSSES)
        assert all(share > 0 for share in run["lost"].values())
        times, done, speed = zip(*run["timeline"], strict=True)
        assert list(times) == sorted(times)
        assert done[-1] == 1
        assert all(0 <= value <= 1 + 1e-9 for value in speed)
        assert len(run["failed"]) == run["failures"]


def test_without_failures_nothing_is_lost():
    settings = SimulateSettings(stragglers_per_failure=0, checkpoint_interval_seconds=1e12)
    run = replay(simulated_groups(plan(hours=1e15)), 10 * DAY, float("inf"), settings, np.random.default_rng(0))
    assert (run["goodput"], run["failures"], run["days"]) == (1.0, 0, 10)


def test_the_same_seed_is_the_same_run_and_another_is_not():
    assert simulate_plan(plan(), SimulateSettings(runs=3)) == simulate_plan(plan(), SimulateSettings(runs=3))
    other = simulate_plan(plan(), SimulateSettings(runs=3, seed=1))
    assert other["runs"] != simulate_plan(plan(), SimulateSettings(runs=3))["runs"]


def test_a_pool_that_is_there_four_fifths_of_the_time_works_about_as_much():
    settings = SimulateSettings(stragglers_per_failure=0, replan_seconds=0, checkpoint_seconds=1e-6, runs=4)
    result = simulate_plan(plan(hours=1e9, availability=0.8), settings)
    assert result["goodput"] == pytest.approx(0.8, abs=0.02)


def test_more_failures_longer_repairs_and_slower_stragglers_cost_more():
    base = simulate_plan(plan(), SimulateSettings(runs=20))["goodput"]
    assert simulate_plan(plan(hours=10_000), SimulateSettings(runs=20))["goodput"] < base
    assert simulate_plan(plan(), SimulateSettings(runs=20, repair_hours=240))["goodput"] < base
    assert simulate_plan(plan(), SimulateSettings(runs=20, straggler_speed=0.1))["goodput"] < base
    assert simulate_plan(plan(), SimulateSettings(runs=20, spare_share=0.05))["goodput"] > base


def test_a_group_that_loses_a_node_goes_on_with_the_copies_that_are_left():
    many = group(40, part(640, 40))  # a replica is two nodes
    assert many.speed([640], 0, CALM) == 1
    assert many.speed([632], 0, CALM) == pytest.approx(39 / 40)
    assert many.speed([624], 0, CALM) == pytest.approx(39 / 40)  # formed again of what is left
    assert many.speed([640], 2, CALM) == pytest.approx((40 - 2 * 0.3) / 40)  # two slow chips slow two replicas
    assert many.speed([0], 3, CALM) == 0


def test_a_group_without_a_whole_copy_works_on_with_what_is_left_if_the_state_fits():
    alone = group(1, part(16, 1), state_bytes=600e9)
    assert alone.speed([16], 0, CALM) == 1
    assert alone.speed([8], 0, CALM) == pytest.approx(0.9 / 2)
    assert alone.speed([8], 1, CALM) == pytest.approx(0.9 / 2 * 0.7)
    assert group(1, part(16, 1), state_bytes=700e9).speed([8], 0, CALM) == 0  # 8 x 80 GB cannot hold it


def test_pools_of_one_group_fail_together():
    """A replica needs both pools: with half of the one, half of the replicas work, or all is cut anew."""
    mixed = group(4, part(16, 4, work=0.8, per_node=4), part(8, 4, work=0.2, per_node=2))
    assert mixed.speed([8, 8], 0, CALM) == pytest.approx(0.9 * (0.8 / 2 + 0.2))
    assert mixed.speed([16, 4], 0, CALM) == pytest.approx(0.9 * (0.8 + 0.2 / 2))
    assert mixed.speed([16, 0], 0, CALM) == pytest.approx(0.9 * 0.8)
    assert mixed.speed([0, 8], 0, CALM) == pytest.approx(0.9 * 0.2)


def test_losing_more_is_never_faster():
    random = np.random.default_rng(4)
    for _ in range(300):
        replicas = int(random.choice([1, 2, 4]))
        parts = [part(replicas * int(random.integers(1, 9)), replicas, work) for work in (0.3, 0.7)]
        some = group(replicas, *parts, state_bytes=random.uniform(0, 80e9 * sum(p.chips for p in parts)))
        fewer = [int(random.integers(0, p.chips + 1)) for p in parts]
        more = [int(random.integers(count, p.chips + 1)) for count, p in zip(fewer, parts, strict=True)]
        slow = int(random.integers(0, 3))
        assert some.speed(fewer, slow + 1, CALM) <= some.speed(more, slow, CALM) + 1e-12


def test_the_state_is_that_of_the_smallest_set_of_chips_that_holds_every_expert():
    values = plan()
    values["groups"][0] |= {"ep": 4}
    chips, replicas = 2048, 128
    assert simulated_groups(values)[0].state_bytes == pytest.approx(chips * (4e9 * 4 / replicas + 1e8))
    values["groups"][0] |= {"zero": 3}  # all is sharded: the group holds it once
    assert simulated_groups(values)[0].state_bytes == pytest.approx(chips * 4.1e9)


def test_a_group_of_one_copy_does_not_stand_still_through_a_repair():
    """Two nodes hold the only replica. A repair of ten days costs about half of the speed while it lasts, not all."""
    values = plan(days=200, hours=16 * 24 * 40, nodes=2)
    slow_repair = SimulateSettings(stragglers_per_failure=0, repair_hours=240, runs=20)
    values["groups"][0]["stages"][0]["memory_bytes"] = {"weights": 0, "gradients": 0, "optimizer": 30e9}
    working = simulate_plan(values, slow_repair)
    values["groups"][0]["stages"][0]["memory_bytes"]["optimizer"] = 60e9
    standing = simulate_plan(values, slow_repair)
    key = "missing and slow chips"
    assert working["lost_share"][key] == pytest.approx(0.55 * 10 / 50, rel=0.15)  # 40 days between failures, 10 away
    assert standing["lost_share"][key] > 1.5 * working["lost_share"][key]


def test_the_day_by_day_picture_adds_up_to_the_whole_run():
    for days in (3, 90, 700):
        result = simulate_plan(plan(days=days, hours=20_000), SimulateSettings(runs=3))
        drawn = result["timeline"]
        width = np.diff(drawn["edges"])
        assert len(width) == len(drawn["work"]) == len(drawn["speed"]) <= 160
        assert (np.array(drawn["work"]) * width).sum() == pytest.approx(days, rel=1e-6)
        assert all(0 <= day <= drawn["edges"][-1] for day in drawn["failures"])
        assert sorted(run["days"] for run in result["runs"])[1] == pytest.approx(drawn["edges"][-1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"runs": 0}, "--runs is 0"),
        ({"checkpoint_seconds": 0}, "--checkpoint-seconds is 0; it must be above 0"),
        ({"spare_share": -1}, "--spare-share is -1; it must be 0 or more"),
        ({"straggler_speed": 2}, "--straggler-speed is 2"),
        ({"replanned_speed": 0}, "--replanned-speed is 0; it must be above 0 and at most 1"),
        ({"checkpoint_interval_seconds": -5}, "--checkpoint-interval-seconds is -5"),
        ({"repair_hours": float("nan")}, "--repair-hours is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        SimulateSettings(**change)


@pytest.mark.parametrize("broken", [{}, {"pools": [], "groups": []}, {"pools": [{"chips": 8}], "groups": []}])
def test_a_file_that_is_no_plan_is_refused(broken: dict[str, Any]):
    with pytest.raises(InputError, match=r"this is no plan|uses no chips"):
        simulate_plan(broken, SimulateSettings())


def test_the_pages_of_a_plan_and_its_replay_say_what_matters():
    result = simulate_plan(plan(), SimulateSettings(runs=5))
    page = simulation_page(result)
    for words in (
        "days until it is done",
        "chips at work",
        "useful work",
        "failures",
        "minutes between two checkpoints",
    ):
        assert words in page
    assert "<script" not in page
    calm = simulate_plan(plan(hours=1e15), SimulateSettings(runs=2, stragglers_per_failure=0))
    assert "none in this replay" in simulation_page(calm)


def test_a_run_that_loses_as_much_as_it_gains_is_refused_instead_of_going_on_for_ever(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("motley.plan.simulation.simulate.MOST_EVENTS", 50_000)  # a usual run has some thousands
    with pytest.raises(InputError, match="hardly ever ends"):
        simulate_plan(plan(hours=1.0, nodes=2048), SimulateSettings(runs=1))
    assert simulate_plan(plan(hours=20_000, nodes=2048), SimulateSettings(runs=1))["goodput"] > 0.1
