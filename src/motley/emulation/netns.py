"""Slow links between the workers of one machine that are true: real packets, a rate and a latency that hold.

    pool a               pool b
    worker 0             worker 1              worker 2         each in a network namespace of its own,
    10.77.1.1            10.77.2.1 ══ pool0 ══ 10.77.2.2        like a machine with two network cards
        │ link0              │ link0               │ link0
        └──────── uplink, latency, downlink ───────┘            to other pools, as the fleet file says

    netem    link0 is one end of a virtual cable (veth), its other end is plugged into a bridge: `tc` gives packets
             their latency (netem) and rate (htb) when they leave, and their rate again when they arrive
    relay    where the kernel has no netem: link0 is a TUN device, and one process carries all packets (relay.py)

Workers of one pool talk over a bridge, as fast as they can. Namespaces, bridges and devices have no names outside and
live as long as a process holds them: whoever is killed, nothing is left behind. All this takes Linux, root (that of a
user namespace will do, whose own network namespace one is in), `ip`, `nsenter`, and `tc` or /dev/net/tun.
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
from typing import Literal, Self

from motley.emulation.user_relay import NETWORK, QUEUE_SECONDS
from motley.errors import InputError

Way = Literal["netem", "relay"]
DEVICE = "link0"
TUN = "/dev/net/tun"
OWN_NAMESPACE = "/proc/thread-self/ns/net"
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000
LEAST_PACKET, LARGEST_PACKET = 1500, 65000  # bytes
PACKET_SECONDS = 1e-3  # larger ones would make small messages wait behind them, smaller ones keep the relay busy
MOST = 250  # pools, and workers of a pool: a byte of the address each
NO_LIMIT = 1e10  # bytes/s, where tc needs a number


@dataclass(frozen=True)
class Cable:
    """From a worker to those of other pools, each way.

    Attributes:
        rate: bytes/s; of two ends both hold.
        latency: seconds; of two ends the greater counts.
    """

    rate: float = math.inf
    latency: float = 0.0

    @property
    def packet_bytes(self) -> int:
        return int(min(LARGEST_PACKET, max(LEAST_PACKET, self.rate * PACKET_SECONDS)))


@dataclass(frozen=True)
class Coordinates:
    """Where a worker is: pool and number in it (from 0), and its cable."""

    pool: int
    number: int
    cable: Cable

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.pool + 1}.{self.number + 1}"


def places_of(pools: Sequence[str], cables: Sequence[Cable]) -> list[Coordinates]:
    """Each worker's place. Raises InputError for more than addresses reach."""
    names = list(dict.fromkeys(pools))
    places = [
        Coordinates(names.index(pool), pools[:rank].count(pool), cable)
        for rank, (pool, cable) in enumerate(zip(pools, cables, strict=True))
    ]
    if max(max(place.pool, place.number) for place in places) >= MOST:
        raise InputError(f"true links reach {MOST} pools of {MOST} workers, this fleet has more; choose --links wait")
    return places


class SlowLinks:
    """Namespaces, one a worker, and what joins them, until the end of the context.

    Attributes:
        places: of the workers, by rank.
        way: what makes links slow.
        kept: files that every process started here must inherit (`pass_fds`): as long as one lives, so do the links.

    Raises InputError where this machine does not allow it.
    """

    way: Way
    kept: tuple[int, ...]

    def __init__(self, places: Sequence[Coordinates]) -> None:
        self.places = places
        with ExitStack() as stack:
            try:
                self._join(stack)
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
        """What to put before a command that is to run at a worker's place (with `kept` as its `pass_fds`)."""
        return ["nsenter", f"--net=/proc/self/fd/{self._spaces[rank]}"]

    def address(self, rank: int) -> str:
        return self.places[rank].address

    def sent(self) -> list[int]:
        """Bytes that each worker sent to other pools so far, headers of packets included."""
        found = []
        for space in self._spaces:
            with _inside(space):
                lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
            found += [int(line.split(":")[1].split()[8]) for line in lines if line.split(":")[0].strip() == DEVICE]
        return found

    def _join(self, stack: ExitStack) -> None:
        """Make all there is. Raises OSError where the system does not allow it."""
        if shutil.which("nsenter") is None:
            raise OSError("there is no nsenter")
        hub = _kept(stack, _namespace())
        self._spaces = [_kept(stack, _namespace()) for _ in self.places]
        end, lifeline = os.pipe()
        end, lifeline = _kept(stack, end), _kept(stack, lifeline)
        self.kept = (hub, *self._spaces, lifeline)
        self.way = "netem" if _has_netem() else "relay"
        in_hub, at_places = wiring(self.places, self.way, self._spaces)
        _run("ip", hub, in_hub, self.kept)
        devices = []
        for space, commands in zip(self._spaces, at_places, strict=True):
            if self.way == "relay":
                devices.append(_kept(stack, _tun(space)))
            _run("ip", space, commands)
        if self.way == "netem":
            _run("tc", hub, [line for rank, place in enumerate(self.places) for line in downlink(rank, place)])
            for space, place in zip(self._spaces, self.places, strict=True):
                _run("tc", space, uplink(place, self.places))
            return
        ends = [
            [place.pool + 1, place.number + 1, device, place.cable.rate, place.cable.latency]
            for place, device in zip(self.places, devices, strict=True)
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "motley.emulation.user_relay", json.dumps({"lifeline": end, "ends": ends})],
            pass_fds=[end, *devices], stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)


