"""A fleet played on one machine: each worker becomes as slow as the chip that it plays (cast.py), and fails as it does.

Full speed is that of a worker's threads with a core each. Where all workers of a machine together ask for more cores
than it has, all are slowed down alike, so that what they are to each other stays as written.
"""

import math
import os
import signal
import socket
import threading

import torch

from motley.emulation.cpu_throttle import Way, handicap
from motley.emulation.link_delay import Links
from motley.emulation.netns import DEVICE
from motley.emulation.roles import LinksBy, Part
from motley.errors import InputError
from motley.fleet.probe import usable_cores
from motley.parallel.communicator import Crew
from motley.parallel.rank import Worker
from motley.progress import note


def room_for_all(crew: Crew, speed: float) -> float:
    """Share of full speed that every machine of the crew can give all its workers; `speed` is what this one asks."""
    asked: dict[str, float] = {}
    cores: dict[str, int] = {}
    wanted = (socket.gethostname(), speed * torch.get_num_threads(), usable_cores())
    for host, own, there in crew.all_values(wanted):
        asked[host], cores[host] = asked.get(host, 0.0) + own, there
    return min(1.0, *(cores[host] / asked[host] for host in asked))


def links_of(parts: list[Part], links_by: LinksBy, crew: Crew) -> Links | None:
    """The cables that the parts pretend by waiting; None where none does, or where they are true.

    Raises InputError for workers of several machines, and for ones without the true links that they were told of.
    """
    ends = [part.emulated.link for part in parts]
    if not any(end.bandwidth or end.latency for end in ends):
        return None
    if links_by != "wait":
        if DEVICE not in [name for _, name in socket.if_nameindex()]:
            raise InputError(
                f"--emulate-links {links_by} is what `motley launch emulated` tells workers that it gave true links, "
                "and this one has none; leave it out"
            )
        return None
    if len(set(crew.all_values(socket.gethostname()))) > 1:
        raise InputError("links can only be pretended between workers of one machine; leave `link` out of `emulated`")
    rates = tuple(end.bandwidth or math.inf for end in ends)
    return Links(crew.rank, tuple(part.pool for part in parts), tuple(end.latency for end in ends), rates)


def play(parts: list[Part], way: Way, links_by: LinksBy, worker: Worker, crew: Crew) -> None:
    """Make this worker what it pretends to be, and say so. Every worker calls this, ready to train."""
    part = parts[crew.rank]
    speed = part.emulated.speed
    room = room_for_all(crew, speed)
    slow = handicap(speed * room, way, room * max(other.emulated.speed for other in parts))
    worker.lane.pace = slow.pace
    shared = f" (all at {room:.0%} of that: more workers than cores)" if room < 1 else ""
    note(
        f"worker {crew.rank} plays chip {part.chip} of pool {part.pool}: {speed:.3g} of full speed{shared}, "
        f"{slow.means}{part.words(links_by)}"
    )
    if part.fails_after and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":  # later it is a repaired chip
        count, unit = part.fails_after
        if unit == "steps":
            worker.before_step = lambda step: die(crew.rank) if step == count else None
        else:
            timer = threading.Timer(count, die, (crew.rank,))
            timer.daemon = True
            timer.start()


def die(rank: int) -> None:
    """End this process as a chip ends that fails: without a word to the others."""
    note(f"worker {rank} dies now, as its chip was told to")
    os.kill(os.getpid(), signal.SIGKILL)
