"""Members of an elastic job, each in a process of its own, that the test lets go on at steps of its choice."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from spawned_ranks import exit_with_parent

import motley.parallel.build
import motley.parallel.elastic.agent
import motley.train.trainer
from motley.data.stream import Batch, TokenStream
from motley.errors import InputError
from motley.parallel.load_balance import LoadBalancer
from motley.parallel.run import pretrain
from motley.train.config import PretrainConfig

ROWS = 4


class Gated(TokenStream):
    """Rows that wait at some steps until the test removes a file, so that ranks fail or join at these steps."""

    def rows(self, position: int, count: int) -> Batch:
        folder, step = self.gates, position // ROWS
        if self.split == "train" and (folder / f"{step}.gate").exists():
            (folder / f"{step}.{os.getpid()}").touch()
            while (folder / f"{step}.gate").exists():
                time.sleep(0.01)
        return super().rows(position, count)

    gates: Path


def member(gates: Path, said: Path, program: str, make: str, arguments: dict[str, Any]) -> None:
    """One `motley pretrain --elastic` in a process of its own, on a processor of some kind."""
    exit_with_parent()
    torch.set_num_threads(1)
    Gated.gates = gates
    motley.train.trainer.TokenStream = Gated  # type: ignore[misc]
    motley.parallel.build.sources = lambda: program
    for module in (motley.parallel.build, motley.parallel.elastic.agent):
        module.kind_of_chip = lambda device: make  # type: ignore[attr-defined]
    LoadBalancer.measured = lambda *_: None  # type: ignore[method-assign]  a rank without rows would reach no gate
    try:
        pretrain(PretrainConfig(**arguments))
    except InputError as error:
        said.write_text(str(error))


def arrived(gates: Path, step: int) -> list[int]:
    return sorted(int(file.suffix[1:]) for file in gates.glob(f"{step}.[0-9]*"))
