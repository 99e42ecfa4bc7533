"""`motley launch emulated`: a fleet file played on this machine, a worker for each chip, with links truly slow.

    fleet file ──▶ who plays what (cast.py) ──▶ a namespace and a slow link for each worker (slow_link.py)
                                                    └─▶ its process, told what it plays and how its link is made

Workers are started, shown and ended as those of `motley launch`, but without torchrun: each is told its number itself.
"""

import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from motley.emulation.netns import DEVICE, Cable, SlowLinks, places_of
from motley.emulation.roles import LINKS, Role, roles_of
from motley.errors import InputError
from motley.fleet.inventory import load_fleet
from motley.fleet.units import size_text
from motley.launch.torchrun import Group, Seat, held, run_again, words_of
from motley.parallel.communicator import free_port
from motley.parallel.layout import ranks_of_pools
from motley.plan.read_plan import read_plan
from motley.progress import note

OURS = ("--plan", "--emulate", "--emulate-links")
PORT = 29500  # in namespaces, where nobody else is


@dataclass(frozen=True)
class EmulatedLaunchConfig:
    """Train on a fleet that is played by this machine, one worker a chip."""

    fleet: Annotated[Path, tyro.conf.Positional]
    """A fleet file that says how its chips are `emulated:`."""
    job: str = "pretrain"
    """The command to start with its options, in quotes, such as 'pretrain --out runs/pretend'; what the workers play is
    added."""
    plan: Path | None = None
    """A plan for this fleet, to be followed."""
    links: Literal["true", "auto", "wait"] = "true"
    """What makes links slow: true (network namespaces: Linux and root), wait (workers wait, no packet does), or auto:
    true where this machine allows it."""
    restarts: int = 0
    """How often to start everything again when a worker failed; training goes on from its newest checkpoint."""

    def __post_init__(self) -> None:
        words_of(self.job, OURS)
        if self.restarts < 0:
            raise InputError(f"--restarts is {self.restarts}; it must be at least 0")


def launch_emulated(config: EmulatedLaunchConfig) -> dict[str, Any]:
    """Play the fleet until the job is done: {workers, what made links slow, bytes that each worker sent over its own}.

    Raises InputError for a plan of another fleet, for links that cannot be had here, and when a worker failed.
    """
    parts = cast_of(config)
    groups = [
        Group(range(rank, rank + 1), (Seat(f"{part.pool}.{part.chip}", part.pool, part.chip),))
        for rank, part in enumerate(parts)
    ]
    with true_links(parts, config.links) or nullcontext() as links:
        port = PORT if links else free_port()

        def commands(start: int) -> list[tuple[Group, Sequence[str]]]:
            words = [worker_words(rank, len(parts), start, port, links, config) for rank in range(len(parts))]
            return [(group, held(own, Path(), None)) for group, own in zip(groups, words, strict=True)]

        run_again(commands, config.restarts, links.kept if links else ())
        way, sent = (links.way, links.sent()) if links else ("wait", None)
    return {"workers": len(parts), "links": way, "bytes_sent": sent}


def summary(result: dict[str, Any]) -> str:
    """How many workers ended well, and what their links carried."""
    said = f"{result['workers']} of {result['workers']} workers ran to the end"
    if result["bytes_sent"] is None:
        return said
    return f"{said}; {size_text(sum(result['bytes_sent']))} went {LINKS[result['links']]} to other pools"


def cast_of(config: EmulatedLaunchConfig) -> list[Role]:
    """What each worker plays."""
    fleet = load_fleet(config.fleet)
    if config.plan is None:
        return roles_of(str(config.fleet), fleet.chips, None)
    plan = read_plan(config.plan)
    try:
        workers = sum(map(len, ranks_of_pools(plan).values()))
        return roles_of(str(config.fleet), workers, plan)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{config.plan} is no plan as `motley plan --out` writes it: {error!r} is missing or wrong"
        ) from None


def true_links(parts: Sequence[Role], wanted: Literal["true", "auto", "wait"]) -> SlowLinks | None:
    """The links of the parts; None where they are to be waited for, or none is pretended."""
    ends = [part.emulated.link for part in parts]
    if wanted == "wait" or not any(end.bandwidth or end.latency for end in ends):
        return None
    cables = [Cable(end.bandwidth or math.inf, end.latency) for end in ends]
    try:
        return SlowLinks(places_of([part.pool for part in parts], cables))
    except InputError as error:
        if wanted == "true":
            raise
        note(f"{error}. Going on with links played by waiting")
        return None


def worker_words(
    rank: int, workers: int, start: int, port: int, links: SlowLinks | None, config: EmulatedLaunchConfig
) -> list[str]:
    """The command of one worker, with what torchrun would tell it; on later starts its chip is a repaired one."""
    told = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_PORT": port,
        "MASTER_ADDR": links.address(0) if links else "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": start,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }  # fmt: skip
    if links:
        told["GLOO_SOCKET_IFNAME"] = DEVICE
        told["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns: no server knows names
    words = ["env", *(f"{name}={value}" for name, value in told.items()), sys.executable, "-m", "motley"]
    words += [*words_of(config.job, OURS), f"--emulate={config.fleet}"]
    words += [f"--emulate-links={links.way}"] if links else []
    words += [f"--plan={config.plan}"] if config.plan else []
    return [*(links.at(rank) if links else []), *words]
