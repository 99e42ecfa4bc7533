"""The process that carries packets between network namespaces with the rate and latency of slow links (netns.py).

    sender's TUN ──▶ uplink: rate ──▶ latency ──▶ downlink: rate ──▶ receiver's TUN
                     a packet that would queue for longer than QUEUE_SECONDS is dropped, at either end

It exits when no process, neither the launcher nor a rank, holds the writing end of its lifeline any more.
"""

import json
import os
import select
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush

NETWORK = "10.77"
QUEUE_SECONDS = 0.2  # as routers buffer
AT_ONCE = 64  # packets read from one device before the next device is read
LARGEST = 65536


@dataclass
class RelayEnd:
    """The end of a rank's link at the relay.

    Attributes:
        device: its TUN device, opened non-blocking.
        rate: bytes/s, each way.
        latency: seconds, one way; between two ends the greater counts.
    """

    device: int
    rate: float
    latency: float
    up_free: float = 0.0
    down_free: float = 0.0


def relay(ends: Mapping[tuple[int, int], RelayEnd], lifeline: int) -> None:
    """Carry packets between the ends until the lifeline closes.

    Args:
        ends: by the last two bytes of the address.
        lifeline: the reading end of a pipe to which nothing is written.
    """
    due: list[tuple[float, int, bool, RelayEnd, bytes]] = []  # time, number, whether past the downlink
    number = 0
    network = bytes(map(int, NETWORK.split(".")))
    of_device = {end.device: end for end in ends.values()}
    while True:
        now = time.monotonic()
        while due and due[0][0] <= now:
            arrived, key, through, end, packet = heappop(due)
            if not through:
                begun = max(arrived, end.down_free + len(packet) / end.rate)  # it is forwarded while it arrives
                if begun - arrived > QUEUE_SECONDS:
                    continue
                end.down_free = begun
                if begun > now:
                    heappush(due, (begun, key, True, end, packet))
                    continue
            with suppress(OSError):  # the receiver exited or its queue is full: drop the packet
                os.write(end.device, packet)
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        ready, _, _ = select.select([lifeline, *of_device], [], [], wait)
        if lifeline in ready:
            return
        for device in ready:
            sender = of_device[device]
            for _ in range(AT_ONCE):
                try:
                    packet = os.read(device, LARGEST)
                except BlockingIOError:
                    break
                to = ends.get((packet[18], packet[19])) if packet[0] >> 4 == 4 and packet[16:18] == network else None
                now = time.monotonic()
                begun = max(now, sender.up_free)
                if to is None or begun - now > QUEUE_SECONDS:
                    continue
                sender.up_free = begun + len(packet) / sender.rate
                number += 1
                heappush(due, (sender.up_free + max(sender.latency, to.latency), number, False, to, packet))


def main(words: str) -> None:
    """Relay as a JSON text says: {"lifeline": file, "ends": [[pool, number, device, rate, latency], ...]}."""
    asked = json.loads(words)
    relay({(pool, number): RelayEnd(*rest) for pool, number, *rest in asked["ends"]}, asked["lifeline"])


if __name__ == "__main__":
    main(sys.argv[1])
