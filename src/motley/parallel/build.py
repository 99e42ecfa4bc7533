"""Build the strategy of every rank: join the process group, compare settings, choose a layout, distribute weights.

rank 0     opens the run folder, prepares data, loads or draws the weights     ──▶ shares what it found
others     wait, then check that they see the same code, data and settings     ◀──
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from motley import __version__
from motley.errors import InputError
from motley.fleet.device import Format, choose_device
from motley.fleet.inventory import Emulated
from motley.fleet.probe import GLANCE_SECONDS, Machine, glance, most_seconds
from motley.model import ModelConfig, Transformer
from motley.parallel.auto_plan import may_be_planned, planned_from_probe
from motley.parallel.communicator import Communicator, LinkModel, join
from motley.parallel.expert.placement import experts_by_memory
from motley.parallel.layout import IslandLayout, Zero, island_of, islands_of_plan, islands_side_by_side
from motley.parallel.memory_fit import (
    MemoryBudgets,
    budget,
    check_gathering,
    dealt,
    held_already,
    within_memory,
)
from motley.parallel.number_formats import asked_format, number_formats
from motley.parallel.rank import Ranks
from motley.plan.network.registry import trainable
from motley.plan.read_plan import read_plan
from motley.progress import note
from motley.train.chip_kind import kind_of_chip
from motley.train.config import TrainingConfig
from motley.train.input_checks import fingerprint
from motley.train.job import Job

USUAL_ROUND = 30
"""Steps between two outer steps where nothing says how many."""
OWN = ("out", "device", "data", "model", "plan", "micro_batch", "precision")
"""Settings that may differ: paths, what rank 0 decides for all, and each chip's number format. Data, model and shape
are compared themselves (input_checks.py)."""
USUAL_ZERO: Zero = 1

Config = TypeVar("Config", bound=TrainingConfig)

if TYPE_CHECKING:
    from motley.parallel.diloco.diloco import Diloco


def meet(config: TrainingConfig) -> Communicator:
    """Join the other ranks, if torchrun started some; each on a device of its own."""
    device = choose_device(config.device)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return join(device, config.comm_timeout)


def sources() -> str:
    """A fingerprint of this program: versions alone do not tell an edited file."""
    found, folder = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(folder.rglob("*.py")):
        found.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return found.hexdigest()[:12]


def facts(config: TrainingConfig, data: Path) -> dict[str, str]:
    """What must be the same on all ranks: program, data and settings."""
    settings = {name: str(value) for name, value in dataclasses.asdict(config).items() if name not in OWN}
    versions = {"motley": __version__, "source code": sources(), "PyTorch": torch.__version__.split("+")[0]}
    return {**versions, "data": fingerprint(data), **settings}


def plan_of(config: TrainingConfig) -> dict[str, Any] | None:
    """The plan that the settings name, if any. Raises InputError for a file that is none."""
    if config.plan is None:
        return None
    return read_plan(config.plan)


PLANNED = {"model": "model", "seq_len": "seq_len", "batch_rows": "global_batch"}
"""Settings that a plan has an opinion on, and what it calls them."""
OF_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""What a network takes from its tokenizer, which no plan knows."""


def as_planned(
    config: Config, plan: Mapping[str, Any] | None, leads: bool, trained: ModelConfig | None = None
) -> Config:
    """The settings, with what the plan says of model, context and batch where they are left at their defaults.

    What is taken from it, and what differs from it, is printed by the rank that `leads`.

    trained: the network of the weights that fine-tuning starts from: a plan names a network, never its weights, so that
    --model is not taken from it but compared; None: the model may be the plan's.
    """
    taken: dict[str, Any] = {}
    defaults = config.defaults()
    for name in (name for name in PLANNED if name in defaults):
        own, theirs = getattr(config, name), (plan or {}).get(PLANNED[name])
        if theirs is None or own == theirs:
            continue
        if name == "model" and ((known := trainable(theirs)) is None or (trained and _alike(known, trained))):
            continue
        if own == defaults[name] and not (name == "model" and trained):
            taken[name] = theirs
        elif leads:
            option = f"--{name.replace('_', '-')}"
            note(f"{option} {own}, although the plan was made for {theirs}: its times will not be those of this run")
    if taken and leads:
        note("from the plan: " + ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in taken.items()))
    return dataclasses.replace(config, **taken)


