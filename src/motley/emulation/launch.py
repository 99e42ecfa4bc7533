"""`motley launch emulated`: emulate a fleet file on this machine, a rank for each chip, with links that are truly slow.

    fleet file ──▶ role of each rank (roles.py) ──▶ a network namespace and a slow link for each (netns.py)
                                                        └─▶ its process, with role and link in its command line

Processes are started, shown and ended as those of `motley launch`, but without torchrun: the environment variables of
each process say its rank.
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

from motley.emulation.netns import DEVICE, Cable, SlowLinks, endpoints_of
from motley.emulation.roles import LINKS, Role, roles_of
from motley.errors import InputError
from motley.fleet.inventory import load_fleet
from motley.fleet.units import size_text
from motley.launch.torchrun import Slot, TorchrunNode, job_words, run_with_restarts, tied_to_stdin
from motley.parallel.communicator import free_port
from motley.parallel.layout import ranks_of_pools
from motley.plan.read_plan import read_plan
from motley.progress import note

ADDED = ("--plan", "--emulate", "--emulate-links")
PORT = 29500  # free in a new namespace


@dataclass(frozen=True)
class EmulatedLaunchConfig:
    """Train on a fleet that this machine emulates, one rank a chip."""

    fleet: Annotated[Path, tyro.conf.Positional]
    """A fleet file that says how its chips are `emulated:`."""
    job: str = "pretrain"
    """The command to start with its options, in quotes, such as 'pretrain --out runs/pretend'; --emulate is added."""
    plan: Path | None = None
    """A plan for this fleet that the ranks follow."""
    links: Literal["true", "auto", "wait"] = "true"
    """What makes links slow: true (network namespaces: Linux and root), wait (ranks sleep instead), or auto: true
    where this machine allows it."""
    restarts: int = 0
    """How often to start everything again when a rank failed; training goes on from its newest checkpoint."""

    def __post_init__(self) -> None:
        job_words(self.job, ADDED)
        if self.restarts < 0:
            raise InputError(f"--restarts is {self.restarts}; it must be at least 0")


def launch_emulated(config: EmulatedLaunchConfig) -> dict[str, Any]:
    """Emulate the fleet until the job is done: {ranks, what made links slow, bytes that each rank sent over its link}.

    Raises InputError for a plan of another fleet, for links that this machine does not allow, and when a rank failed.
    """
    roles = roles_asked(config)
    nodes = [
        TorchrunNode(range(rank, rank + 1), (Slot(f"{role.pool}.{role.chip}", role.pool, role.chip),))
        for rank, role in enumerate(roles)
    ]
    with true_links(roles, config.links) or nullcontext() as links:
        port = PORT if links else free_port()

        def commands(start: int) -> list[tuple[TorchrunNode, Sequence[str]]]:
            words = [rank_words(rank, len(roles), start, port, links, config) for rank in range(len(roles))]
            return [(node, tied_to_stdin(own, Path(), None)) for node, own in zip(nodes, words, strict=True)]

        run_with_restarts(commands, config.restarts, links.kept if links else ())
        sent = links.sent() if links else None
    return {"ranks": len(roles), "links": "relay" if links else "wait", "bytes_sent": sent}


def summary(result: dict[str, Any]) -> str:
    """For people: how many ranks succeeded, and what their links carried."""
    said = f"{result['ranks']} of {result['ranks']} ranks ran to the end"
    if result["bytes_sent"] is None:
        return said
    return f"{said}; {size_text(sum(result['bytes_sent']))} were sent {LINKS[result['links']]} to other pools"


def roles_asked(config: EmulatedLaunchConfig) -> list[Role]:
    """The role of each rank."""
    fleet = load_fleet(config.fleet)
    if config.plan is None:
        return roles_of(str(config.fleet), fleet.chips, None)
    plan = read_plan(config.plan)
    try:
        size = sum(map(len, ranks_of_pools(plan).values()))
        return roles_of(str(config.fleet), size, plan)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{config.plan} is no plan as `motley plan --out` writes it: {error!r} is missing or wrong"
        ) from None


def true_links(roles: Sequence[Role], wanted: Literal["true", "auto", "wait"]) -> SlowLinks | None:
    """The links of the ranks; None where ranks emulate them by waiting, or where there are none."""
    ends = [role.emulated.link for role in roles]
    if wanted == "wait" or not any(end.bandwidth or end.latency for end in ends):
        return None
    cables = [Cable(end.bandwidth or math.inf, end.latency) for end in ends]
    try:
        return SlowLinks(endpoints_of([role.pool for role in roles], cables))
    except InputError as error:
        if wanted == "true":
            raise
        note(f"{error}. Going on with links emulated by waiting")
        return None


def rank_words(
    rank: int, size: int, start: int, port: int, links: SlowLinks | None, config: EmulatedLaunchConfig
) -> list[str]:
    """The command of one rank, with the variables that torchrun would set; on later starts no chip fails."""
    told = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port,
        "MASTER_ADDR": links.address(0) if links else "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": start,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }  # fmt: skip
    if links:
        told["GLOO_SOCKET_IFNAME"] = DEVICE
        # In a namespace no host name resolves, of which PyTorch warns.
        told["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    words = ["env", *(f"{name}={value}" for name, value in told.items()), sys.executable, "-m", "motley"]
    words += [*job_words(config.job, ADDED), f"--emulate={config.fleet}"]
    words += ["--emulate-links=relay"] if links else []
    words += [f"--plan={config.plan}"] if config.plan else []
    return [*(links.at(rank) if links else []), *words]
