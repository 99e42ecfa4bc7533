"""How a training stage begins on every worker: the crew meets, agrees, and each takes its place.

worker 0   opens the run folder, prepares data, loads or draws the weights     ──▶ shares what it found
others     wait, then check that they see the same code, data and settings     ◀──
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from motley import __version__
from motley.errors import InputError
from motley.files import read_json
from motley.fleet.device import Format, choose_device
from motley.fleet.inventory import Emulated
from motley.fleet.probe import GLANCE_SECONDS, Machine, glance, most_seconds
from motley.model import ModelConfig, Transformer
from motley.parallel.auto_plan import may_be_planned, planned_from_probe
from motley.parallel.communicator import Crew, LinkModel, join_crew
from motley.parallel.diloco.diloco import USUAL_ROUND, Island
from motley.parallel.expert.placement import experts_by_memory
from motley.parallel.layout import IslandLayout, Zero, island_of, islands_of_plan, islands_side_by_side
from motley.parallel.memory_fit import (
    Budgets,
    budget,
    check_gathering,
    check_memory,
    dealt,
    held_already,
    within_memory,
)
from motley.parallel.own_inputs import fingerprint
from motley.parallel.rank import Worker
from motley.plan.network.registry import trainable
from motley.progress import note
from motley.train.chip_kind import kind_of_chip
from motley.train.config import TrainingConfig
from motley.train.mixed_precision import asked_format, number_formats
from motley.train.run_folder import Run

OWN = ("out", "device", "data", "model", "plan", "micro_batch", "precision")
"""Settings that may differ: paths, what worker 0 decides for all, and each chip's number format. Data, model and shape
are compared themselves (own.py)."""
USUAL_ZERO: Zero = 1

Config = TypeVar("Config", bound=TrainingConfig)


def meet(config: TrainingConfig) -> Crew:
    """Find the other workers, if torchrun started some; each on a device of its own."""
    device = choose_device(config.device)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return join_crew(device, config.patience)


def sources() -> str:
    """A fingerprint of this program: versions alone do not tell an edited file."""
    found, folder = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(folder.rglob("*.py")):
        found.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return found.hexdigest()[:12]


def facts(config: TrainingConfig, data: Path) -> dict[str, str]:
    """What must be the same on all workers: program, data and settings."""
    settings = {name: str(value) for name, value in dataclasses.asdict(config).items() if name not in OWN}
    versions = {"motley": __version__, "source code": sources(), "PyTorch": torch.__version__.split("+")[0]}
    return {**versions, "data": fingerprint(data), **settings}


def plan_of(config: TrainingConfig) -> dict[str, Any] | None:
    """The plan that the settings name, if any. Raises InputError for a file that is none."""
    if config.plan is None:
        return None
    values = read_json(config.plan)
    if not isinstance(values, dict) or not {"teams", "pools"} <= set(values):
        raise InputError(f"{config.plan} is no plan as `motley plan --out` writes it")
    return values


PLANNED = {"model": "model", "seq_len": "seq_len", "batch_rows": "global_batch"}
"""Settings that a plan has an opinion on, and what it calls them."""
OF_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""What a network takes from its tokenizer, which no plan knows."""


