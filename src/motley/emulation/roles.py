"""Who plays what where a fleet is played on one machine: each worker pretends to be one chip of a fleet file.

file             pool big: 1 chip          pool small: 2 chips, {speed: 0.25, memory: 1 GB, fails_after: [8 steps]}
without a plan   worker 0 is big's chip    workers 1 and 2 are small's; worker 1 dies after step 8
with a plan      worker r is the chip that the plan gives rank r, as `motley launch` seats them
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motley.errors import InputError
from motley.fleet.inventory import Emulated, load_fleet
from motley.fleet.units import rate_text, size_text
from motley.parallel.layout import ranks_of_pools
from motley.train.config import EmulateLinks

LINKS = {
    "wait": "by waiting",
    "netem": "over a true link (network namespaces and netem)",
    "relay": "over a true link (network namespaces and a relay)",
}


@dataclass(frozen=True)
class Role:
    """What one worker plays: chip number `chip` (from 0) of a pool."""

    pool: str
    chip: int
    emulated: Emulated

    @property
    def fails_after(self) -> tuple[float, str] | None:
        times = self.emulated.fails_after
        return times[self.chip] if self.chip < len(times) else None

    def words(self, links_by: EmulateLinks) -> str:
        """What is pretended besides speed."""
        link, said = self.emulated.link, []
        if self.emulated.memory:
            said.append(f"{size_text(self.emulated.memory)} of memory")
        if self.emulated.precision:
            said.append(f"computes in {self.emulated.precision}")
        if link.bandwidth or link.latency:
            rate = f"{rate_text(link.bandwidth)} and " if link.bandwidth else ""
            said.append(f"{rate}{1e3 * link.latency:g} ms to other pools, {LINKS[links_by]}")
        if self.fails_after:
            said.append(f"dies after {self.fails_after[0]:g} {self.fails_after[1]}")
        return "".join(f"; {words}" for words in said)


def roles_of(text: str, workers: int, plan: Mapping[str, Any] | None) -> list[Role]:
    """What each worker plays.

    Args:
        text: a fleet file, or relative speeds such as 1:2:4.
        workers: how many there are.
        plan: the plan that they follow, if any.

    Raises InputError where file or speeds do not fit the workers.
    """
    if not Path(text).is_file():
        return [Role(text, rank, Emulated(speed=speed)) for rank, speed in enumerate(speeds_of(text, workers))]
    pools = load_fleet(Path(text)).pools
    whole = {
        pool.name: [Role(pool.name, chip, pool.emulated or Emulated()) for chip in range(pool.chips)] for pool in pools
    }
    if plan is None:
        parts = [part for pool in whole.values() for part in pool]
        if len(parts) != workers:
            raise InputError(
                f"{text} has {len(parts)} chips, but {workers} workers were started; start one for each chip"
            )
        return parts
    seats: dict[int, Role] = {}
    for name, ranks in ranks_of_pools(plan).items():
        if len(ranks) > len(whole.get(name, ())):
            raise InputError(
                f"the plan has {len(ranks)} workers in pool {name}, {text} has {len(whole.get(name, ()))} such chips; "
                f"make the plan with --fleet {text}"
            )
        seats |= dict(zip(ranks, whole.get(name, ()), strict=False))
    if sorted(seats) != list(range(workers)):
        raise InputError(f"the plan is for {len(seats)} workers, but {workers} were started")
    return [seats[rank] for rank in range(workers)]


def speeds_of(text: str, workers: int) -> list[float]:
    """`1:2:4:1` → each worker's share of the fastest one's speed. Raises InputError for what is no such list."""
    try:
        speeds = [float(part) for part in text.split(":")]
    except ValueError:
        raise InputError(f"--emulate is {text!r}, which is neither a fleet file nor speeds such as 1:2:4") from None
    if len(speeds) != workers or not all(0 < speed < float("inf") for speed in speeds):
        raise InputError(f"--emulate has speeds {text}; write one number above 0 for each of the {workers} workers")
    return [speed / max(speeds) for speed in speeds]
