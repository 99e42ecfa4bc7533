"""How a training stage begins on every worker: the crew meets, agrees, and each takes its place.

worker 0   opens the run folder, prepares data, loads or draws the weights     ──▶ shares what it found
others     wait, then check that they see the same code, data and settings     ◀──
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from motley import __version__
from motley.errors import InputError
from motley.files import read_json
from motley.fleet.device import choose_device, compute_dtype
from motley.fleet.probe import Machine
from motley.model import ModelConfig, Transformer
from motley.progress import note
from motley.train.config import TrainingConfig
from motley.train.crew import Crew, join_crew
from motley.train.handicap import handicap, speeds_of
from motley.train.layout import Layout, from_plan, side_by_side
from motley.train.memory import check_memory
from motley.train.run import Run
from motley.train.worker import Worker

SAME_EVERYWHERE = ("steps", "batch_rows", "seq_len", "optimizer", "seed", "clip", "mtp_weight", "balance_weight")


def meet(config: TrainingConfig) -> Crew:
    """Find the other workers, if torchrun started some; each on its own device."""
    return join_crew(choose_device(config.device))


def led(crew: Crew, work: Callable[[], Any]) -> Any:
    """What `work` returns at worker 0, on all. An InputError there is raised everywhere."""
    result, failure = None, None
    if crew.leads:
        try:
            result = work()
        except InputError as error:
            failure = str(error)
    result, failure = crew.share((result, failure))
    if failure is not None:
        raise InputError(failure)
    return result


def layout_for(config: TrainingConfig, shape: ModelConfig, crew: Crew) -> Layout:
    """The layout that the settings ask for. Raises InputError where it does not fit the model or the crew."""
    if config.plan is None:
        zero = 0 if crew.alone else config.zero
        return side_by_side(crew.size, shape.num_hidden_layers, config.micro_batch, zero)
    values = read_json(config.plan)
    if not isinstance(values, dict) or "teams" not in values:
        raise InputError(f"{config.plan} is no plan as `motley plan --out` writes it")
    layout = from_plan(values, shape)
    layout.check(shape, crew.size)
    return layout


def employ(
    config: TrainingConfig,
    shape: ModelConfig,
    crew: Crew,
    run: Run,
    data: Path,
    machine: Machine | None,
    weights: Callable[[torch.device], Transformer],
) -> Worker:
    """This worker, in its place and with its weights.

    Args:
        config: settings of the stage.
        shape: of the model.
        crew: all workers.
        run: the opened run folder.
        data: the prepared data, which every worker reads for itself.
        machine: what was measured before, if anything.
        weights: makes the whole model on a device; called by worker 0 only.
    """
    fingerprint = read_json(data / "data.json").get("fingerprint") if (data / "data.json").is_file() else "missing"
    settings = {name: getattr(config, name) for name in SAME_EVERYWHERE}
    crew.agree({"motley": __version__, "PyTorch": torch.__version__, "data": fingerprint, **settings})
    layout = layout_for(config, shape, crew)
    if crew.alone:
        check_memory(shape, config.optimizer, crew.device)
    bf16 = led(crew, lambda: compute_dtype(config.precision, lambda: run.machine(crew.device, machine)))
    wire = bf16 if bf16 == torch.bfloat16 else torch.float32
    if crew.alone:
        return Worker(shape, config, layout, crew, weights(crew.device), bf16)
    worker = Worker(shape, config, layout, crew, dtype=bf16, wire=wire)
    if config.emulated_speeds:
        speed = speeds_of(config.emulated_speeds, crew.size)[crew.rank]
        slow = handicap(speed, "wait")
        worker.lane.pace = slow.pace
        note(f"worker {crew.rank}: emulated at {speed:.0%} of its speed, by waiting")
    whole = weights(torch.device("cpu")) if crew.leads else None
    worker.take_state(None if whole is None else (dict(whole.state_dict()), {}))
    return worker