# ------------------------------------------------------------------------------------------ commands


def wiring(places: Sequence[Coordinates], way: Way, spaces: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """What `ip` is told in the namespace that holds the bridges, and in that of each worker.

    Args:
        places: of the workers.
        way: how links are made slow.
        spaces: open files of the workers' namespaces.
    """
    sizes = [sum(place.pool == pool for place in places) for pool in range(1 + max(place.pool for place in places))]
    bridges = [f"pool{pool}" for pool, size in enumerate(sizes) if size > 1] + ["outside"] * (way == "netem")
    hub = [line for bridge in bridges for line in (f"link add {bridge} type bridge", f"link set {bridge} up")]
    own: list[list[str]] = []
    for rank, (place, space) in enumerate(zip(places, spaces, strict=True)):
        lines = ["link set lo up"]
        if sizes[place.pool] > 1:
            hub += _plugged_in(f"in{rank}", "pool0", f"pool{place.pool}", space)
            lines += [f"addr add {place.address}/24 dev pool0", "link set pool0 up"]
        if way == "netem":
            hub += _plugged_in(f"out{rank}", DEVICE, "outside", space)
        mtu = place.cable.packet_bytes if way == "relay" else LEAST_PACKET  # a bridge carries its smallest port's
        lines += [f"addr add {place.address}/32 dev {DEVICE}", f"link set {DEVICE} mtu {mtu} up",
                  f"route add {NETWORK}.0.0/16 dev {DEVICE} src {place.address}"]  # fmt: skip
        own.append(lines)
    return hub, own


def _plugged_in(port: str, device: str, bridge: str, space: int) -> list[str]:
    there = f"peer name {device} netns /proc/self/fd/{space}"
    return [f"link add {port} type veth {there}", f"link set {port} master {bridge} up"]


def uplink(own: Coordinates, places: Sequence[Coordinates]) -> list[str]:
    """What `tc` is told in a worker's namespace: one rate for all it sends, a latency for each other pool."""
    rate = _bits(own.cable.rate)
    latencies = {place.pool: place.cable.latency for place in places if place.pool != own.pool}
    lines = [
        f"qdisc add dev {DEVICE} root handle 1: htb",
        f"class add dev {DEVICE} parent 1: classid 1:ffff htb rate {rate}",
    ]
    for pool, latency in latencies.items():
        seconds = max(own.cable.latency, latency)
        packets = math.ceil(min(own.cable.rate, NO_LIMIT) * (seconds + QUEUE_SECONDS) / LEAST_PACKET) + 1
        here = f"1:{pool + 1:x}"
        lines += [
            f"class add dev {DEVICE} parent 1:ffff classid {here} htb rate 1mbit ceil {rate}",
            f"qdisc add dev {DEVICE} parent {here} netem delay {seconds * 1e6:.0f}us limit {packets}",
            f"filter add dev {DEVICE} parent 1: protocol ip prio 1 u32 match ip dst {NETWORK}.{pool + 1}.0/24 "
            f"flowid {here}",
        ]
    return lines


def downlink(rank: int, place: Coordinates) -> list[str]:
    """What `tc` is told where the cable of a worker is plugged in: the rate of all that it receives."""
    packets = math.ceil(min(place.cable.rate, NO_LIMIT) * QUEUE_SECONDS / LEAST_PACKET) + 1
    return [
        f"qdisc add dev out{rank} root handle 1: htb default 1",
        f"class add dev out{rank} parent 1: classid 1:1 htb rate {_bits(place.cable.rate)}",
        f"qdisc add dev out{rank} parent 1:1 pfifo limit {packets}",
    ]


def _bits(rate: float) -> str:
    return f"{8 * min(rate, NO_LIMIT):.0f}bit"


# ------------------------------------------------------------------------------------------ the system


def _call(name: str, *numbers: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*numbers):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


@contextmanager
def _inside(space: int) -> Iterator[None]:
    """This thread, and processes that it starts, are in a network namespace."""
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
    """The same file under a number that shells leave alone, until the stack is unwound."""
    import fcntl  # not on Windows, which has no namespaces either

    found = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(file)
    stack.callback(os.close, found)
    return found


def _tun(space: int) -> int:
    """The other side of `link0` in a namespace, as an open file."""
    import fcntl

    with _inside(space):
        device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    return device


def _has_netem() -> bool:
    space = _namespace()
    try:
        _run("tc", space, ["qdisc add dev lo root netem delay 1ms"])
    except OSError:
        return False
    finally:
        os.close(space)
    return True


def _run(program: str, space: int, lines: Sequence[str], kept: Sequence[int] = ()) -> None:
    """Run `ip` or `tc` in a namespace. Raises OSError with what it said."""
    text = "".join(f"{line}\n" for line in lines)
    with _inside(space):
        done = subprocess.run([program, "-batch", "-"], input=text, capture_output=True, text=True, pass_fds=kept)
    if done.returncode:
        raise OSError(f"{program}: {' '.join(done.stderr.split())}")
