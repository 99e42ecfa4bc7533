"""`motley fleet`: what the command line asks of this room."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from motley.fleet.probe import describe, probe


@dataclass(frozen=True)
class FleetConfig:
    """Measure this machine."""

    action: Annotated[Literal["probe"], tyro.conf.Positional] = "probe"
    seconds: float = 3.0
    """How long to measure."""


def fleet(config: FleetConfig) -> dict[str, Any]:
    machine = probe(config.seconds)
    return {**asdict(machine), "description": describe(machine)}


def summary(result: dict[str, Any]) -> str:
    lines = [result["description"], ""]
    for rate in result["matmul_rates"]:
        shape = f"{rate['rows']} x {rate['inner']} x {rate['columns']}"
        lines.append(f"  {rate['dtype']:<5} {shape:<20} {rate['gflops']:10,.0f} GFLOP/s")
    return "\n".join(lines)
