"""A plan for a crew that was given none, where the model does not fit every worker whole: made from a probe.

every worker    measures what its chip multiplies, pairs of workers what their links carry
worker 0        pools of like workers ──▶ fleet.yaml ──▶ plan.json, both in the run folder, to look at and to keep
every worker    takes a seat that the plan has for a chip of its pool
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from motley.errors import InputError
from motley.files import write_json, write_text
from motley.fleet.device import Format
from motley.fleet.inventory import Emulated, parse_fleet
from motley.fleet.links import Links, links_between
from motley.fleet.probe import Machine, probe
from motley.fleet.units import rate_text
from motley.fleet.write import fleet_text
from motley.model import ModelConfig
from motley.plan.job import Job
from motley.plan.outcome import compared, spelled_out
from motley.plan.picture import plan_page
from motley.plan.search import Searcher
from motley.plan.shape import deepseek
from motley.progress import note
from motley.train.config import TrainingConfig
from motley.train.crew import Crew
from motley.train.launch import ranks_of_pools
from motley.train.layout import IslandLayout, islands_of_plan

PROBE_SECONDS = 4.0
FLEET_FILE, PLAN_FILE = "fleet.yaml", "plan.json"


@dataclass(frozen=True)
class Chip:
    """What one worker says of itself.

    Attributes:
        host: where it runs.
        machine: what it measured.
        memory: bytes that it may hold.
        precision: what it will compute in.
        emulated: what it pretends to be.
    """

    host: str
    machine: Machine
    memory: float
    precision: Format
    emulated: Emulated

    @property
    def kind(self) -> tuple[Any, ...]:
        """Workers alike in this are chips of one pool."""
        pretended = (self.emulated.speed, self.emulated.link.bandwidth, self.emulated.link.latency)
        return (self.host, self.machine.device, self.machine.name, round(self.memory / 1e6), self.precision, *pretended)


def may_be_planned(config: TrainingConfig) -> bool:
    """Whether the settings leave it open who holds what."""
    return config.plan is None and config.islands == "1" and not config.live


def planned_from_probe(
    config: TrainingConfig,
    shape: ModelConfig,
    crew: Crew,
    folder: Path,
    memory: float,
    precision: Format,
    emulated: Emulated,
    why: InputError,
) -> tuple[Path, list[IslandLayout]]:
    """(the plan's file, the layout that it asks for). Every worker calls this.

    Args:
        config: settings of the stage.
        shape: of the model.
        crew: all workers.
        folder: of the run, for the files.
        memory: bytes that this worker may hold.
        precision: what this worker computes in.
        emulated: what this worker pretends to be.
        why: what is wrong without a plan.

    Raises InputError where no plan fits these workers, or the best leaves some of them without work.
    """
    short = str(why).partition(";")[0]
    if crew.leads:
        note(f"{short}; so a plan is made from a probe of these workers")
    machine = probe(PROBE_SECONDS, crew.device, grid=True)
    chips: list[Chip] = crew.all_values(Chip(socket.gethostname(), machine, memory, precision, emulated))
    links = links_between([chip.host for chip in chips], torch.device("cpu"))  # by way of the host, as in training

    def make() -> dict[str, Any]:
        text = fleet_of(chips, links)
        tokens = config.steps * config.batch_rows * config.seq_len
        job = Job(deepseek(shape, "model"), tokens, config.seq_len, config.batch_rows)
        searcher = Searcher(parse_fleet(text, "these workers"), job, all_chips=True)
        found = searcher.best()
        if found is None:
            raise InputError(f"{short}; no plan fits either: {searcher.refusal()}")
        plan = spelled_out(found) | {"objective": "time"} | compared(searcher, found)
        write_text(folder / FLEET_FILE, text)
        write_json(folder / PLAN_FILE, plan)
        write_text((folder / PLAN_FILE).with_suffix(".html"), plan_page(plan))
        if plan["chips"] < crew.size:  # so few rows that some worker gets none
            raise InputError(
                f"{short}; the best plan has work for {plan['chips']} of {crew.size} workers only, so give more "
                "--batch-rows, or start fewer"
            )
        return plan

    plan = crew.led(make)
    if crew.leads:
        stages = [[stage["pool"] for stage in team["stages"]] for team in plan["teams"]]
        said = "; ".join(
            f"{' then '.join(pools)} take {team['sequences']} rows"
            for pools, team in zip(stages, plan["teams"], strict=True)
        )
        note(f"the plan, {folder / PLAN_FILE}: {said}; about {plan['step_seconds']:.3g} s a step")
    return folder / PLAN_FILE, seated(islands_of_plan(plan, shape), seats(plan, chips))


def pools_of(chips: Sequence[Chip]) -> dict[str, list[int]]:
    """Workers of each pool, by the pool's name."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for rank, chip in enumerate(chips):
        kinds.setdefault(chip.kind, []).append(rank)
    return {f"pool{number}": ranks for number, ranks in enumerate(kinds.values())}


def fleet_of(chips: Sequence[Chip], links: Links) -> str:
    """The fleet file of these workers: each pool a node, joined to others as slowly as any two hosts are."""
    pools, everyone = [], range(len(chips))
    across = links.slowest(everyone, same_host=False) or links.slowest(everyone, same_host=True)
    for name, ranks in pools_of(chips).items():
        first = chips[ranks[0]]
        (pool,) = yaml.safe_load(fleet_text([first.machine]))["pools"]
        pool |= {"name": name, "nodes": 1, "chips_per_node": len(ranks), "precision": first.precision}
        pool["measured"]["memory"] = f"{first.memory / 1e6:f} MB"
        if inside := links.slowest(ranks, same_host=True):
            pool["link_inside"] = rate_text(inside[0])
        pretended = first.emulated.link
        rate, latency = pretended.bandwidth and pretended.bandwidth * len(ranks), pretended.latency
        if across:
            rate, latency = rate or across[0], latency or across[1]
        if rate:
            pool["link_outside"] = rate_text(rate)
        if latency:
            pool["latency_outside"] = f"{1e6 * latency:f} us"
        if first.emulated.speed < 1:
            pool["emulated"] = {"speed": first.emulated.speed}
        pools.append(pool)
    return yaml.safe_dump({"name": f"{len(chips)} workers", "pools": pools}, sort_keys=False)


def seats(plan: Mapping[str, Any], chips: Sequence[Chip]) -> list[int]:
    """The worker that takes each seat of the plan, seats in the order of `from_plan`."""
    taken: dict[int, int] = {}
    workers = pools_of(chips)
    for pool, places in ranks_of_pools(plan).items():
        taken |= dict(zip(places, workers[pool], strict=True))
    return [taken[place] for place in range(len(chips))]


def seated(islands: Sequence[IslandLayout], workers: Sequence[int]) -> list[IslandLayout]:
    """The one island of a plan with `workers` on its seats, instead of the worker of each seat's number."""
    (island,) = islands
    layout = island.layout
    teams = tuple(
        replace(team, lanes=tuple(tuple(workers[seat] for seat in lane) for lane in team.lanes))
        for team in layout.teams
    )
    memory = tuple(layout.memory[workers.index(rank)] for rank in range(len(layout.memory)))
    return [replace(island, layout=replace(layout, teams=teams, memory=memory))]
