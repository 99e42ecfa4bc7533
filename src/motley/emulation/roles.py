"""Which chip of a fleet file each rank emulates, where one machine emulates a whole fleet.

file             pool big: 1 chip           pool small: 2 chips, {speed: 0.25, memory: 1 GB, fails_after: [8 steps]}
without a plan   rank 0 is the chip of big  ranks 1 and 2 are the chips of small; rank 1 fails after step 8
with a plan      each rank is the chip that the plan gives it, as `motley launch` places them
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

LINKS: dict[EmulateLinks, str] = {
    "wait": "by waiting",
    "relay": "over a true link (network namespaces and a relay)",
}


@dataclass(frozen=True)
class Role:
    """The chip that one rank emulates: number `chip` (from 0) of a pool."""

    pool: str
    chip: int
    emulated: Emulated

    @property
    def fails_after(self) -> tuple[float, str] | None:
        times = self.emulated.fails_after
        return times[self.chip] if self.chip < len(times) else None

    def words(self, links_by: EmulateLinks) -> str:
        """For people: what is emulated besides speed."""
        link, said = self.emulated.link, []
        if self.emulated.memory:
            said.append(f"{size_text(self.emulated.memory)} of memory")
        if self.emulated.precision:
            said.append(f"computes in {self.emulated.precision}")
        if link.bandwidth or link.latency:
            rate = f"{rate_text(link.bandwidth)} and " if link.bandwidth else ""
            said.append(f"{rate}{1e3 * link.latency:g} ms to other pools, {LINKS[links_by]}")
        if self.fails_after:
            said.append(f"fails after {self.fails_after[0]:g} {self.fails_after[1]}")
        return "".join(f"; {words}" for words in said)


def roles_of(text: str, size: int, plan: Mapping[str, Any] | None) -> list[Role]:
    """The role of each rank.

    Args:
        text: a fleet file, or relative speeds such as 1:2:4.
        size: number of ranks.
        plan: the plan that they follow, if any.

    Raises InputError where the file, the speeds or the plan do not fit the ranks.
    """
    if not Path(text).is_file():
        return [Role(text, rank, Emulated(speed=speed)) for rank, speed in enumerate(speeds_of(text, size))]
    pools = load_fleet(Path(text)).pools
    whole = {
        pool.name: [Role(pool.name, chip, pool.emulated or Emulated()) for chip in range(pool.chips)] for pool in pools
    }
    if plan is None:
        roles = [role for pool in whole.values() for role in pool]
        if len(roles) != size:
            raise InputError(f"{text} has {len(roles)} chips, but {size} ranks were started; start one for each chip")
        return roles
    of_rank: dict[int, Role] = {}
    for name, ranks in ranks_of_pools(plan).items():
        if len(ranks) > len(whole.get(name, ())):
            raise InputError(
                f"the plan has {len(ranks)} ranks in pool {name}, {text} has {len(whole.get(name, ()))} such chips; "
                f"make the plan with --fleet {text}"
            )
        of_rank |= dict(zip(ranks, whole.get(name, ()), strict=False))
    if sorted(of_rank) != list(range(size)):
        raise InputError(f"the plan is for {len(of_rank)} ranks, but {size} were started")
    return [of_rank[rank] for rank in range(size)]


def speeds_of(text: str, size: int) -> list[float]:
    """`1:2:4:1` → the speed of each rank relative to the fastest. Raises InputError for text that is no such list."""
    try:
        speeds = [float(speed) for speed in text.split(":")]
    except ValueError:
        raise InputError(f"--emulate is {text!r}, which is neither a fleet file nor speeds such as 1:2:4") from None
    if len(speeds) != size or not all(0 < speed < float("inf") for speed in speeds):
        raise InputError(f"--emulate has speeds {text}; write one number above 0 for each of the {size} ranks")
    return [speed / max(speeds) for speed in speeds]
