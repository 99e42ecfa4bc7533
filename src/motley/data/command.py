"""`motley data` and `motley tasks`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motley.data.pack import DataConfig, prepare
from motley.data.tasks import FAMILIES, make_problems, write_jsonl
from motley.errors import InputError
from motley.files import read_json


@dataclass(frozen=True)
class DataCommandConfig(DataConfig):
    """Prepare text for pretraining."""

    out: Path = Path("runs/data")
    """Folder to write; kept as it is if it was made from the same input."""


def data(config: DataCommandConfig) -> dict[str, Any]:
    values = {name: value for name, value in vars(config).items() if name != "out"}
    prepared = prepare(DataConfig(**values), config.out)
    return {"folder": str(config.out), "summary": prepared.summary(), **read_json(config.out / "data.json")}


def summary(result: dict[str, Any]) -> str:
    return f"{result['folder']}: {result['summary']}"


@dataclass(frozen=True)
class TasksConfig:
    """Write verifiable problems with worked thinking as conversations."""

    out: Path = Path("runs/tasks.jsonl")
    count: int = 10_000
    families: tuple[str, ...] = tuple(FAMILIES)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"--count is {self.count}; it must be at least 1")


def tasks(config: TasksConfig) -> dict[str, Any]:
    written = write_jsonl(make_problems(config.families, config.count, config.seed), config.out)
    return {**asdict(config), "out": str(config.out), "written": written}


def tasks_summary(result: dict[str, Any]) -> str:
    return f"{result['out']}: {result['written']:,} conversations of {', '.join(result['families'])}"
