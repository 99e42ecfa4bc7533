"""Quantities as people write them in a fleet file: a number and its unit, always both, so that Gb/s is never GB/s."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

RATES = {
    "Kb/s": 1e3 / 8,
    "Mb/s": 1e6 / 8,
    "Gb/s": 1e9 / 8,
    "Tb/s": 1e12 / 8,
    "Mbit/s": 1e6 / 8,
    "Gbit/s": 1e9 / 8,
    "kB/s": 1e3,
    "MB/s": 1e6,
    "GB/s": 1e9,
    "TB/s": 1e12,
    "MiB/s": 2.0**20,
    "GiB/s": 2.0**30,
}
SIZES = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
MOMENTS = {"step": 1.0, "steps": 1.0, "s": 1.0, "min": 60.0}
_QUANTITY = re.compile(r"\s*([-+]?[0-9][0-9_]*\.?[0-9]*(?:e[-+]?[0-9]+)?)\s*([A-Za-z/]*)\s*")


def parse(text: Any, units: dict[str, float], what: str) -> float:
    """`"10 Gb/s"` → bytes/s. Raises ValueError in one sentence, naming the units there are."""
    allowed = ", ".join(units)
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f'write a number and its unit, such as "{what}" (units: {allowed})')
    number, unit = float(match[1]), match[2]
    if unit not in units:
        other = [name for name in units if name.lower() == unit.lower()]
        hint = f"; did you mean {' or '.join(other)}? b are bits, B are bytes" if other else ""
        raise ValueError(f"{unit or 'no unit'!r} is not one of {allowed}{hint}")
    if not 0 < number < math.inf:
        raise ValueError(f"{number:g} must be above 0")
    return number * units[unit]


def rate_text(rate: float) -> str:
    """Bytes/s for people, always in bytes: `12.5 GB/s`."""
    for unit in ("TB/s", "GB/s", "MB/s"):
        if rate >= RATES[unit]:
            return f"{rate / RATES[unit]:,.4g} {unit}"
    return f"{rate / 1e3:,.4g} kB/s"


def size_text(size: float) -> str:
    """Bytes for people, in binary units: `79.2 GiB`."""
    for unit in ("TiB", "GiB", "MiB"):
        if size >= SIZES[unit]:
            return f"{size / SIZES[unit]:,.3g} {unit}" if unit == "TiB" else f"{size / SIZES[unit]:,.1f} {unit}"
    return f"{size:,.0f} B"


def _moment(text: Any) -> tuple[float, str]:
    """`"8 steps"` → (8, "steps"), `"2 min"` → (120, "s")."""
    number = parse(text, MOMENTS, "8 steps")
    if "step" not in text:
        return number, "s"
    if number != int(number):
        raise ValueError(f"{number:g} steps are no whole number of steps")
    return number, "steps"


Rate = Annotated[float, BeforeValidator(lambda text: parse(text, RATES, "100 Gb/s"))]
Memory = Annotated[float, BeforeValidator(lambda text: parse(text, SIZES, "80 GiB"))]
Duration = Annotated[float, BeforeValidator(lambda text: parse(text, TIMES, "5 ms"))]
Moment = Annotated[tuple[float, Literal["steps", "s"]], BeforeValidator(_moment)]
"""After so many steps of the run, or so many seconds."""
