"""Make a plan from a probe when none was given and some rank has no room for the whole model.

every rank      measures what its chip multiplies, pairs of ranks what their links carry
rank 0          pools of like ranks ──▶ fleet.yaml ──▶ plan.json, both in the run folder, to look at and to keep
every rank      takes a position that the plan has for a chip of its pool
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from motley.errors import InputError
from motley.files import write_text
from motley.fleet.device import Format
from motley.fleet.inventory import Emulated, parse_fleet
from motley.fleet.links import Links, links_between
from motley.fleet.probe import Machine, most_seconds, probe
from motley.fleet.units import rate_text
from motley.fleet.write import fleet_text
from motley.model import ModelConfig
from motley.parallel.communicator import PREPARING_SECONDS, Communicator
from motley.parallel.layout import IslandLayout, islands_of_plan, ranks_of_pools, side_by_side
from motley.parallel.zero.partition import NUMBER_BYTES, held_bytes
from motley.plan.network.spec import deepseek
from motley.plan.report.html import write_plan
from motley.plan.report.plan_file import plan_comparison, plan_values
from motley.plan.search.search import Searcher
from motley.plan.workload import Workload
from motley.progress import note
from motley.train.config import TrainingConfig

PROBE_SECONDS = 4.0
MOST_POOLS = 12  # with each more the search takes twice as long
FLEET_FILE, PLAN_FILE = "fleet.yaml", "plan.json"


@dataclass(frozen=True)
class ProbedRank:
    """What one rank says of itself.

    Attributes:
        host: that it runs on.
        machine: what it measured.
        memory: bytes that it may hold.
        precision: what it will compute in.
        emulated: the chip that it emulates.
    """

    host: str
    machine: Machine
    memory: float
    precision: Format
    emulated: Emulated

    @property
    def kind(self) -> tuple[Any, ...]:
        """Ranks alike in this, and with as many like them on their host, are chips of one pool."""
        emulated = (self.emulated.speed, self.emulated.link.bandwidth, self.emulated.link.latency)
        return (
            self.machine.device,
            self.machine.name,
            self.machine.chip,
            round(self.memory / 1e6),
            self.precision,
            *emulated,
        )


def may_be_planned(config: TrainingConfig) -> bool:
    """Whether settings beside a plan leave it open who holds what."""
    return config.islands == "1" and not config.elastic


def planned_from_probe(
    config: TrainingConfig,
    shape: ModelConfig,
    comm: Communicator,
    folder: Path,
    memory: float,
    precision: Format,
    emulated: Emulated,
    why: InputError,
) -> tuple[Path, list[IslandLayout]]:
    """(the plan's file, the layout that it asks for). Every rank calls this.

    Args:
        config: settings of the stage.
        shape: of the model.
        comm: all ranks.
        folder: of the run, for the files.
        memory: bytes that this rank may hold.
        precision: what this rank computes in.
        emulated: the chip that this rank emulates.
        why: what is wrong without a plan.

    Raises InputError where no plan fits these ranks, or the best leaves some of them without work.
    """
    short = str(why).partition(";")[0]
    if comm.leads:
        note(f"{short}; so a plan is made from a probe of these ranks")
    machine = probe(PROBE_SECONDS, comm.device, grid=True, shown=comm.leads)
    own = ProbedRank(socket.gethostname(), machine, memory, precision, emulated)
    with comm.waiting(max(comm.timeout, PREPARING_SECONDS) + most_seconds(PROBE_SECONDS)):
        chips: list[ProbedRank] = comm.all_values(own)
        hosts = [chip.host for chip in chips]
        # Messages between two ranks go by way of the host, in training too.
        links = comm.talk("measuring links", lambda: links_between(hosts, torch.device("cpu")))

    def make() -> dict[str, Any]:
        if len(pools_of(chips)) > MOST_POOLS:
            raise InputError(
                f"{short}; ranks of {len(pools_of(chips))} kinds are too many to plan for at a start: write a fleet "
                "file of them (`motley fleet probe` under torchrun) and give its plan as --plan"
            )
        text = fleet_of(chips, links)
        tokens = config.steps * config.batch_rows * config.seq_len
        kept = held_bytes(
            shape, side_by_side(1, shape.num_hidden_layers, 1), 0, config.optimizer, moments=config.moments
        )
        each = kept.optimizer / (kept.weights / NUMBER_BYTES)
        job = Workload(deepseek(shape, "model"), tokens, config.seq_len, config.batch_rows, optimizer_bytes=each)
        searcher = Searcher(parse_fleet(text, "these ranks"), job, all_chips=True)
        found = searcher.best()
        if found is None:
            raise InputError(f"{short}; no plan fits either: {searcher.refusal()}")
        plan: dict[str, Any] = {**plan_values(found), "objective": "time", **plan_comparison(searcher, found)}
        if found.chips < comm.size:  # so few rows that some rank gets none
            raise InputError(
                f"{short}; the best plan has work for {found.chips} of {comm.size} ranks only, so give more "
                "--batch-rows, or start fewer"
            )
        write_text(folder / FLEET_FILE, text)
        write_plan(folder / PLAN_FILE, plan)
        return plan

    plan = comm.led(make)
    if comm.leads:
        said = "; ".join(
            f"{' then '.join(stage['pool'] for stage in group['stages'])} take {group['sequences']} rows"
            for group in plan["groups"]
        )
        note(f"the plan, {folder / PLAN_FILE}: {said}; about {plan['step_seconds']:.3g} s a step")
    return folder / PLAN_FILE, seated(islands_of_plan(plan, shape), seats(plan, chips))


def pools_of(chips: Sequence[ProbedRank]) -> dict[str, list[int]]:
    """Ranks of each pool, one node after another, by the pool's name."""
    nodes: dict[tuple[Any, ...], list[int]] = {}
    for rank, chip in enumerate(chips):
        nodes.setdefault((chip.host, chip.kind), []).append(rank)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for (_, kind), ranks in nodes.items():
        alike.setdefault((kind, len(ranks)), []).extend(ranks)
    return {f"pool{number}": ranks for number, ranks in enumerate(alike.values())}


def fleet_of(chips: Sequence[ProbedRank], links: Links) -> str:
    """The fleet file of these ranks; nodes, and pools, are joined as slowly as any two hosts are."""
    pools, everyone = [], range(len(chips))
    across = links.slowest(everyone, same_host=False) or links.slowest(everyone, same_host=True)
    for name, ranks in pools_of(chips).items():
        first = chips[ranks[0]]
        (pool,) = yaml.safe_load(fleet_text([first.machine]))["pools"]
        nodes = len({chips[rank].host for rank in ranks})
        # A format that a chip only emulates is computed through fp32.
        precision = first.precision if first.precision in pool["measured"]["matmul"] else "fp32"
        pool |= {"name": name, "nodes": nodes, "chips_per_node": len(ranks) // nodes, "precision": precision}
        pool["measured"]["memory"] = f"{first.memory / 1e6:f} MB"
        if inside := links.slowest(ranks, same_host=True) or links.slowest(everyone, same_host=True):
            pool["link_inside"] = rate_text(inside[0])
        emulated = first.emulated.link
        rate, latency = emulated.bandwidth and emulated.bandwidth * (len(ranks) // nodes), emulated.latency
        if across:
            rate, latency = rate or across[0], latency or across[1]
        if rate:
            pool["link_outside"] = rate_text(rate)
        if latency:
            pool["latency_outside"] = f"{1e6 * latency:f} us"
        if first.emulated.speed < 1:
            pool["emulated"] = {"speed": first.emulated.speed}
        pools.append(pool)
    return yaml.safe_dump({"name": f"{len(chips)} ranks", "pools": pools}, sort_keys=False)


def seats(plan: Mapping[str, Any], chips: Sequence[ProbedRank]) -> list[int]:
    """The rank at each position of the plan, positions in the order of `from_plan`."""
    taken: dict[int, int] = {}
    by_pool = pools_of(chips)
    for pool, positions in ranks_of_pools(plan).items():
        taken |= dict(zip(positions, by_pool[pool], strict=True))
    return [taken[position] for position in range(len(chips))]


def seated(islands: Sequence[IslandLayout], ranks: Sequence[int]) -> list[IslandLayout]:
    """The one island of a plan with `ranks` at its positions, instead of the rank of each position's number."""
    (island,) = islands
    layout = island.layout
    groups = tuple(
        replace(group, replicas=tuple(tuple(ranks[position] for position in replica) for replica in group.replicas))
        for group in layout.groups
    )
    memory = tuple(layout.memory[ranks.index(rank)] for rank in range(len(layout.memory)))
    return [replace(island, layout=replace(layout, groups=groups, memory=memory))]
