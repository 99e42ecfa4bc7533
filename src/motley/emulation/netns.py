"""Slow links between the ranks of one machine through which real packets go: network namespaces and a relay.

    pool a               pool b
    rank 0               rank 1                rank 2           each in a network namespace of its own,
    10.77.1.1            10.77.2.1 ══ pool0 ══ 10.77.2.2        like a machine with two network cards
        │ link0              │ link0               │ link0
        └──────── uplink, latency, downlink ───────┘            to other pools, as the fleet file says

link0 is a TUN device; one process (user_relay.py) carries the packets of all of them, with the rate and latency of each
link. Ranks of one pool communicate over a bridge, as fast as they can. Namespaces, bridges and devices have no names
outside and exist as long as a process holds them, so that nothing is left behind even if all are killed. This takes
Linux, root (root of a user namespace will do, inside a network namespace of its own), `ip`, `nsenter` and /dev/net/tun.
"""

import ctypes
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from motley.emulation.user_relay import NETWORK
from motley.errors import InputError

DEVICE = "link0"
TUN = "/dev/net/tun"
OWN_NAMESPACE = "/proc/thread-self/ns/net"
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000
LEAST_PACKET, LARGEST_PACKET = 1500, 65000  # bytes
PACKET_SECONDS = 1e-3  # larger ones would make small messages wait behind them, smaller ones keep the relay busy
MOST = 250  # pools, and ranks of a pool: a byte of the address each


@dataclass(frozen=True)
class Cable:
    """The link of one rank to those of other pools; the same in both directions.

    Attributes:
        rate: bytes/s; between two ranks both rates limit.
        latency: seconds; between two ranks the greater counts.
    """

    rate: float = math.inf
    latency: float = 0.0

    @property
    def packet_bytes(self) -> int:
        return int(min(LARGEST_PACKET, max(LEAST_PACKET, self.rate * PACKET_SECONDS)))


@dataclass(frozen=True)
class Endpoint:
    """Address of a rank: its pool and its number within the pool, both from 0, and the cable there."""

    pool: int
    number: int
    cable: Cable

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.pool + 1}.{self.number + 1}"


def endpoints_of(pools: Sequence[str], cables: Sequence[Cable]) -> list[Endpoint]:
    """The endpoint of each rank. Raises InputError for more ranks than there are addresses."""
    names = list(dict.fromkeys(pools))
    endpoints = [
        Endpoint(names.index(pool), pools[:rank].count(pool), cable)
        for rank, (pool, cable) in enumerate(zip(pools, cables, strict=True))
    ]
    if max(max(endpoint.pool, endpoint.number) for endpoint in endpoints) >= MOST:
        raise InputError(f"true links reach {MOST} pools of {MOST} ranks, this fleet has more; choose --links wait")
    return endpoints


class SlowLinks:
    """A network namespace for each rank, and the links between them, until the end of the context.

    Attributes:
        endpoints: by rank.
        kept: files that every process started here must inherit (`pass_fds`): while one of them runs, the links exist.

    Raises InputError where this machine does not allow it.
    """

    kept: tuple[int, ...]

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = endpoints
        with ExitStack() as stack:
            try:
                self._set_up(stack)
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                raise InputError(
                    f"true links take Linux, root, ip and nsenter, and were refused here ({where}"
                    f"{error.strerror or error}); choose --links wait, or auto"
                ) from None
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def at(self, rank: int) -> list[str]:
        """The prefix of a command that runs in the namespace of a rank (with `kept` as its `pass_fds`)."""
        return ["nsenter", f"--net=/proc/self/fd/{self._spaces[rank]}"]

    def address(self, rank: int) -> str:
        return self.endpoints[rank].address

    def sent(self) -> list[int]:
        """Bytes that each rank sent to other pools so far, packet headers included."""
        found = []
        for space in self._spaces:
            with _inside(space):
                lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
            found += [int(line.split(":")[1].split()[8]) for line in lines if line.split(":")[0].strip() == DEVICE]
        return found

    def _set_up(self, stack: ExitStack) -> None:
        """Create namespaces, bridges and the relay. Raises OSError where the system does not allow it."""
        if shutil.which("nsenter") is None:
            raise OSError("there is no nsenter")
        hub = _kept(stack, _namespace())
        self._spaces = [_kept(stack, _namespace()) for _ in self.endpoints]
        end, lifeline = os.pipe()
        end, lifeline = _kept(stack, end), _kept(stack, lifeline)
        self.kept = (hub, *self._spaces, lifeline)
        in_hub, at_ranks = wiring(self.endpoints, self._spaces)
        _run_ip(hub, in_hub, self.kept)
        ends = []
        for endpoint, space, commands in zip(self.endpoints, self._spaces, at_ranks, strict=True):
            device, cable = _kept(stack, _tun(space)), endpoint.cable
            _run_ip(space, commands)
            ends.append([endpoint.pool + 1, endpoint.number + 1, device, cable.rate, cable.latency])
        process = subprocess.Popen(
            [sys.executable, "-m", "motley.emulation.user_relay", json.dumps({"lifeline": end, "ends": ends})],
            pass_fds=[end, *(device for _, _, device, _, _ in ends)], stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)


