"""How fast a true slow link of this machine is (motley.emulation.netns): one TCP stream and a round trip between pools.

    python benchmarks/slow_link.py [MEGABITS ROUND_TRIP_SECONDS] [--quick]

Making links takes root. --quick ends within 50 seconds: 100 Mb/s and 50 ms, a quarter of the bytes.
"""

import argparse
import socket
import statistics
import subprocess
import sys
import time

from budget import QUICK_SECONDS, Budget, kept

from motley.emulation.netns import Cable, SlowLinks, endpoints_of
from motley.errors import InputError

FOUND_ITS_PACE_BYTES, STREAM_BYTES, QUICK_BYTES = 5_000_000, 40_000_000, 10_000_000
MEGABITS, ROUND_TRIP_SECONDS = 100.0, 0.05


def slow_links(count: int, megabits: float, round_trip: float) -> SlowLinks:
    """Ranks in a pool each, whose links to each other have a rate (Mb/s) and a round trip (s)."""
    return SlowLinks(
        endpoints_of([str(rank) for rank in range(count)], [Cable(megabits * 1e6 / 8, round_trip / 2)] * count)
    )


def measured(links: SlowLinks, stream_bytes: int = STREAM_BYTES) -> tuple[float, float]:
    """(megabits a second of one TCP stream, seconds of a round trip) between ranks 0 and 1."""
    words = [sys.executable, __file__]
    reader = subprocess.Popen(
        [*links.at(0), *words, "read", links.address(0)], stdout=subprocess.PIPE, text=True, pass_fds=links.kept
    )
    assert reader.stdout is not None
    reader.stdout.readline()
    subprocess.run(
        [*links.at(1), *words, "write", links.address(0), str(stream_bytes)], check=True, pass_fds=links.kept
    )
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


def write(address: str, stream_bytes: int) -> None:
    with socket.create_connection((address, 4711)) as connection:
        trips = []
        for _ in range(10):
            start = time.monotonic()
            connection.sendall(b"x")
            connection.recv(1)
            trips.append(time.monotonic() - start)
        connection.sendall(f"{statistics.median(trips):.5f}".ljust(64).encode())
        time.sleep(0.2)
        connection.sendall(bytes(stream_bytes))


def main() -> None:
    match sys.argv[1:]:  # what `measured` starts at the ends of a link
        case ["read", address]:
            read(address)
            return
        case ["write", address, size]:
            write(address, int(size))
            return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabits", type=float, nargs="?", default=MEGABITS, help="a second, each direction")
    parser.add_argument("round_trip", type=float, nargs="?", default=ROUND_TRIP_SECONDS, help="seconds")
    parser.add_argument("--quick", action="store_true", help=f"few bytes, within {QUICK_SECONDS:g} seconds")
    arguments = parser.parse_args()
    try:
        budget = Budget(QUICK_SECONDS if arguments.quick else None)
        with kept(budget, "slow_link"), slow_links(2, arguments.megabits, arguments.round_trip) as links:
            rate, trip = measured(links, QUICK_BYTES if arguments.quick else STREAM_BYTES)
            print(f"{rate:.1f} Mb/s, {1e3 * trip:.2f} ms there and back")
    except InputError as error:
        raise SystemExit(f"slow_link: {error}") from None


if __name__ == "__main__":
    main()