def as_planned(
    config: Config, plan: Mapping[str, Any] | None, leads: bool, trained: ModelConfig | None = None
) -> Config:
    """The settings, with what the plan says of model, context and batch where they are left at their defaults.

    What is taken from it, and what differs from it, is said aloud by the worker that `leads`.

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
    config: TrainingConfig, shape: ModelConfig, crew: Crew, plan: dict[str, Any] | None
) -> tuple[list[IslandLayout], int]:
    """(the islands that the settings ask for, steps in a round).

    Raises InputError where they do not fit the model or the crew.
    """
    if plan is None:
        usual: Zero = 0 if config.live else USUAL_ZERO
        layers, zero = shape.num_hidden_layers, usual if config.zero is None else config.zero
        islands = islands_side_by_side(config.islands, crew.size, layers, config.micro_batch, zero)
        return islands, config.sync_every or USUAL_ROUND
    if config.islands != "1":
        raise InputError(f"--islands {config.islands} beside --plan: the plan says itself which islands there are")
    if config.zero is not None:
        raise InputError(f"--zero {config.zero} beside --plan: the plan says itself what workers share")
    islands = islands_of_plan(plan, shape)
    workers = sum(len(island.ranks) for island in islands)
    if workers != crew.size:
        raise InputError(f"the plan is for {workers} workers, but {crew.size} were started")
    return islands, config.sync_every or plan.get("inner_steps") or USUAL_ROUND


def check_devices(islands: Sequence[IslandLayout], crew: Crew) -> None:
    """Raises InputError, on every worker, where copies of a model would drift apart: each kind rounds in its own way.

    What has never run is said aloud.
    """
    kinds: list[str] = crew.all_values(kind_of_chip(crew.device))
    for island in islands:
        first = island.ranks[0]
        other = next((rank for rank in island.ranks if kinds[rank] != kinds[first]), None)
        if island.layout.zero == 0 and len(island.layout.lanes) > 1 and other is not None:
            raise InputError(
                f"with ZeRO 0 every worker updates its own copy of the model, and workers {first} ({kinds[first]}) and "
                f"{other} ({kinds[other]}) round differently, so that copies would drift apart; choose --zero 1, where "
                "each weight is updated once and sent to the others, without --live"
            )
    piped = any(team.stages > 1 for island in islands for team in island.layout.teams)
    if crew.leads and (crew.by_host or (piped and crew.device.type != "cpu")):
        note(
            "pipelines and --live on GPUs, and crews that share a GPU or have CPUs too, have only been tested on "
            "CPUs: compare losses of a few steps with those of one worker alone"
        )


class Emulation(Protocol):
    """Makes the ranks of this machine as unequal as the chips of a fleet (`--emulate`). All ranks make each call."""

    def chip(self, crew: Crew, plan: Mapping[str, Any] | None) -> Emulated:
        """What this rank emulates; called first. Raises InputError where the fleet does not fit the ranks."""
        ...

    def links(self, crew: Crew) -> LinkModel | None:
        """Delays of the emulated links; None where there are none, or where the system makes the links slow."""
        ...

    def apply(self, worker: Worker, crew: Crew) -> None:
        """Slow this rank down and let it fail as its chip does; called when it is ready to train."""
        ...


def employ(
    config: TrainingConfig,
    shape: ModelConfig,
    crew: Crew,
    run: Run,
    data: Path,
    machine: Machine | None,
    weights: Callable[[torch.device], Transformer] | None,
    emulation: Emulation | None = None,
) -> Island:
    """This worker, in its place in its island and with its weights.

    Args:
        config: settings of the stage.
        shape: of the model.
        crew: all workers.
        run: the opened run folder.
        data: the prepared data, which every worker reads for itself.
        machine: what was measured before, if anything.
        weights: makes the whole model on a device; called by worker 0 only. None: its state comes later.
        emulation: makes the workers unequal, where the settings ask for it.

    Raises InputError, on every worker, where they cannot train so.
    """
    if config.emulate and emulation is None:
        raise InputError("the setting `emulate` needs an `emulation` beside the settings, as motley.cli passes one")
    plan = crew.led(lambda: plan_of(config))
    emulated = emulation.chip(crew, plan) if emulation else Emulated()
    islands, every = crew.led(lambda: islands_for(config, shape, crew, plan))
    crew.agree({**facts(config, data), "shape": str(shape)})
    if crew.alone:
        check_memory(shape, config.optimizer, crew.device, config.moments)
    else:
        check_gathering(islands, shape, config.optimizer, crew)
    check_devices(islands, crew)
    own = island_of(islands, crew.rank)
    asked = asked_format(config.precision, emulated.precision, own.layout, own.ranks.index(crew.rank))
    everyone = number_formats(asked, crew, run, lambda: run.machine(crew.device, machine))
    formats: list[Format] = [everyone[rank] for rank in own.ranks]
    budgets = crew.all_values(budget(crew.device, emulated.memory))
    programs = crew.all_values(held_already(crew.device))
    if emulation or not crew.alone:
        if plan is None:
            speed = emulated.speed * glance(crew.device, everyone[crew.rank])
            with crew.waiting(crew.patience + most_seconds(GLANCE_SECONDS)):
                glances = crew.all_values(speed)
            islands = dealt(islands, shape, config, budgets, glances)
        planned = plan is not None
        if planned:
            islands = _with_experts_that_fit(islands, shape, config, budgets, everyone, crew.leads)
        try:
            islands = within_memory(islands, shape, config, crew, budgets, everyone, planned, shrink=not planned)
        except InputError as error:
            if crew.alone or planned or not may_be_planned(config):
                raise
            file, islands = planned_from_probe(
                config, shape, crew, run.folder, budgets[crew.rank], everyone[crew.rank], emulated, error
            )
            config = dataclasses.replace(config, plan=file)
            check_devices(islands, crew)
            islands = within_memory(islands, shape, config, crew, budgets, everyone, planned=True, shrink=True)
        own = island_of(islands, crew.rank)
    if emulation:
        crew = dataclasses.replace(crew, links=emulation.links(crew))
    parts, speeds = [island.ranks for island in islands], [island.speed for island in islands]
    if crew.alone:
        worker = Worker(shape, config, own.layout, crew, weights and weights(crew.device), formats)
        island = Island(worker, crew, parts, speeds, every)
    else:
        island_crew = crew.part(parts) if len(islands) > 1 else crew
        worker = Worker(shape, config, own.layout, island_crew, formats=formats)
        island = Island(worker, crew, parts, speeds, every)
        if weights is not None:
            hand_out(weights, island, crew)
    worker.budgets = Budgets(own.ranks, [budgets[rank] for rank in own.ranks], [programs[rank] for rank in own.ranks])
    if emulation:
        emulation.apply(worker, crew)
    return island


def _with_experts_that_fit(
    islands: list[IslandLayout],
    shape: ModelConfig,
    config: TrainingConfig,
    budgets: Sequence[float],
    formats: Sequence[Format],
    leads: bool,
) -> list[IslandLayout]:
    """A plan's islands with experts moved off workers that have no room for theirs; who leads says so."""
    fitting = experts_by_memory(islands, shape, config, budgets, formats)
    for before, after in zip(islands, fitting, strict=True):
        for planned, team in zip(before.layout.teams, after.layout.teams, strict=True):
            if leads and team.experts != planned.experts:
                workers = [before.ranks[rank] for lane in team.lanes for rank in lane]
                note(
                    f"workers {workers} share experts as {list(team.experts)} instead of {list(planned.experts)}: one "
                    "has no room for as many as the plan gives it"
                )
    return fitting


def hand_out(weights: Callable[[torch.device], Transformer], island: Island, crew: Crew) -> None:
    """Worker 0 makes the whole model; every worker takes what it holds of it."""
    whole: Transformer | None = None

    def make() -> None:
        nonlocal whole
        whole = weights(torch.device("cpu"))

    crew.led(make)
    island.take_state(None if whole is None else (dict(whole.state_dict()), {}))
