"""What the planner proposes for motley's own runtime, the runtime runs as it is written."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from commands import command, losses
from plans import PRETEND, plan_file, planned
from spawned_ranks import run_ranks
from tiny_models import DEEP

from motley.fleet.inventory import Fleet, parse_fleet
from motley.launch.torchrun import hosts_of, slots_of
from motley.model import ModelConfig
from motley.parallel.layout import islands_of_plan
from motley.parallel.number_formats import check_formats
from motley.parallel.zero.partition import held_bytes
from motley.train.metrics import read_metrics

CHIPS = ("desktop-core", "EPYC-9004-core", "A100", "RTX-3090", "V100", "T4")


def random_fleet(chance: random.Random, tight: bool) -> Fleet:
    """Up to three pools of up to three chips at up to two sites; `tight`: with little memory each."""
    sites = [chance.choice(["north", "south"]) for _ in range(chance.randint(1, 3))]
    lines = ["pools:"]
    for number, site in enumerate(sites):
        memory = f", memory: {chance.choice([2, 3, 5, 8])} MB" if tight else ""
        lines.append(
            f"  - {{name: pool{number}, chip: {chance.choice(CHIPS)}, chips_per_node: {chance.randint(1, 3)}, "
            f"site: {site}, emulated: {{speed: {chance.choice([0.1, 0.3, 1.0])}{memory}}}}}"
        )
    rate = chance.choice(["1 Mb/s", "100 Gb/s"])
    if len(set(sites)) > 1:
        lines += ["links:", f"  - {{sites: [north, south], bandwidth: {rate}, latency: 1 ms}}"]
    return parse_fleet("\n".join(lines), "random")


def assert_laid_out_as_planned(plan: dict[str, Any], config: ModelConfig) -> None:
    """Islands, stages, shares, ZeRO and formats are the plan's, and no worker keeps more than it has room for."""
    islands = islands_of_plan(plan, config)
    assert [rank for island in islands for rank in island.ranks] == list(range(plan["chips"]))
    assert len(slots_of(plan, hosts_of(plan, [f"{pool['pool']}=here" for pool in plan["pools"]]))) == plan["chips"]
    numbers = list(dict.fromkeys(group["island"] for group in plan["groups"]))
    assert len(islands) == len(numbers) == (2 if plan["inner_steps"] else 1)
    for number, island in zip(numbers, islands, strict=True):
        groups, layout = [group for group in plan["groups"] if group["island"] == number], island.layout
        layout.check(config, len(island.ranks))
        assert {layout.zero} == {group["zero"] for group in groups}
        assert layout.zero or len(island.ranks) == 1
        rates = iter(layout.rates)
        formats, limits = [], []
        for group, laid in zip(groups, layout.groups, strict=True):
            spans = [laid.stage_layers(stage) for stage in range(laid.stages)]
            laid_out = [[span.start, span.stop - 1] if span else None for span in spans]
            assert laid_out == [stage["layers"] for stage in group["stages"]]
            assert len(laid.replicas) == group["dp"]
            assert (laid.schedule, laid.micro_batch) == (group["schedule"], group["micro_batch"])
            assert laid.recompute == (group["recompute"] == "full")
            assert laid.expert_replicas == group["ep"]
            own = [next(rates) for _ in laid.replicas]
            assert sum(own) == pytest.approx(group["sequences"] / plan["step_seconds"])
            formats += list(laid.formats) * group["dp"]
            limits += [stage["memory_limit_bytes"] for stage in group["stages"]] * group["dp"]
        check_formats(formats, layout)
        for rank, limit in enumerate(limits):
            assert held_bytes(config, layout, rank, "muon").total <= limit
    assert sum(group["sequences"] for group in plan["groups"]) == plan["global_batch"]


@pytest.mark.parametrize("seed", range(40))
def test_what_is_planned_is_laid_out_as_the_plan_says(seed: int):
    chance = random.Random(seed)
    config = dataclasses.replace(
        DEEP,
        num_hidden_layers=chance.choice([3, 4, 6]),
        num_nextn_predict_layers=chance.choice([0, 1]),
        vocab_size=chance.choice([64, 4096]),
    )
    plan = planned(random_fleet(chance, tight=bool(seed % 2)), config, rows=chance.choice([6, 16, 40]))
    if plan is not None:
        assert_laid_out_as_planned(plan, config)


# ------------------------------------------------------------------------------------------ the real commands

APART = """
pools:
  - {name: near, chip: desktop-core, chips_per_node: 1, precision: fp32, site: here}
  - {name: far, chip: desktop-core, chips_per_node: 1, precision: fp32, site: there}
links:
  - {sites: [here, there], bandwidth: 1 Mb/s, latency: 10 ms}
"""


def pretrain(arguments: list[str]) -> str:
    done = run_ranks(2, arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow(15)
def test_a_plan_for_a_pretended_fleet_is_played_by_the_workers_that_it_names(
    data: Path, shape: Path, alone: Path, tmp_path: Path
):
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(PRETEND)
    file, plan = plan_file(tmp_path, PRETEND)
    out = tmp_path / "run"
    said = pretrain(command(out, data, shape, precision="fp32", plan=file, emulate=fleet, emulate_by="wait"))
    for rank, group in enumerate(plan["groups"]):
        assert f"rank {rank} emulates chip 0 of pool {group['pools'][0]}" in said
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.slow(15)
def test_a_plan_that_shares_gradients_and_weights_learns_what_one_process_learns(
    data: Path, shape: Path, alone: Path, tmp_path: Path
):
    file, _ = plan_file(tmp_path, PRETEND, zero=3)
    pretrain(command(tmp_path / "run", data, shape, precision="fp32", plan=file))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.slow(15)
def test_a_plan_with_islands_runs_in_rounds_of_its_length(data: Path, shape: Path, tmp_path: Path):
    file, plan = plan_file(tmp_path, APART)
    assert plan["inner_steps"] in (10, 30, 100, 300)
    plan["inner_steps"] = 10
    file.write_text(json.dumps(plan))
    pretrain(command(tmp_path / "run", data, shape, precision="fp32", plan=file))
    rounds = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "outer_step"]
    assert [record["steps"] for record in rounds] == [10, 10, 10]
    assert all(len(record["inner_steps"]) == 2 for record in rounds)
