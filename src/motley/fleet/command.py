"""`motley fleet`: what the command line asks of this room."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from motley.fleet.probe import Machine, describe, probe
from motley.fleet.show import machine_table


@dataclass(frozen=True)
class FleetConfig:
    """Measure this machine."""

    action: Annotated[Literal["probe"], tyro.conf.Positional] = "probe"
    seconds: float = 3.0
    """How long to measure."""


def fleet(config: FleetConfig) -> dict[str, Any]:
    """One entry of a fleet: this machine, measured."""
    return asdict(probe(config.seconds))


def summary(result: dict[str, Any]) -> str:
    machine = Machine.from_dict(result)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(machine_table(machine))
        console.print(describe(machine))
    return captured.get().rstrip()
