"""How fast a true slow link of this machine is (motley.train.slow_link): one TCP stream and a round trip between pools.

python benchmarks/slow_link.py MEGABITS ROUND_TRIP_SECONDS
"""

import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from motley.train.slow_link import Cable, SlowLinks, places_of

FOUND_ITS_PACE_BYTES, STREAM_BYTES = 5_000_000, 40_000_000


def slow_links(count: int, megabits: float, round_trip: float) -> SlowLinks:
    """Workers in a pool each, whose links to each other have a rate (Mb/s) and a round trip (s)."""
    return SlowLinks(
        places_of([str(rank) for rank in range(count)], [Cable(megabits * 1e6 / 8, round_trip / 2)] * count)
    )


def measured(links: SlowLinks) -> tuple[float, float]:
    """(megabits a second of one TCP stream, seconds of a round trip) between workers 0 and 1."""
    words = [sys.executable, __file__]
    reader = subprocess.Popen(
        [*links.at(0), *words, "read", links.address(0)], stdout=subprocess.PIPE, text=True, pass_fds=links.kept
    )
    assert reader.stdout is not None
    reader.stdout.readline()
    subprocess.run([*links.at(1), *words, "write", links.address(0)], check=True, pass_fds=links.kept)
    rate, trip = reader.communicate()[0].split()
    return float(rate), float(trip)


def read(address: str) -> None:
    """Answer pings of one byte, then take a stream; print its rate and the median round trip that the writer saw."""
    with socket.create_server((address, 4711)) as server:
        print("listening", flush=True)
        connection, _ = server.accept()
        with connection:
            for _ in range(10):
                connection.sendall(connection.recv(1))
            trip, total, start, first = connection.recv(64).decode().strip(), 0, 0.0, 0
            while block := connection.recv(1 << 20):
                total += len(block)
                if not start and total > FOUND_ITS_PACE_BYTES:
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
        connection.sendall(f"{statistics.median(trips):.5f}".ljust(64).encode())
        time.sleep(0.2)
        connection.sendall(bytes(STREAM_BYTES))


def main(words: Sequence[str]) -> None:
    if words[0] in ("read", "write"):
        {"read": read, "write": write}[words[0]](words[1])
        return
    with slow_links(2, float(words[0]), float(words[1])) as links:
        rate, trip = measured(links)
        print(f"{rate:.1f} Mb/s, {1e3 * trip:.2f} ms there and back; made by {links.way}")


if __name__ == "__main__":
    main(sys.argv[1:])