def _alike(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two networks differ in nothing but what their tokenizers say."""
    return dataclasses.replace(one, **{name: getattr(other, name) for name in OF_TOKENIZER}) == other


def islands_for(
    config: TrainingConfig, shape: ModelConfig, comm: Communicator, plan: dict[str, Any] | None
) -> tuple[list[IslandLayout], int]:
    """(the islands that the settings ask for, steps in a round).

    Raises InputError where they do not fit the model or the number of ranks.
    """
    if plan is None:
        usual: Zero = 0 if config.elastic else USUAL_ZERO
        layers, zero = shape.num_hidden_layers, usual if config.zero is None else config.zero
        islands = islands_side_by_side(config.islands, comm.size, layers, config.micro_batch, zero)
        return islands, config.sync_every or USUAL_ROUND
    if config.islands != "1":
        raise InputError(f"--islands {config.islands} beside --plan: the plan says itself which islands there are")
    if config.zero is not None:
        raise InputError(f"--zero {config.zero} beside --plan: the plan says itself what ranks share")
    islands = islands_of_plan(plan, shape)
    planned = sum(len(island.ranks) for island in islands)
    if planned != comm.size:
        raise InputError(f"the plan is for {planned} ranks, but {comm.size} were started")
    return islands, config.sync_every or plan.get("inner_steps") or USUAL_ROUND


def check_devices(islands: Sequence[IslandLayout], comm: Communicator) -> None:
    """Raises InputError, on every rank, where copies of a model would drift apart: each kind rounds in its own way.

    What has never run is said aloud.
    """
    kinds: list[str] = comm.all_values(kind_of_chip(comm.device))
    for island in islands:
        first = island.ranks[0]
        other = next((rank for rank in island.ranks if kinds[rank] != kinds[first]), None)
        if island.layout.zero == 0 and len(island.layout.replicas) > 1 and other is not None:
            raise InputError(
                f"with ZeRO 0 every rank updates its own copy of the model, and ranks {first} ({kinds[first]}) and "
                f"{other} ({kinds[other]}) round differently, so that copies would drift apart; choose --zero 1, where "
                "each weight is updated once and sent to the others, without --elastic"
            )
    piped = any(group.stages > 1 for island in islands for group in island.layout.groups)
    if comm.leads and (comm.by_host or (piped and comm.device.type != "cpu")):
        note(
            "pipelines and --elastic on GPUs, and jobs whose ranks share a GPU or have CPUs too, have only been tested "
            "on CPUs: compare losses of a few steps with those of one process alone"
        )


class Emulation(Protocol):
    """Makes the ranks of this machine as unequal as the chips of a fleet (`--emulate`). All ranks make each call."""

    def chip(self, comm: Communicator, plan: Mapping[str, Any] | None) -> Emulated:
        """What this rank emulates; called first. Raises InputError where the fleet does not fit the ranks."""
        ...

    def links(self, comm: Communicator) -> LinkModel | None:
        """Delays of the emulated links; None where there are none, or where the system makes the links slow."""
        ...

    def apply(self, strategy: Ranks, comm: Communicator) -> None:
        """Slow this rank down and let it fail as its chip does; called when it is ready to train."""
        ...


def build_strategy(
    job: Job[Any],
    comm: Communicator,
    machine: Machine | None,
    weights: Callable[[torch.device], Transformer] | None,
    emulation: Emulation | None = None,
) -> "Ranks | Diloco":
    """This rank, at its coordinates in the layout and with its weights. Every rank calls this.

    Args:
        job: the prepared stage.
        comm: all ranks.
        machine: what was measured before, if anything.
        weights: makes the whole model on a device; called on rank 0 only. None: its state comes later.
        emulation: makes the ranks unequal, where the settings ask for it.

    Raises InputError, on every rank, where they cannot train so.
    """
    config, shape = job.config, job.shape
    if config.emulate and emulation is None:
        raise InputError("the setting `emulate` needs an `emulation` beside the settings, as motley.cli passes one")
    plan = comm.led(lambda: plan_of(config))
    emulated = emulation.chip(comm, plan) if emulation else Emulated()
    islands, every = comm.led(lambda: islands_for(config, shape, comm, plan))
    comm.agree({**facts(config, job.data), "shape": str(shape)})
    check_gathering(islands, shape, config.optimizer, comm)
    check_devices(islands, comm)
    own = island_of(islands, comm.rank)
    asked = asked_format(config.precision, emulated.precision, own.layout, own.ranks.index(comm.rank))
    formats = number_formats(asked, comm, job.run, lambda: job.run.machine(comm.device, machine))
    budgets = comm.all_values(budget(comm.device, emulated.memory))
    programs = comm.all_values(held_already(comm.device))
    if plan is None:
        islands = _by_speed_and_memory(islands, shape, config, comm, budgets, formats, emulated.speed)
        config, islands = _shrunk_or_planned(islands, job, comm, budgets, formats, emulated)
    else:
        islands = _with_experts_that_fit(islands, shape, config, budgets, formats, comm.leads)
        islands = within_memory(islands, shape, config, comm, budgets, formats, planned=True, shrink=False)
    own = island_of(islands, comm.rank)
    if emulation:
        comm = dataclasses.replace(comm, links=emulation.links(comm))
    group = comm.part([island.ranks for island in islands]) if len(islands) > 1 else comm
    ranks = Ranks(shape, config, own.layout, group, [formats[rank] for rank in own.ranks])
    ranks.budgets = MemoryBudgets(
        own.ranks, [budgets[rank] for rank in own.ranks], [programs[rank] for rank in own.ranks]
    )
    strategy = _joined(ranks, comm, islands, every) if len(islands) > 1 else ranks
    if weights is not None:
        _distribute(weights, strategy, comm)
    if emulation:
        emulation.apply(ranks, comm)
    return strategy


def _by_speed_and_memory(
    islands: list[IslandLayout],
    shape: ModelConfig,
    config: TrainingConfig,
    comm: Communicator,
    budgets: Sequence[float],
    formats: Sequence[Format],
    speed: float,
) -> list[IslandLayout]:
    """Without a plan: rows to begin with, and what is kept once, by a short measurement of each rank's speed."""
    own = speed * glance(comm.device, formats[comm.rank])
    with comm.waiting(comm.timeout + most_seconds(GLANCE_SECONDS)):
        speeds = comm.all_values(own)
    return dealt(islands, shape, config, budgets, speeds)


def _shrunk_or_planned(
    islands: list[IslandLayout],
    job: Job[Any],
    comm: Communicator,
    budgets: Sequence[float],
    formats: Sequence[Format],
    emulated: Emulated,
) -> tuple[Any, list[IslandLayout]]:
    """Without a plan: (settings, islands) with micro-batches that fit, or those of a plan made from a probe."""
    config, shape = job.config, job.shape
    try:
        return config, within_memory(islands, shape, config, comm, budgets, formats, planned=False, shrink=True)
    except InputError as error:
        if comm.alone or not may_be_planned(config):
            raise
        file, islands = planned_from_probe(
            config, shape, comm, job.run.folder, budgets[comm.rank], formats[comm.rank], emulated, error
        )
    config = dataclasses.replace(config, plan=file)
    check_devices(islands, comm)
    return config, within_memory(islands, shape, config, comm, budgets, formats, planned=True, shrink=True)


def _with_experts_that_fit(
    islands: list[IslandLayout],
    shape: ModelConfig,
    config: TrainingConfig,
    budgets: Sequence[float],
    formats: Sequence[Format],
    leads: bool,
) -> list[IslandLayout]:
    """A plan's islands with experts moved off ranks that have no room for theirs; who leads says so."""
    fitting = experts_by_memory(islands, shape, config, budgets, formats)
    for before, after in zip(islands, fitting, strict=True):
        for planned, group in zip(before.layout.groups, after.layout.groups, strict=True):
            if leads and group.experts != planned.experts:
                sharing = [before.ranks[rank] for replica in group.replicas for rank in replica]
                note(
                    f"ranks {sharing} share experts as {list(group.experts)} instead of {list(planned.experts)}: one "
                    "has no room for as many as the plan gives it"
                )
    return fitting


def _joined(ranks: Ranks, comm: Communicator, islands: Sequence[IslandLayout], every: int) -> "Diloco":
    """The strategy of an island's ranks, joined with the other islands."""
    from motley.parallel.diloco.diloco import Diloco  # only where there are islands

    return Diloco(ranks, comm, [island.ranks for island in islands], [island.speed for island in islands], every)


def _distribute(weights: Callable[[torch.device], Transformer], strategy: "Ranks | Diloco", comm: Communicator) -> None:
    """Make the whole model on rank 0; every rank takes what it holds of it."""
    whole: Transformer | None = None

    def make() -> None:
        nonlocal whole
        whole = weights(torch.device("cpu"))

    comm.led(make)
    strategy.take_state(None if whole is None else (dict(whole.state_dict()), {}))
