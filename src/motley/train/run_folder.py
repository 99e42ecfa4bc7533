"""A run is a folder: its settings, and its result once it is done.

runs/NAME/config.json    the settings; the same command goes on, another one is refused
runs/NAME/machine.json   what it began on, measured
runs/NAME/formats.json   what --precision auto chose for each kind of chip
runs/NAME/result.json    written last: the stage is complete and is not repeated
runs/NAME/lock           held by the process that is at work here; the file itself says nothing
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from motley.errors import InputError
from motley.files import read_json, remove_unfinished, write_json
from motley.fleet.capabilities import capabilities
from motley.fleet.device import Format
from motley.fleet.probe import Machine, device_name, probe
from motley.progress import in_words, note
from motley.train.config import TrainingConfig
from motley.train.expert_balance import SLOWEST, ByLength

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG_FILE, MACHINE_FILE, RESULT_FILE, LOCK_FILE = "config.json", "machine.json", "result.json", "lock"
FORMATS_FILE = "formats.json"
FREE_TO_CHANGE = {  # these do not change what is learned, beyond how each rank rounds
    "out", "micro_batch", "precision", "moments", "recompute", "device", "plan", "zero", "emulate", "emulate_by",
    "emulate_links", "islands", "elastic", "comm_timeout", "valid_every", "valid_rows", "checkpoint_every", "keep_last",
}  # fmt: skip


Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True)
class RunFolder:
    """An opened run folder; `finished` is its result if it was already complete."""

    folder: Path
    finished: dict[str, Any] | None

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        result = {"out": str(self.folder), **result}
        write_json(self.folder / RESULT_FILE, result)
        return result

    def machine(self, device: torch.device, measured: Machine | None) -> Machine:
        """The machine as it was first measured; a run that goes on with another kind of chip measures again."""
        file = self.folder / MACHINE_FILE
        if file.is_file():
            kept = Machine.from_dict(read_json(file))
            same = kept.chip == capabilities(device) if kept.chip else kept.name == device_name(device)
            if kept.device == device.type and same:
                return kept
        machine = measured if measured is not None and measured.device == device.type else probe(device=device)
        write_json(file, dataclasses.asdict(machine))
        return machine

    def formats(self) -> dict[str, Format]:
        """What --precision auto chose so far, by kinds of chips (in old files by their names)."""
        file = self.folder / FORMATS_FILE
        return read_json(file) if file.is_file() else {}

    def keep_formats(self, formats: dict[str, Format]) -> None:
        """Remember them, if there are new ones."""
        if formats != self.formats():
            write_json(self.folder / FORMATS_FILE, formats)


@contextmanager
def claimed(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process, or for it and others that share it.

    The system lets go of it however the process ends.

    Raises InputError when another process holds it. Where files cannot be locked, that is said and nothing is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is at work in {folder}; wait until it ends, or choose another --out"
            ) from None
        except OSError as error:
            note(f"{folder} cannot be locked ({error.strerror or error}): make sure nothing else writes to it")
        yield


def kept_speed(folder: Path) -> float | None:
    """How fast the router's bias moves in the run of a folder, None where there is no run yet."""
    file = folder / CONFIG_FILE
    if not file.is_file() or not isinstance(kept := read_json(file), dict) or "stage" not in kept:
        return None
    return float(kept.get("bias_speed", SLOWEST))


def as_begun(config: Config, kept: float | None) -> Config:
    """`config`, with `kept_speed` of its folder unless another was set: a run goes on as it began."""
    if kept is None or not isinstance(config.bias_speed, ByLength):
        return config
    return dataclasses.replace(config, bias_speed=kept)


def open_run(folder: Path, stage: str, config: TrainingConfig, inputs: dict[str, Any]) -> RunFolder:
    """Open or create the run folder of one stage.

    Args:
        folder: the run folder.
        stage: its name in config.json.
        config: the settings given now.
        inputs: what else decides the result (fingerprint of the data).

    Raises InputError when the folder belongs to a run with other settings or other data, naming the first difference.
    """
    asked = {"stage": stage, **_plain(dataclasses.asdict(config)), **inputs}
    remove_unfinished(folder)
    file = folder / CONFIG_FILE
    if file.is_file():
        # A setting that did not exist when the run began was at what is now its default.
        before = _plain(config.defaults()) | _renamed(config, read_json(file))
        for name in sorted(set(before) | set(asked)):
            if name not in FREE_TO_CHANGE and before.get(name) != asked.get(name):
                raise InputError(
                    f"{folder} holds a run with {name}={before.get(name)!r}, now asked for {asked.get(name)!r}; "
                    "choose another --out, or remove the folder to begin again"
                )
    write_json(file, asked)
    result = folder / RESULT_FILE
    return RunFolder(folder, read_json(result) if result.is_file() else None)


def trained_within_documents(model: Path) -> bool | None:
    """Whether attention stayed within documents in the run that a model folder lies in.

    None where there is no such run: an export, a download, a folder copied elsewhere.
    """
    for folder in model.resolve().parents[:2]:  # RUN/model, RUN/checkpoints/step-…
        file = folder / CONFIG_FILE
        if file.is_file() and isinstance(settings := read_json(file), dict) and "stage" in settings:
            return bool(settings.get("confine_to_document", settings["stage"] == "sft"))  # older runs: the default
    return None


def _renamed(config: TrainingConfig, kept: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run folder by the names that they have now."""
    return {config.RENAMED.get(name, name): value for name, value in kept.items()}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON's own types, so that what is read back compares equal."""
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def summary(result: dict[str, Any]) -> str:
    """A finished training stage in one line."""
    return (
        f"{result['out']}: {result['step']:,} steps, {result['tokens']:,} tokens in {in_words(result['seconds'])}; "
        f"best held-out loss {result['best_loss']:.3f} nats per token "
        f"({result['best_bits_per_byte']:.3f} bits per byte) at step {result['best_step']:,}"
    )