def wiring(endpoints: Sequence[Endpoint], spaces: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Commands for `ip` in the namespace that holds the bridges, and in the namespace of each rank.

    Args:
        endpoints: by rank.
        spaces: open files of the ranks' namespaces.
    """
    pools = range(1 + max(endpoint.pool for endpoint in endpoints))
    sizes = [sum(endpoint.pool == pool for endpoint in endpoints) for pool in pools]
    bridges = [f"pool{pool}" for pool, size in enumerate(sizes) if size > 1]
    hub = [line for bridge in bridges for line in (f"link add {bridge} type bridge", f"link set {bridge} up")]
    own: list[list[str]] = []
    for rank, (endpoint, space) in enumerate(zip(endpoints, spaces, strict=True)):
        lines = ["link set lo up"]
        if sizes[endpoint.pool] > 1:
            hub += [
                f"link add in{rank} type veth peer name pool0 netns /proc/self/fd/{space}",
                f"link set in{rank} master pool{endpoint.pool} up",
            ]
            lines += [f"addr add {endpoint.address}/24 dev pool0", "link set pool0 up"]
        lines += [
            f"addr add {endpoint.address}/32 dev {DEVICE}",
            f"link set {DEVICE} mtu {endpoint.cable.packet_bytes} up",
            f"route add {NETWORK}.0.0/16 dev {DEVICE} src {endpoint.address}",
        ]
        own.append(lines)
    return hub, own


# ------------------------------------------------------------------------------------------ the system


def _call(name: str, *numbers: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*numbers):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


@contextmanager
def _inside(space: int) -> Iterator[None]:
    """Run this thread, and the processes that it starts, in a network namespace."""
    home = os.open(OWN_NAMESPACE, os.O_RDONLY)
    _call("setns", space, CLONE_NEWNET)
    try:
        yield
    finally:
        _call("setns", home, CLONE_NEWNET)
        os.close(home)


def _namespace() -> int:
    """A new network namespace, as an open file."""
    home = os.open(OWN_NAMESPACE, os.O_RDONLY)
    try:
        _call("unshare", CLONE_NEWNET)
        space = os.open(OWN_NAMESPACE, os.O_RDONLY)
        _call("setns", home, CLONE_NEWNET)
        return space
    finally:
        os.close(home)


def _kept(stack: ExitStack, file: int) -> int:
    """The same file under a number above those that shells use, until the stack is unwound."""
    import fcntl  # not on Windows, which has no namespaces either

    found = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(file)
    stack.callback(os.close, found)
    return found


def _tun(space: int) -> int:
    """The relay's side of `link0` in a namespace, as an open file."""
    import fcntl

    with _inside(space):
        device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    return device


def _run_ip(space: int, lines: Sequence[str], kept: Sequence[int] = ()) -> None:
    """Run `ip` in a namespace. Raises OSError with its message."""
    text = "".join(f"{line}\n" for line in lines)
    with _inside(space):
        done = subprocess.run(["ip", "-batch", "-"], input=text, capture_output=True, text=True, pass_fds=kept)
    if done.returncode:
        raise OSError(f"ip: {' '.join(done.stderr.split())}")
