"""The search: optimal where everything can be enumerated, monotone, blind to names, within memory."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Pipeline, every_pipeline, least, line, random_plan_seconds, update_rate

from motley.apportion import apportion
from motley.errors import InputError
from motley.fleet import Fleet, Pool, find_chip, load_fleet, parse_fleet
from motley.model import SIZES
from motley.plan.network.registry import find_network
from motley.plan.network.spec import NetworkSpec, deepseek
from motley.plan.report.plan_file import plan_comparison, plan_values
from motley.plan.search.candidates import SMALL_GROUP
from motley.plan.search.group_options import group_options
from motley.plan.search.objective import best_plan
from motley.plan.search.pool_packing import divide_update
from motley.plan.search.search import Searcher
from motley.plan.search.step_lines import GroupOptions
from motley.plan.workload import Workload

EXAMPLES = Path(__file__).parents[2] / "examples" / "fleets"
FEW_MICRO_BATCHES = (1, 2)


def shallow(layers: int = 4) -> NetworkSpec:
    """A small MoE: few enough layers that every way to cut them can be tried."""
    config = replace(SIZES["small"], num_hidden_layers=layers, n_routed_experts=8, num_experts_per_tok=2)
    return deepseek(config, "shallow")


def fleet_of(*pools: tuple[str, str, int, int]) -> Fleet:
    return Fleet(pools=tuple(Pool(name=n, chip=c, nodes=k, chips_per_node=per) for n, c, k, per in pools))


def small_workload(batch: int, shape: NetworkSpec | None = None) -> Workload:
    """Under the framework that runs every degree and schedule the reference knows."""
    return Workload(shape or shallow(), 1e9, 1024, batch, "deepseek")


def best_step_by_enumeration(fleet: Fleet, workload: Workload) -> float:
    """Smallest step over all groups, all pipelines, all shares."""
    batch = workload.global_batch
    sequences = np.arange(1, batch + 1)
    fastest = {}
    for size in (1, 2):
        for group in combinations(fleet.pools, size):
            best = np.full((2, batch + 1), np.inf)
            for pipeline in every_pipeline(group, workload, FEW_MICRO_BATCHES):
                grain = pipeline.dp * pipeline.micro_batch
                if grain > batch or (costs := line(pipeline, workload)) is None:
                    continue
                micros = np.maximum(-(-sequences // grain), least(pipeline))
                for crossing in (False, True):
                    times = np.array([costs.seconds(float(micro), crossing) for micro in micros])
                    best[int(crossing), 1:] = np.minimum(best[int(crossing), 1:], times)
            fastest[tuple(pool.name for pool in group)] = best
    plans = [best[0, batch] for best in fastest.values()]
    first, second = (fastest[pool.name,][1] for pool in fleet.pools)
    plans += [max(first[part], second[batch - part]) for part in range(1, batch)]
    return float(min(plans))


@pytest.mark.parametrize(
    ("fleet", "batch"),
    [
        (fleet_of(("a", "A100", 1, 2), ("b", "V100", 1, 2)), 10),
        (fleet_of(("a", "T4", 1, 3), ("b", "L4", 1, 1)), 14),
        (fleet_of(("a", "RTX-3090", 2, 1), ("b", "H100", 1, 1)), 9),
    ],
)
def test_on_small_fleets_the_plan_is_the_optimum_of_the_cost_model(
    fleet: Fleet, batch: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("motley.plan.search.candidates.MICRO_BATCH", FEW_MICRO_BATCHES)
    workload = small_workload(batch)
    found = Searcher(fleet, workload).best()
    assert found is not None
    assert found.step_seconds == pytest.approx(best_step_by_enumeration(fleet, workload), rel=1e-6)


@pytest.mark.parametrize("framework", ["deepseek", "motley"])
def test_no_random_plan_is_better(framework: str):
    fleet = fleet_of(("a", "A100", 1, 2), ("b", "RTX-3090", 1, 4), ("c", "V100", 1, 8))
    workload = replace(small_workload(64, shallow(8)), framework=framework)
    found = Searcher(fleet, workload).best()
    assert found is not None
    random = np.random.default_rng(7)
    plans = [random_plan_seconds(fleet, workload, random) for _ in range(150)]
    valid = [plan for plan in plans if plan is not None]
    assert len(valid) > 60
    exact = framework == "deepseek"  # groups of an island of motley's share an update
    assert found.step_seconds <= min(valid) * (1 + (1e-9 if exact else 0.01))


chips = st.sampled_from(["A100", "RTX-3090", "V100", "H100", "L4", "T4"])
pool_sizes = st.tuples(chips, st.integers(1, 2), st.sampled_from([1, 2, 4]))
some_pools = st.lists(pool_sizes, min_size=1, max_size=3)
quick = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def made(pools: list[tuple[str, int, int]]) -> Fleet:
    return fleet_of(*((f"pool{i}", chip, nodes, per) for i, (chip, nodes, per) in enumerate(pools)))


def step(fleet: Fleet, batch: int = 24) -> float:
    found = Searcher(fleet, small_workload(batch)).best()
    return np.inf if found is None else found.step_seconds


@quick
@given(some_pools, st.integers(0, 2), pool_sizes)
def test_adding_chips_never_makes_the_best_plan_slower(pools, which, new):
    before = step(made(pools))
    which %= len(pools)
    chip, nodes, per = pools[which]
    assert step(made([*pools[:which], (chip, nodes + 1, per), *pools[which + 1 :]])) <= before * (1 + 1e-3)
    if len(pools) < 3:
        assert step(made([*pools, new])) <= before * (1 + 1e-9)


@settings(quick, max_examples=6)
@given(st.lists(pool_sizes, min_size=3, max_size=4), st.lists(chips, min_size=1, max_size=2))
def test_more_kinds_of_chips_never_make_the_best_plan_slower(pools, more):
    """Beyond four pools the search tries fewer groups; a weak newcomer must not cost the strong ones theirs."""
    wider = [*pools, *((chip, 1, 1) for chip in more)]
    assert step(made(wider)) <= step(made(pools)) * (1 + 1e-9)


@quick
@given(pool_sizes)
def test_another_chip_in_each_node_never_makes_the_best_plan_slower(pool):
    chip, nodes, per = pool
    for before, after in ((per, per + 1), (8, 9), (9, 10)):
        assert step(made([(chip, nodes, after)])) <= step(made([(chip, nodes, before)])) * (1 + 1e-9)


def test_the_order_of_pools_with_unlike_frameworks_changes_nothing():
    """A CPU pool has a framework of its own, with other bytes a parameter."""
    pools = [Pool(name="cpu", chip="EPYC-9004-core", chips_per_node=1), Pool(name="gpu", chip="A100", chips_per_node=4)]
    workload = Workload(find_network("v2-lite"), 1e11, 4096, 256)
    plans = [Searcher(Fleet(pools=tuple(order)), workload).best() for order in (pools, pools[::-1])]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].step_seconds == plans[1].step_seconds
    assert [group.options.own_states[group.index] for group in plans[0].groups] == [
        group.options.own_states[group.index] for group in plans[1].groups
    ]


def test_nodes_are_rented_whole():
    found = Searcher(fleet_of(("a", "A100", 3, 8)), small_workload(5)).best()
    assert found is not None
    assert found.rented["a"] % 8 == 0
    assert found.chips <= found.rented["a"] <= 24
    assert found.price_per_hour == pytest.approx(found.rented["a"] * find_chip("A100").price_per_hour)


@quick
@given(some_pools, st.floats(1.1, 20))
def test_more_bandwidth_never_makes_the_best_plan_slower(pools, factor):
    fleet = made(pools)
    slow = fleet.model_copy(
        update={
            "pools": tuple(pool.model_copy(update={"link_outside": 1e9, "link_inside": 4e9}) for pool in fleet.pools)
        }
    )
    fast = fleet.model_copy(
        update={
            "pools": tuple(
                p.model_copy(update={"link_outside": 1e9 * factor, "link_inside": 4e9 * factor}) for p in fleet.pools
            )
        }
    )
    assert step(fast) <= step(slow) * (1 + 1e-9)


@quick
@given(some_pools, st.floats(0, 50))
def test_prices_change_the_cost_and_nothing_else(pools, price):
    fleet = made(pools)
    dear = fleet.model_copy(
        update={"pools": tuple(pool.model_copy(update={"price_per_hour": price}) for pool in fleet.pools)}
    )
    one, other = Searcher(fleet, small_workload(24)).best(), Searcher(dear, small_workload(24)).best()
    assert one is not None
    assert other is not None
    assert other.step_seconds == one.step_seconds
    assert other.chips == one.chips
    assert other.price_per_hour == pytest.approx(price * sum(other.rented.values()))


@quick
@given(some_pools, st.randoms(use_true_random=False))
def test_names_and_order_of_the_pools_change_nothing(pools, random):
    fleet = made(pools)
    names = [f"{random.random():.9f} {number}" for number in range(len(pools))]
    renamed = [pool.model_copy(update={"name": name}) for pool, name in zip(fleet.pools, names, strict=True)]
    random.shuffle(renamed)
    assert step(fleet.model_copy(update={"pools": tuple(renamed)})) == pytest.approx(step(fleet), rel=1e-6)


@quick
@given(some_pools)
def test_no_chip_holds_more_than_its_memory(pools):
    found = Searcher(made(pools), small_workload(24)).best()
    assert found is not None
    check_memory(found)


def check_memory(found) -> None:
    plan = plan_values(found)
    for group in plan["groups"]:
        for stage in group["stages"]:
            assert sum(stage["memory_bytes"].values()) <= stage["memory_limit_bytes"] * (1 + 1e-9)
    assert sum(group["sequences"] for group in plan["groups"]) == plan["global_batch"]
    assert sum(plan["step_split_seconds"].values()) == pytest.approx(plan["step_seconds"], rel=1e-6)


def test_states_spread_over_free_memory_when_small_chips_cannot_hold_theirs():
    """H20s have room, 3090s have none: the states of the model lie where there is room, and all fits."""
    fleet = fleet_of(("roomy", "H20", 1, 8), ("small", "RTX-3090", 4, 8))
    workload = Workload(find_network("v2-lite"), 1e12, 4096, 512, "motley")
    found = Searcher(fleet, workload).best()
    assert found is not None
    check_memory(found)
    assert {name for group in found.groups for name in group.pools} == {"roomy", "small"}


def test_an_island_shares_gradients_and_weights_too_the_less_memory_there_is():
    """Two chips with a fast link: the less each may hold, the more they share; at last they share out the layers."""
    found = []
    for memory in ("6 GB", "2.2 GB", "2 GB", "1.7 GB"):
        lines = ["pools:"]
        for name, speed in (("a", 1.0), ("b", 0.5)):
            emulated = f"emulated: {{memory: {memory}, speed: {speed}}}"
            link = "link_outside: 8000 Gb/s, latency_outside: 1 us"
            lines.append(f"  - {{name: {name}, chip: RTX-3090, chips_per_node: 1, {link}, {emulated}}}")
        plan = Searcher(parse_fleet("\n".join(lines), "f"), Workload(shallow(), 1e9, 256, 32)).best()
        assert plan is not None
        check_memory(plan)
        groups = plan_values(plan)["groups"]
        found.append(({group["zero"] for group in groups}, len(groups)))
        assert sum(group["state_share"] for group in groups) == pytest.approx(1)
    assert found == [({1}, 2), ({2}, 2), ({3}, 2), ({1}, 1)]


@pytest.mark.parametrize(("room", "parts"), [((9, 9), (0.75, 0.25)), ((0.5, 9), (0.5, 0.5)), ((0.4, 0.6), (0.4, 0.6))])
def test_an_update_is_dealt_by_speed_within_room(room: tuple[float, float], parts: tuple[float, float]):
    seconds, found = divide_update([3.0, 1.0], room)
    assert found == pytest.approx(parts)
    assert seconds == pytest.approx(parts[1] if room[0] < 9 else 0.25)


@pytest.mark.parametrize("framework", ["deepseek", "motley"])
def test_each_option_is_the_line_that_the_slow_reference_computes(framework: str):
    workload = replace(small_workload(16), framework=framework)
    for pools in (
        [Pool(name="a", chip="A100", nodes=2, chips_per_node=2)],
        [
            Pool(name="a", chip="A100", nodes=1, chips_per_node=2),
            Pool(name="b", chip="V100", nodes=2, chips_per_node=2),
        ],
    ):
        options = group_options(pools, workload)
        assert options is not None
        random = np.random.default_rng(3)
        for index in random.choice(np.flatnonzero(options.own_states), 25):
            pipeline = explicit(options, int(index))
            costs = line(pipeline, workload)
            assert costs is not None
            for name in ("fixed", "slow", "once", "cross", "cross_each", "each", "update"):
                assert getattr(options, name)[index] == pytest.approx(getattr(costs, name), rel=1e-9), name
            assert options.hidden == costs.hidden
            assert options.rate[index] == pytest.approx(update_rate(pipeline, workload), rel=1e-9)


def explicit(options: GroupOptions, index: int) -> Pipeline:
    first = options.configs[0]
    pp = int(first.pp[index])
    stage_of = options.stage_of[:, index]
    cuts = tuple((int(np.flatnonzero(stage_of == s)[0]), int(np.flatnonzero(stage_of == s)[-1]) + 1) for s in range(pp))
    stages = tuple(int((options.pool_of[:pp, index] == i).sum()) for i in range(len(options.members)))
    return Pipeline(
        options.members,
        tuple(int(own.tp[index]) for own in options.configs),
        stages,
        cuts,
        int(first.dp[index]),
        int(first.ep[index]),
        int(first.micro_batch[index]),
        int(first.recompute[index]),
        int(first.schedule[index]),
        int(first.zero[index]),
    )


def test_a_model_that_cannot_fit_says_by_how_much_and_what_would_help():
    fleet = load_fleet(EXAMPLES / "lab.yaml")
    searcher = Searcher(fleet, Workload(find_network("v3"), 1e12, 4096, 1024, "motley"))
    with pytest.raises(InputError, match=r"v3 cannot fit lab: .* TiB too little; about .* more .* would hold it"):
        best_plan(searcher, "time", None)


def test_a_deadline_that_cannot_be_met_is_refused_and_a_loose_one_saves_money():
    fleet = fleet_of(("fast", "H100", 2, 8), ("slow", "V100", 2, 8))
    searcher = Searcher(fleet, Workload(find_network("small"), 1e11, 4096, 512, "motley"))
    _, fastest = best_plan(searcher, "time", None)
    with pytest.raises(InputError, match="cannot be met"):
        best_plan(searcher, "cost", fastest.seconds / 2)
    _, cheap = best_plan(searcher, "cost", None)
    assert cheap.cost <= fastest.cost
    rented, few = best_plan(searcher, "chips", 3 * fastest.seconds)
    assert few.chips < fastest.chips
    assert few.expected_seconds <= 3 * fastest.seconds
    assert rented.fleet.chips <= fleet.chips


def test_slow_links_make_islands_and_fast_ones_do_not():
    text = """
