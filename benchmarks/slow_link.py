"""A slow link between places on this machine: real sockets, real TCP, a rate and a delay that are not.

    namespace motley-0   ┌ TUN 10.77.0.1 ┐  packets   ┌─────────────────────────────────────────┐
    worker 0 ───────────▶│               │───────────▶│ relay: an uplink of so many bits/s each,│
    namespace motley-1   ┌ TUN 10.77.0.2 ┐            │ a queue that overflows, half of the     │
    worker 1 ───────────▶│               │◀───────────│ round trip later the other's device     │
                                                      └─────────────────────────────────────────┘

Where the kernel has the queueing discipline `netem`, `tc` does the same; this needs only namespaces and /dev/net/tun
(root). Packets of 9,000 bytes keep the relay at a few percent of a core.
"""

import ctypes
import fcntl
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

PACKET_BYTES = 9000
QUEUE_SECONDS = 0.2  # what waits longer for its uplink is dropped, as routers do
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
NAME, DEVICE = "motley-{}", "link0"


class SlowLink:
    """Places 0 … count - 1, each with an uplink; use it as a context.

    Args:
        count: places.
        megabits: a second, of each uplink.
        round_trip: seconds that a packet and its answer take on an idle link.
    """

    def __init__(self, count: int, megabits: float, round_trip: float) -> None:
        self.count, self.megabits, self.round_trip = count, megabits, round_trip

    def __enter__(self) -> Self:
        for place in range(self.count):
            subprocess.run(["ip", "netns", "delete", NAME.format(place)], capture_output=True)
            subprocess.run(["ip", "netns", "add", NAME.format(place)], check=True)
            subprocess.run([*self.at(place), "ip", "link", "set", "lo", "up"], check=True)
        words = [sys.executable, __file__, "relay", str(self.count), str(self.megabits), str(self.round_trip)]
        self._relay = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != "ready\n":
            raise SystemExit("no slow link here: it needs root, network namespaces and /dev/net/tun")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._relay.kill()
        self._relay.wait()
        for place in range(self.count):
            subprocess.run(["ip", "netns", "delete", NAME.format(place)], check=True)

    def at(self, place: int) -> list[str]:
        """What to put before a command that is to run at a place."""
        return ["ip", "netns", "exec", NAME.format(place)]

    def address(self, place: int) -> str:
        return f"10.77.0.{place + 1}"

    def measured(self) -> tuple[float, float]:
        """(megabits a second of one TCP stream, seconds of a round trip) between places 0 and 1."""
        words = [sys.executable, __file__]
        reader = subprocess.Popen([*self.at(0), *words, "read", self.address(0)], stdout=subprocess.PIPE, text=True)
        time.sleep(0.5)
        subprocess.run([*self.at(1), *words, "write", self.address(0)], check=True)
        rate, trip = reader.communicate()[0].split()
        return float(rate), float(trip)


def relay(count: int, megabits: float, round_trip: float) -> None:
    """Carry packets between the places until killed."""
    home, devices = os.open("/proc/self/ns/net", os.O_RDONLY), []
    for place in range(count):
        _enter(os.open(f"/run/netns/{NAME.format(place)}", os.O_RDONLY))
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
        for words in (["addr", "add", f"10.77.0.{place + 1}/24"], ["link", "set", "mtu", str(PACKET_BYTES), "up"]):
            subprocess.run(["ip", *words, "dev", DEVICE], check=True)
        devices.append(device)
    _enter(home)
    print("ready", flush=True)
    free = [0.0] * count  # when each uplink has sent what it took on
    under_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, place, packet = under_way.popleft()
            os.write(devices[place], packet)
        wait = under_way[0][0] - time.monotonic() if under_way else None
        ready, _, _ = select.select(devices, [], [], None if wait is None else max(0.0, wait))
        for device in ready:
            place, packet = devices.index(device), os.read(device, 65536)
            now = time.monotonic()
            to = packet[19] - 1 if packet[0] >> 4 == 4 and packet[16:19] == bytes([10, 77, 0]) else -1
            start = max(now, free[place])
            if not 0 <= to < count or start - now > QUEUE_SECONDS:
                continue
            free[place] = start + len(packet) * 8 / (megabits * 1e6)
            item = (free[place] + round_trip / 2, to, packet)
            position = len(under_way)
            while position and under_way[position - 1][0] > item[0]:
                position -= 1
            under_way.insert(position, item)


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def read(address: str) -> None:
    """Answer pings of one byte, then take a stream; print its rate and the median round trip that the writer saw."""
    with socket.create_server((address, 4711)) as server:
        connection, _ = server.accept()
        with connection:
            for _ in range(10):
                connection.sendall(connection.recv(1))
            trip, total, start, first = connection.recv(64).decode().strip(), 0, 0.0, 0
            while block := connection.recv(1 << 20):
                total += len(block)
                if not start and total > 5_000_000:  # the stream has found its pace
                    start, first = time.monotonic(), total
            print((total - first) * 8e-6 / (time.monotonic() - start), trip)


def write(address: str) -> None:
    with socket.create_connection((address, 4711)) as connection:
        trips = []
        for _ in range(10):
            start = time.monotonic()
            connection.sendall(b"x")
            connection.recv(1)
            trips.append(time.monotonic() - start)
        connection.sendall(f"{statistics.median(trips):.4f}".ljust(64).encode())
        time.sleep(0.2)
        connection.sendall(bytes(40_000_000))


def main(words: Sequence[str]) -> None:
    if words[0] == "relay":
        relay(int(words[1]), float(words[2]), float(words[3]))
    elif words[0] in ("read", "write"):
        {"read": read, "write": write}[words[0]](words[1])
    else:
        with SlowLink(2, float(words[0]), float(words[1])) as link:
            print("{:.1f} Mb/s, {:.4f} s".format(*link.measured()))


if __name__ == "__main__":
    main(sys.argv[1:])
