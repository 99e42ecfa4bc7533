"""A crew that cannot hold the model whole, and has no plan, makes one from a probe of its workers."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, command, losses
from spawned_ranks import run, run_ranks

from motley.fleet.inventory import Emulated, EmulatedLink, parse_fleet
from motley.fleet.links import Links, PairRate
from motley.fleet.probe import Machine, MatmulRate
from motley.parallel.auto_plan import ProbedRank, fleet_of, pools_of, seated, seats
from motley.parallel.layout import IslandLayout, Layout, PipelineGroup

MACHINE = Machine("cpu", "a chip", 4, 1, 10**10, 10**10, None, (MatmulRate("fp32", 64, 64, 64, 50.0),), 10.0, "fp32")
CHIP = ProbedRank("here", MACHINE, 2e9, "fp32", Emulated())
LINKS = Links(
    ("here", "here", "there"), (PairRate(0, 1, 1e-5, 2e9), PairRate(0, 2, 3e-4, 1e8)), ()
)  # a slow network between two hosts


def test_workers_alike_are_chips_of_one_pool_and_others_are_not() -> None:
    apart = [
        {"host": "there"}, {"memory": 1e9}, {"precision": "bf16"}, {"emulated": Emulated(speed=0.5)},
        {"emulated": Emulated(link=EmulatedLink(latency="5 ms"))},  # type: ignore[arg-type]
        {"machine": dataclasses.replace(MACHINE, name="another")},
    ]  # fmt: skip
    chips = [CHIP, *(dataclasses.replace(CHIP, **changed) for changed in apart), CHIP]
    assert pools_of(chips) == {"pool0": [0, 7], **{f"pool{number}": [number] for number in range(1, 7)}}


def test_hosts_alike_are_nodes_of_one_pool() -> None:
    there = dataclasses.replace(CHIP, host="there", precision="fp16")
    chips = [dataclasses.replace(CHIP, precision="fp16"), there, there, dataclasses.replace(CHIP, precision="fp16")]
    assert pools_of(chips) == {"pool0": [0, 3, 1, 2]}, "node after node"
    (pool,) = parse_fleet(fleet_of(chips, LINKS), "test").pools
    assert (pool.nodes, pool.per_node) == (2, 2)
    assert pool.precision == "fp32", "what a CPU computes fp16 through"
    assert pool.link_inside == 2e9


def test_the_fleet_says_what_workers_measured_and_pretend() -> None:
    pretended = Emulated(speed=0.25, link=EmulatedLink(bandwidth="10 MB/s", latency="40 ms"))  # type: ignore[arg-type]
    chips = [CHIP, CHIP, dataclasses.replace(CHIP, host="there", emulated=pretended)]
    first, second = parse_fleet(fleet_of(chips, LINKS), "test").pools
    assert (first.chips, first.memory_known, first.precision) == (2, 2e9, "fp32")
    assert first.flops("fp32") == 50e9
    assert (first.link_inside, first.link_outside, first.latency_outside) == (2e9, 1e8, pytest.approx(3e-4))
    assert second.flops("fp32") == 12.5e9
    assert (second.network_known, second.latency_outside) == (1e7, pytest.approx(0.04))


def test_seats_go_to_workers_of_the_pool_that_the_plan_meant() -> None:
    """Workers 0 and 2 are alike and make a pipeline, worker 1 is not."""
    chips = [CHIP, dataclasses.replace(CHIP, memory=4e9), CHIP]
    plan = {
        "pools": [{"pool": "pool1"}, {"pool": "pool0"}],
        "groups": [
            {"dp": 1, "stages": [{"pool": "pool1"}]},
            {"dp": 1, "stages": [{"pool": "pool0"}, {"pool": "pool0"}]},
        ],
    }
    assert seats(plan, chips) == [1, 0, 2]
    planned = Layout(
        (PipelineGroup(((0,),), (4,)), PipelineGroup(((1, 2),), (2, 2))), 1, memory=(4.0, 1.0, 2.0), rates=(3.0, 1.0)
    )
    (island,) = seated([IslandLayout((0, 1, 2), planned)], [1, 0, 2])
    assert [group.replicas for group in island.layout.groups] == [((1,),), ((0, 2),)]
    assert island.layout.memory == (1.0, 4.0, 2.0), "of worker 0, 1, 2"
    assert island.layout.rates == (3.0, 1.0), "of lanes, which stay in order"


# ------------------------------------------------------------------------------------------ the real command

DEEP = TINY | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 256, "moe_intermediate_size": 64}
NARROW = """
pools:
  - {{name: slow, chip: desktop-core, chips_per_node: 1, emulated: {{speed: 0.2, memory: {memory} MB}}}}
  - {{name: fast, chip: desktop-core, chips_per_node: 1, emulated: {{speed: 0.4, memory: {memory} MB}}}}
  - {{name: lame, chip: desktop-core, chips_per_node: 1, emulated: {{speed: 0.2, memory: {memory} MB}}}}
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("shape") / "config.json"
    file.write_text(json.dumps(DEEP))
    return file


def start(folder: Path, data: Path, deep: Path, memory: float, **more: Any) -> subprocess.CompletedProcess[str]:
    fleet = folder / "fleet.yaml"
    fleet.write_text(NARROW.format(memory=memory))
    settings = {"precision": "fp32", "batch_rows": 8, "steps": 8} | more
    arguments = command(folder / "run", data, deep, emulate=fleet, emulate_by="wait", **settings)
    return run_ranks(3, arguments)


@pytest.mark.slow(25)
def test_workers_too_small_for_the_model_make_a_plan_and_learn_what_one_process_learns(
    data: Path, deep: Path, tmp_path: Path
) -> None:
    done = start(tmp_path, data, deep, 6)
    assert done.returncode == 0, done.stderr
    assert "may hold 6 MB; so a plan is made from a probe of these ranks" in done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["chips"] == 3
    assert {pool["pool"]: pool["chips"] for pool in plan["pools"]} == {"pool0": 2, "pool1": 1}, "0 and 2 are alike"
    assert (tmp_path / "run" / "plan.html").is_file()
    assert len(parse_fleet((tmp_path / "run" / "fleet.yaml").read_text(), "kept").pools) == 2
    arguments = command(tmp_path / "alone", data, deep, precision="fp32", batch_rows=8, steps=8)
    assert run(arguments).returncode == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


@pytest.mark.slow(12)
def test_where_no_plan_fits_both_reasons_are_said(data: Path, deep: Path, tmp_path: Path) -> None:
    done = start(tmp_path, data, deep, 1)
    assert done.returncode != 0
    assert "may hold 1 MB; no plan fits either: model cannot fit 3 ranks" in done.stderr
    assert not (tmp_path / "run" / "plan.json").exists()


@pytest.mark.slow(8)
def test_with_islands_nothing_is_planned_and_the_need_is_said(data: Path, deep: Path, tmp_path: Path) -> None:
    done = start(tmp_path, data, deep, 6, islands="2:1")
    assert done.returncode != 0
    assert "a plan is made" not in done.stderr
    assert "choose a smaller --model" in done.stderr