pools:
  - {name: a, chip: A100, nodes: 2, site: north}
  - {name: b, chip: A100, nodes: 2, site: south}
links:
  - {sites: [north, south], bandwidth: RATE, latency: 10 ms}
"""
    workload = Workload(find_network("v2-lite"), 1e12, 4096, 1024, "motley")
    slow = Searcher(parse_fleet(text.replace("RATE", "1 Gb/s"), "f"), workload).best()
    fast = Searcher(parse_fleet(text.replace("RATE", "3200 Gb/s"), "f"), workload).best()
    assert slow is not None
    assert fast is not None
    assert slow.inner_steps > 0
    assert fast.inner_steps == 0
    assert {group.island for group in slow.groups} == {0, 1}
    assert slow.step_seconds < 1.1 * fast.step_seconds


def test_an_even_split_waits_for_the_slowest_and_each_pool_has_its_worth():
    fleet = fleet_of(("fast", "H100", 1, 8), ("slow", "T4", 1, 8))
    searcher = Searcher(fleet, Workload(find_network("micro"), 1e10, 512, 512, "motley"))
    found = searcher.best()
    assert found is not None
    result = plan_comparison(searcher, found)["comparison"]
    assert result["even_split"]["relative_speed"] < 0.8
    worth = {entry["pool"]: entry["slower"] for entry in result["marginal_value"]}
    assert worth["fast"] > worth["slow"] >= 0


def test_shares_add_up_and_are_as_near_as_whole_numbers_allow():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [0, 5]) == [0, 7]
    random = np.random.default_rng(0)
    for _ in range(100):
        weights = random.integers(1, 100, 5).tolist()
        parts = apportion(50, weights)
        assert sum(parts) == 50
        assert all(abs(part - 50 * weight / sum(weights)) < 1 for part, weight in zip(parts, weights, strict=True))


def test_every_number_of_copies_is_tried_in_small_groups():
    assert SMALL_GROUP >= 16


@pytest.mark.parametrize("seed", range(6))
def test_workers_that_were_started_all_get_work_where_that_is_asked(seed: int) -> None:
    """However slow the slowest: the plan may be slower than one without it, never than the fleet's best."""
    chance = np.random.default_rng(seed)
    chips = ("A100", "RTX-3090", "V100", "T4")
    pools = [(f"pool{n}", str(chance.choice(chips)), 1, int(chance.integers(1, 4))) for n in range(3)]
    workload = Workload(shallow(), 1e9, 1024, 64, "motley")
    fleet = fleet_of(*pools)
    plan, best = Searcher(fleet, workload, all_chips=True).best(), Searcher(fleet, workload).best()
    assert plan is not None
    assert best is not None
    assert plan.chips == fleet.chips >= best.chips
    assert plan.step_seconds >= best.step_seconds * (1 - 1e-6)
