"""Emulate a fleet on one machine: each rank becomes as slow as the chip that it plays (roles.py), and fails as it does.

Full speed is the speed of a rank whose threads have a core each. Where all ranks of a machine together need more cores
than it has, all are slowed down alike, so that their relative speeds stay as written.
"""

import math
import os
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from motley.emulation.cpu_throttle import throttle
from motley.emulation.link_delay import DelayedLinks
from motley.emulation.netns import DEVICE
from motley.emulation.roles import Role, roles_of
from motley.errors import InputError
from motley.fleet.inventory import Emulated
from motley.fleet.probe import usable_cores
from motley.parallel.communicator import Communicator
from motley.parallel.rank import Ranks
from motley.progress import note
from motley.train.config import EmulateBy, EmulateLinks, TrainingConfig


@dataclass
class EmulatedFleet:
    """What `--emulate` asks for, as a `parallel.build.Emulation`.

    Attributes:
        fleet: a fleet file, or relative speeds such as 1:2:4.
        by: what makes a rank slow.
        links_by: what makes its links slow.
        roles: of all ranks, once `chip` was called.
    """

    fleet: str
    by: EmulateBy
    links_by: EmulateLinks
    roles: list[Role] = field(default_factory=list)

    @classmethod
    def asked_by(cls, config: TrainingConfig) -> "EmulatedFleet | None":
        """The fleet that the settings of a stage ask for, if any."""
        return cls(config.emulate, config.emulate_by, config.emulate_links) if config.emulate else None

    def chip(self, comm: Communicator, plan: Mapping[str, Any] | None) -> Emulated:
        self.roles = comm.led(lambda: roles_of(self.fleet, comm.size, plan))
        return self.roles[comm.rank].emulated

    def links(self, comm: Communicator) -> DelayedLinks | None:
        """Raises InputError for ranks of several machines, and for ones without the true links they were told of."""
        ends = [role.emulated.link for role in self.roles]
        if not any(end.bandwidth or end.latency for end in ends):
            return None
        if self.links_by != "wait":
            if DEVICE not in [name for _, name in socket.if_nameindex()]:
                raise InputError(
                    f"--emulate-links {self.links_by} is what `motley launch emulated` tells ranks to which it gave "
                    "true links, and this one has none; leave it out"
                )
            return None
        if len(set(comm.all_values(socket.gethostname()))) > 1:
            raise InputError("links can only be emulated between ranks of one machine; leave `link` out of `emulated`")
        rates = tuple(end.bandwidth or math.inf for end in ends)
        return DelayedLinks(
            comm.rank, tuple(role.pool for role in self.roles), tuple(end.latency for end in ends), rates
        )

    def apply(self, strategy: Ranks, comm: Communicator) -> None:
        role = self.roles[comm.rank]
        speed = role.emulated.speed
        room = room_for_all(comm, speed)
        slow = throttle(speed * room, self.by)
        strategy.runner.pace = slow.pace
        shared = f" (all at {room:.0%} of that: more ranks than cores)" if room < 1 else ""
        note(
            f"rank {comm.rank} emulates chip {role.chip} of pool {role.pool}: {speed:.3g} of full speed{shared}, "
            f"{slow.means}{role.words(self.links_by)}"
        )
        if role.fails_after and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":  # later the chip is repaired
            count, unit = role.fails_after
            if unit == "steps":
                strategy.before_step = lambda step: fail(comm.rank) if step == count else None
            else:
                timer = threading.Timer(count, fail, (comm.rank,))
                timer.daemon = True
                timer.start()


def room_for_all(comm: Communicator, speed: float) -> float:
    """Share of full speed that every machine can give all its ranks; `speed` is what this one asks for."""
    asked: dict[str, float] = {}
    cores: dict[str, int] = {}
    wanted = (socket.gethostname(), speed * torch.get_num_threads(), usable_cores())
    for host, own, there in comm.all_values(wanted):
        asked[host], cores[host] = asked.get(host, 0.0) + own, there
    return min(1.0, *(cores[host] / asked[host] for host in asked))


def fail(rank: int) -> None:
    """Kill this process without a message to the others, as a failing chip would."""
    note(f"rank {rank} fails now, as `fails_after` of its chip says")
    os.kill(os.getpid(), signal.SIGKILL)
