"""The commands `motley fleet probe`, `show` and `chips`."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from motley.errors import InputError
from motley.files import write_text
from motley.fleet.chips import chip_sheet, chip_sources, find_chip
from motley.fleet.inventory import Fleet, load_fleet
from motley.fleet.links import measure_together, under_torchrun
from motley.fleet.picture import fleet_page
from motley.fleet.probe import Machine, describe, probe
from motley.fleet.show import chip_table, fleet_table, machine_table
from motley.fleet.write import fleet_text
from motley.tables import as_text

MOST_SECONDS = 50.0
WIDTH = 150


@dataclass(frozen=True)
class ProbeConfig:
    """Measure this machine, or under torchrun every machine of a job, and write a fleet file."""

    out: Path = Path("fleet.yaml")
    """The fleet file to write; an existing one is kept unless --overwrite is given."""
    seconds: float = 20.0
    """How long each machine is measured, at most 50."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MOST_SECONDS:
            raise InputError(f"--seconds is {self.seconds:g}; it must be above 0 and at most {MOST_SECONDS:g}")


@dataclass(frozen=True)
class ShowConfig:
    """Show a fleet file as a table and draw it as a page."""

    fleet: Annotated[Path, tyro.conf.Positional] = Path("fleet.yaml")
    out: Path | None = None
    """HTML file to draw; default: beside the fleet file."""


@dataclass(frozen=True)
class ChipsConfig:
    """List the chip sheet."""

    chip: Annotated[str | None, tyro.conf.Positional] = None
    """One chip with the source of each figure; default: all."""


def fleet_probe(config: ProbeConfig) -> dict[str, Any] | None:
    """Measure and write the file; None on all ranks but rank 0."""
    if config.out.exists() and not config.overwrite:
        raise InputError(f"{config.out} exists and may hold your edits; give --overwrite or another --out")

    def measure() -> Machine:
        return probe(config.seconds, grid=True, shown=os.environ.get("RANK", "0") == "0")

    if under_torchrun():
        gathered = measure_together(measure)
        if gathered is None:
            return None
        machines, links = gathered
    else:
        machines, links = [measure()], None
    write_text(config.out, fleet_text(machines, links))
    result: dict[str, Any] = {"fleet": str(config.out), "machines": [machine.to_dict() for machine in machines]}
    return result | ({"links": links.to_dict()} if links else {})


def probe_summary(result: dict[str, Any]) -> str:
    machines = [Machine.from_dict(value) for value in result["machines"]]
    tables = [machine_table(machine) for machine in machines[:1]]
    lines = [describe(machine) for machine in machines]
    for pair in result.get("links", {}).get("pairs", ()):
        lines.append(
            f"rank {pair['one']} to {pair['other']}: {pair['bytes_per_second'] / 1e9:,.2f} GB/s, "
            f"{1e6 * pair['latency_seconds']:,.0f} us"
        )
    written = f"Written to {result['fleet']}; draw it with `motley fleet show {result['fleet']}`."
    return as_text(*tables, *lines, written, width=WIDTH)


def fleet_show(config: ShowConfig) -> dict[str, Any]:
    fleet = load_fleet(config.fleet)
    page = config.out or config.fleet.with_suffix(".html")
    write_text(page, fleet_page(fleet))
    return {
        "fleet": str(config.fleet),
        "page": str(page),
        "pools": [as_facts(fleet, pool.name) for pool in fleet.pools],
    }


def as_facts(fleet: Fleet, name: str) -> dict[str, Any]:
    """One pool with values of the sheet."""
    pool = next(pool for pool in fleet.pools if pool.name == name)
    return {
        **pool.model_dump(),
        "chip": pool.sheet.name,
        "chips": pool.chips,
        "site": fleet.site_of(pool),
        "price_per_hour": pool.price,
    }


def show_summary(result: dict[str, Any]) -> str:
    return as_text(fleet_table(load_fleet(Path(result["fleet"]))), f"Drawn: {result['page']}", width=WIDTH)


def fleet_chips(config: ChipsConfig) -> dict[str, Any]:
    chips = [find_chip(config.chip)] if config.chip else list(chip_sheet().values())
    return {"chips": [asdict(chip) for chip in chips], "sources": chip_sources(), "one": config.chip is not None}


def chips_summary(result: dict[str, Any]) -> str:
    sources = result["sources"]
    if not result["one"]:
        chips = [find_chip(chip["name"]) for chip in result["chips"]]
        keys = [f"{key}: {text}" for key, text in sources.items()]
        return as_text(
            chip_table(chips), "Sources of single cells: `motley fleet chips NAME`. Keys:", *keys, width=WIDTH
        )
    chip = find_chip(result["chips"][0]["name"])
    table = Table(title=chip.name, title_justify="left")
    for name in ("figure", "value", "source"):
        table.add_column(name)
    for key, (text, source) in chip.cells.items():
        table.add_row(key, text, f"{source}: {sources[source]}")
    return as_text(
        table, chip.note or "", f"also called: {', '.join(chip.aliases)}" if chip.aliases else "", width=WIDTH
    )
