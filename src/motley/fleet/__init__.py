"""Hardware: the chip sheet, the user's fleet file, and what a probe measured."""

from motley.fleet.chips import Chip, chip_sheet, find_chip
from motley.fleet.inventory import Fleet, Link, MeasuredChip, Pool, Site, load_fleet, parse_fleet
from motley.fleet.probe import Machine, MatmulRate, best_device, describe, probe

__all__ = [
    "Chip",
    "Fleet",
    "Link",
    "Machine",
    "MatmulRate",
    "MeasuredChip",
    "Pool",
    "Site",
    "best_device",
    "chip_sheet",
    "describe",
    "find_chip",
    "load_fleet",
    "parse_fleet",
    "probe",
]
