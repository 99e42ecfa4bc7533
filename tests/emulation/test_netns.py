"""True slow links: packets take the link of the fleet file, and the launcher leaves nothing behind."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import command, losses
from spawned_ranks import run

from motley.cli import main
from motley.emulation.apply import EmulatedFleet
from motley.emulation.launch import EmulatedLaunchConfig, rank_words
from motley.emulation.netns import Cable, Endpoint, SlowLinks, endpoints_of, wiring
from motley.emulation.roles import roles_of
from motley.emulation.user_relay import RelayEnd, relay
from motley.errors import InputError
from motley.parallel.communicator import Communicator

FLEET = """
pools:
  - {name: big, chip: desktop-core, chips_per_node: 1}
  - name: small
    chip: desktop-core
    chips_per_node: 2
    emulated: {speed: 0.5, link: {bandwidth: 80 Mb/s, latency: 1 ms}, fails_after: [4 steps]}
"""


def refusal() -> str | None:
    """Why this machine has no true links, if it has none."""
    try:
        with SlowLinks(endpoints_of(["a", "b"], [Cable()] * 2)):
            return None
    except InputError as error:
        return str(error)


REFUSED = refusal()
needs_links = pytest.mark.skipif(REFUSED is not None, reason=REFUSED or "")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    file = tmp_path / "pretend.yaml"
    file.write_text(FLEET)
    return file


# ------------------------------------------------------------------------------------------ the relay


class Ends:
    """Two ends of a relay that runs in a thread; a pair of sockets stands for each TUN device."""

    def __init__(self, rate: float) -> None:
        self.pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        for _, device in self.pairs:
            device.setblocking(False)
        here, self.lifeline = os.pipe()
        ends = {(1, number): RelayEnd(pair[1].fileno(), rate, 0.001) for number, pair in enumerate(self.pairs, 1)}
        self.thread = threading.Thread(target=relay, args=(ends, here), daemon=True)

    def end(self) -> None:
        os.close(self.lifeline)
        self.thread.join(30)
        assert not self.thread.is_alive(), "a relay ends when its lifeline is closed"


def packet(to: tuple[int, int, int, int], size: int = 100) -> bytes:
    return bytes([0x45]) + bytes(15) + bytes(to) + bytes(size - 20)


def test_a_packet_arrives_unchanged_at_its_address():
    ends = Ends(math.inf)
    ends.thread.start()
    first, second = (pair[0] for pair in ends.pairs)
    for sent in (packet((10, 77, 9, 9)), packet((8, 8, 8, 8)), bytes([0x60]) + bytes(60), packet((10, 77, 1, 2))):
        first.send(sent)
    assert second.recv(9000) == packet((10, 77, 1, 2))
    second.send(packet((10, 77, 1, 1), 70))
    assert first.recv(9000) == packet((10, 77, 1, 1), 70)
    ends.end()


def test_a_packet_that_would_queue_for_too_long_is_dropped():
    ends = Ends(rate=200.0)  # bytes a second: each packet takes half a second, and the next may wait a fifth
    first, second = (pair[0] for pair in ends.pairs)
    for size in (100, 101, 102):
        first.send(packet((10, 77, 1, 2), size))
    ends.thread.start()
    assert len(second.recv(9000)) == 100
    first.send(packet((10, 77, 1, 2), 103))
    assert len(second.recv(9000)) == 103
    ends.end()


# ------------------------------------------------------------------------------------------ the wiring


def three() -> list[Endpoint]:
    return endpoints_of(["a", "b", "b"], [Cable(1e6, 0.03), Cable(latency=0.05), Cable(latency=0.05)])


def test_every_rank_has_an_address_of_its_pool_and_packets_that_suit_its_rate():
    assert [endpoint.address for endpoint in three()] == ["10.77.1.1", "10.77.2.1", "10.77.2.2"]
    assert [Cable(rate).packet_bytes for rate in (1e6, 12.5e6, math.inf)] == [1500, 12500, 65000]
    with pytest.raises(InputError, match="choose --links wait"):
        endpoints_of(["a"] * 251, [Cable()] * 251)


def test_ranks_of_one_pool_share_a_bridge_and_reach_other_pools_over_their_link():
    hub, own = wiring(three(), [11, 12, 13])
    assert hub == [
        "link add pool1 type bridge",
        "link set pool1 up",
        "link add in1 type veth peer name pool0 netns /proc/self/fd/12",
        "link set in1 master pool1 up",
        "link add in2 type veth peer name pool0 netns /proc/self/fd/13",
        "link set in2 master pool1 up",
    ], "a rank that is alone in its pool needs no card for it"
    assert own[1] == [
        "link set lo up",
        "addr add 10.77.2.1/24 dev pool0",
        "link set pool0 up",
        "addr add 10.77.2.1/32 dev link0",
        "link set link0 mtu 65000 up",
        "route add 10.77.0.0/16 dev link0 src 10.77.2.1",
    ]


SERVE = "import socket; s = socket.create_server(('{}', 4711)); print(flush=True); c = s.accept()[0]\n"
TAKE = "n = 0\nwhile b := c.recv(65536): n += len(b)\nprint(n)"
GIVE = "import socket; socket.create_connection(('{}', 4711)).sendall(bytes({}))"


def transferred(links: SlowLinks, sender: int, receiver: int, size: int) -> int:
    """Send so many bytes; returns how many arrived."""
    to = links.address(receiver)
    server = subprocess.Popen(
        [*links.at(receiver), sys.executable, "-c", SERVE.format(to) + TAKE],
        stdout=subprocess.PIPE, text=True, pass_fds=links.kept,
    )  # fmt: skip
    assert server.stdout is not None
    server.stdout.readline()
    client = [*links.at(sender), sys.executable, "-c", GIVE.format(to, size)]
    subprocess.run(client, pass_fds=links.kept, check=True, timeout=60)
    return int(server.communicate(timeout=60)[0])


@needs_links
def test_only_packets_to_another_pool_take_the_slow_link():
    with SlowLinks(endpoints_of(["a", "b", "b"], [Cable(1e7, 0.001)] * 3)) as links:
        assert transferred(links, 1, 2, 300_000) == 300_000
        assert max(links.sent()) < 10_000, "ranks of one pool use the bridge"
        assert transferred(links, 0, 2, 300_000) == 300_000
        first, second, third = links.sent()
        assert first > 300_000
        assert second < 10_000
        assert 0 < third < 100_000, "acknowledgements"


# ------------------------------------------------------------------------------------------ the command


def test_a_rank_that_was_told_of_a_true_link_and_has_none_says_so(fleet: Path):
    emulated = EmulatedFleet(str(fleet), "wait", "relay", roles_of(str(fleet), 3, None))
    with pytest.raises(InputError, match="is what `motley launch emulated` tells ranks"):
        emulated.links(Communicator())


def test_a_chip_that_failed_does_not_fail_again_after_a_restart(fleet: Path):
    words = [rank_words(1, 3, start, 29500, None, EmulatedLaunchConfig(fleet)) for start in (0, 1)]
    assert ["TORCHELASTIC_RESTART_COUNT=0" in words[0], "TORCHELASTIC_RESTART_COUNT=1" in words[1]] == [True, True]
    assert words[0][-3:] == ["motley", "pretrain", f"--emulate={fleet}"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["missing.yaml"], "missing.yaml does not exist"),
        (["FLEET", "--job", "serve"], "--job is 'serve'; it must begin with pretrain or sft"),
        (["FLEET", "--job", "pretrain --emulate 1:2"], "--job has --emulate, which launch adds itself"),
        (["FLEET", "--restarts", "-1"], "--restarts is -1; it must be at least 0"),
        (["FLEET", "--plan", "FLEET"], "is not valid JSON"),
    ],
)
def test_settings_that_cannot_be_emulated_are_refused_in_one_sentence(
    options: list[str], said: str, fleet: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["launch", "emulated", *(str(fleet) if word == "FLEET" else word for word in options)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("motley launch emulated: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1


STAND_IN = """#!/bin/sh
# Replaces Python for the ranks; the relay is real.
case "$*" in *motley.emulation.user_relay*) echo $$ > relay; exec {python} "$@" ;; esac
trap 'echo told to end; exit 1' TERM
echo $$ > worker$RANK.new; mv worker$RANK.new worker$RANK; echo "$@"
while :; do sleep 0.05; done
"""
LAUNCH = "import sys; sys.executable = './python'; from motley.cli import main; sys.exit(main(sys.argv[1:]))"


def started(folder: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    (folder / "python").write_text(STAND_IN.format(python=sys.executable))
    (folder / "python").chmod(0o755)
    asked = [*before, sys.executable, "-c", LAUNCH, "launch", "emulated", "pretend.yaml", *words]
    heard = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background may have been told to ignore it
    try:
        return subprocess.Popen(asked, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, heard)


def pids_of(folder: Path, names: list[str], process: subprocess.Popen[str]) -> list[int]:
    """The processes that wrote these files, once all have."""
    deadline = time.monotonic() + 60
    while not all((folder / name).exists() for name in names):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int((folder / name).read_text()) for name in names]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_links
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_neither_ranks_nor_the_relay_outlive_the_launcher(how: signal.Signals, fleet: Path):
    process = started(fleet.parent)
    names = ["worker0", "worker1", "worker2", "relay"]
    pids = pids_of(fleet.parent, names, process)
    spaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids[:3]}
    assert len(spaces | {os.readlink("/proc/self/ns/net")}) == 4
    process.send_signal(how)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "and with them their namespaces, which have no names"
        time.sleep(0.02)


@pytest.mark.skipif(REFUSED is None and shutil.which("setpriv") is None, reason="there is no setpriv to lose rights by")
def test_a_machine_without_true_links_says_so_and_goes_on_only_if_asked_to(fleet: Path):
    less = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all") if REFUSED is None else ()
    process = started(fleet.parent, before=less)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert said.startswith("motley launch emulated: true links take Linux, root, ip and nsenter, and were refused here")
    assert said.count("\n") == 1
    process = started(fleet.parent, "--links=auto", before=less)
    pids_of(fleet.parent, ["worker0", "worker1", "worker2"], process)
    process.send_signal(signal.SIGINT)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert lines[0].endswith("Going on with links emulated by waiting")
    assert sum(line.endswith("-m motley pretrain --emulate=pretend.yaml") for line in lines) == 3
    assert "small.1: told to end" in lines


@needs_links
@pytest.mark.slow(20)
def test_a_fleet_emulated_over_true_links_learns_what_one_process_learns(data: Path, shape: Path, fleet: Path):
    fleet.write_text(FLEET.replace("chips_per_node: 2", "chips_per_node: 1").replace("4 steps", "5 steps"))
    folder = fleet.parent
    settings = {"precision": "fp32", "steps": 8, "emulate_by": "wait", "checkpoint_every": 3}
    job = command(folder / "run", data, shape, **settings)[3:]
    asked = ["launch", "emulated", str(fleet), f"--job={' '.join(job)}", "--restarts=1", "--json"]
    done = subprocess.run([sys.executable, "-m", "motley", *asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 ms to other pools, over a true link (network namespaces" in done.stderr
    assert "small.0 (rank 1) exited with status 137" in done.stderr
    result = json.loads(done.stdout)
    assert result["links"] == "relay"
    assert min(result["bytes_sent"]) > 100_000, "gradients and weights"
    alone = command(folder / "alone", data, shape, precision="fp32", steps=8)
    done = run(alone)
    assert done.returncode == 0, done.stderr
    assert losses(folder / "run") == pytest.approx(losses(folder / "alone"), rel=1e-4)
