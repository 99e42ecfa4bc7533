"""A fleet emulated on one machine: roles of ranks, limits on their speed, delayed links, failures."""

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cgroup2 import Group
from commands import command, losses, torchrun
from layouts import TWO_STAGES, settings
from spawned_ranks import on_ranks, run
from tiny_models import DEEP, FEW, Rows, random_model

from motley.cli import main
from motley.emulation import cpu_throttle
from motley.emulation.cpu_throttle import GROUP, Throttle, _groups, throttle
from motley.emulation.link_delay import DelayedLinks
from motley.emulation.roles import roles_of, speeds_of
from motley.errors import InputError
from motley.model import experts
from motley.parallel.communicator import Communicator
from motley.parallel.rank import Ranks
from motley.parallel.run import pretrain
from motley.train.checkpoint import checkpoints
from motley.train.config import PretrainConfig
from motley.train.run_folder import open_run

FLEET = """
pools:
  - {name: big, chip: desktop-core, chips_per_node: 1, emulated: {memory: 2 GB}}
  - name: small
    chip: desktop-core
    chips_per_node: 2
    emulated: {speed: 0.25, precision: fp32, link: {bandwidth: 8 Mb/s, latency: 30 ms}, fails_after: [4 steps]}
"""


@pytest.fixture
def fleet(tmp_path: Path) -> str:
    file = tmp_path / "pretend.yaml"
    file.write_text(FLEET)
    return str(file)


# ------------------------------------------------------------------------------------------ roles


def test_ranks_emulate_the_chips_in_the_order_of_the_file(fleet: str):
    roles = roles_of(fleet, 3, None)
    assert [(role.pool, role.chip) for role in roles] == [("big", 0), ("small", 0), ("small", 1)]
    assert [role.emulated.speed for role in roles] == [1.0, 0.25, 0.25]
    assert [role.fails_after for role in roles] == [None, (4, "steps"), None]
    assert roles[1].words("relay") == (
        "; computes in fp32; 1 MB/s and 30 ms to other pools, over a true link (network namespaces and a relay)"
        "; fails after 4 steps"
    )


def test_with_a_plan_each_rank_emulates_the_chip_that_the_plan_gave_it(fleet: str):
    pools = [{"pool": "big"}, {"pool": "small"}]
    groups = [
        {"dp": 1, "stages": [{"pool": "small"}, {"pool": "big"}]},
        {"dp": 1, "stages": [{"pool": "small"}]},
    ]
    roles = roles_of(fleet, 3, {"pools": pools, "groups": groups})
    assert [(role.pool, role.chip) for role in roles] == [("small", 0), ("big", 0), ("small", 1)]
    with pytest.raises(InputError, match="the plan is for 3 ranks, but 4 were started"):
        roles_of(fleet, 4, {"pools": pools, "groups": groups})
    groups[0]["dp"] = 2
    with pytest.raises(InputError, match=r"2 ranks in pool big, .* has 1 such chips; make the plan with --fleet"):
        roles_of(fleet, 5, {"pools": pools, "groups": groups})


def test_another_number_of_ranks_than_chips_is_refused(fleet: str):
    with pytest.raises(InputError, match=r"pretend.yaml has 3 chips, but 4 ranks were started"):
        roles_of(fleet, 4, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("missing.yaml", "neither a fleet file nor speeds"),
        ("1:2", "one number above 0 for each of the 3 ranks"),
        ("1:0:2", "one number above 0"),
        ("1:inf:2", "one number above 0"),
        ("1:nan:2", "one number above 0"),
    ],
)
def test_text_that_is_neither_a_fleet_file_nor_speeds_is_refused(text: str, said: str):
    with pytest.raises(InputError, match=said):
        speeds_of(text, 3)


# ------------------------------------------------------------------------------------------ speed


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.cpu, self.slept = 0.0, 0.0

    def process_time(self) -> float:
        return self.cpu

    def monotonic(self) -> float:
        return 100.0

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


def test_waiting_makes_work_last_as_long_as_on_a_slower_chip(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(cpu_throttle, "time", clock)
    slow = Throttle(0.25, "wait", _cpu=0.0)
    clock.cpu += 2.0
    assert slow.pace(2.0) == clock.slept == 6.0
    clock.cpu += 2.0  # others took half of the machine: the work alone would have taken 2 seconds
    assert slow.pace(4.0) == 4.0
    clock.cpu += 6.0  # of three threads
    assert slow.pace(2.0) == 6.0
    assert Throttle(1.0, "wait", _cpu=0.0).pace(2.0) == 0.0


@pytest.mark.parametrize("speed", [0.0, -1.0, 1.5])
def test_a_speed_that_is_no_share_is_refused(speed: float):
    with pytest.raises(InputError, match="above 0 and at most 1"):
        throttle(speed)


SPAWN = multiprocessing.get_context("spawn")


def capped(pipe: Any) -> None:
    """Work for a while at a tenth of a core; then say how much CPU time that took, and wait to be killed."""
    torch.set_num_threads(1)
    try:
        slow = throttle(0.1, "cap")
    except InputError as error:
        return pipe.send(str(error))
    started, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < 0.5:
        pass
    pipe.send((time.process_time() - used, slow.means))
    pipe.recv()
    slow.end()
    pipe.send("free")
    pipe.recv()
    throttle(0.1, "cap")
    pipe.send("capped again")
    pipe.recv()


def test_a_cap_takes_cpu_time_away_and_leaves_no_group_behind_even_when_its_process_is_killed():
    ours, theirs = SPAWN.Pipe()
    worker = SPAWN.Process(target=capped, args=(theirs,), daemon=True)
    worker.start()
    answer = ours.recv()
    if isinstance(answer, str):
        pytest.skip(f"no cap was tested: {answer}")
    used, means = answer
    home = _groups()[2]
    group = home / f"{GROUP}{worker.pid}"
    assert used <= 0.2, "at most a tenth of half a second, and a period or two"
    assert "control group" in means
    assert group.is_dir()
    ours.send("end")
    assert ours.recv() == "free"
    assert not group.exists()
    ours.send("again")
    assert ours.recv() == "capped again"
    assert group.is_dir()
    worker.kill()
    worker.join()
    assert group.is_dir(), "nobody is left who could remove it"
    cpu_throttle._remove_stale(home)
    assert not group.exists()


def version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, **root: Any) -> tuple[Group, Group]:
    """(the root of a played hierarchy, this process's group in it)."""
    mount = Group.mounted(tmp_path / "cgroup", **root)
    (tmp_path / "membership").write_text(f"0::{own}\n")
    monkeypatch.setattr(cpu_throttle, "MOUNT", mount)
    monkeypatch.setattr(cpu_throttle, "MEMBERSHIP", tmp_path / "membership")
    group = mount
    for name in own.strip("/").split("/") if own != "/" else ():
        (group / "cgroup.subtree_control").write_text("+cpu")
        group = group / name
        group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return mount, group


@pytest.mark.parametrize("own", ["/", "/work.scope", "/user.slice/work.scope"])
def test_version_2_caps_beside_the_own_group_and_puts_everything_back(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, group = version_2(tmp_path, monkeypatch, own)
    home = group if own == "/" else group.parent
    dead, alive = home / f"{GROUP}{2**30}", home / f"{GROUP}{os.getppid()}"
    for other in (dead, alive):
        other.mkdir()
    slow = throttle(0.25, "cap")
    made = home / f"{GROUP}{os.getpid()}"
    assert slow.means == "CPU time capped by a control group (version 2)"
    assert "cpu" in home.handed_on
    assert (made / "cpu.max").read_text() == "5000 20000", "a quarter of one thread"
    assert made.processes == [str(os.getpid())]
    assert group.processes == []
    assert not dead.exists()
    assert alive.is_dir()
    slow.end()
    assert group.processes == [str(os.getpid())]
    assert not made.exists()


@pytest.mark.parametrize(
    ("own", "root"),
    [
        ("/", {"controllers": "hugetlb"}),  # the cpu controller belongs to a hierarchy of version 1
        ("/", {"real": False}),  # a container's root, which has processes and so hands nothing on
    ],
)
def test_version_2_without_a_cpu_controller_for_new_groups_waits_instead_and_leaves_nothing(
    own: str, root: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, group = version_2(tmp_path, monkeypatch, own, **root)
    with pytest.raises(InputError, match="CPU time cannot be capped here"):
        throttle(0.25, "cap")
    assert throttle(0.25).by == "wait"
    assert [child for child in mount.iterdir() if child.is_dir()] == []
    assert group.processes == [str(os.getpid())]


def test_the_removed_way_priority_is_answered_with_one_sentence(capsys: pytest.CaptureFixture[str]):
    for words in (["--emulate-by", "priority"], ["--emulate-by=priority"]):
        assert main(["pretrain", "--emulate=1:2", *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("motley pretrain: --emulate-by priority was removed; choose cap (")
        assert " or wait (" in said
        assert said.count("\n") == 1


def test_a_run_that_was_emulated_by_priority_goes_on(tmp_path: Path):
    open_run(tmp_path, "pretrain", PretrainConfig(emulate="1:2"), {})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"emulate_by": "priority", "emulate_links": "netem"}))
    open_run(tmp_path, "pretrain", PretrainConfig(emulate="1:2"), {})
    assert json.loads(file.read_text())["emulate_by"] == "auto"


# ------------------------------------------------------------------------------------------ links


def links(rank: int, *pools: str, latency: float = 0.05, rate: float = 1e6) -> DelayedLinks:
    return DelayedLinks(rank, pools, (latency,) * len(pools), (rate,) * len(pools))


def test_a_link_carries_one_message_after_the_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("motley.emulation.link_delay.time", Clock())
    cable = links(0, "a", "b")
    first, second = cable.arrival(1, 1_000_000), cable.arrival(1, 2_000_000)
    assert first == pytest.approx(101.05)
    assert second - first == pytest.approx(2.0), "the first took a second to leave; latencies pass at once"


def test_collectives_take_what_crosses_between_pools(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr("motley.emulation.link_delay.time", clock)

    def taken(rank: int, *messages: Any) -> float:
        clock.slept = 0.0
        links(rank, "a", "a", "b").collectives(messages)
        return clock.slept

    everyone = (0, 1, 2)
    assert taken(0, ((0, 1), None, 4_000_000)) == 0, "within a pool"
    assert taken(0, (everyone, None, 4_000_000)) == pytest.approx(4.05), "a ring of two pools: all of it each way"
    assert taken(0, (everyone, 0, 1_000_000), (everyone, 2, 3_000_000)) == pytest.approx(3.05), "both ways at once"
    assert taken(2, (everyone, 0, 1_000_000), (everyone, 2, 3_000_000)) == pytest.approx(3.05), "the same at both ends"


def talk_over(comm: Communicator, pools: tuple[str, ...]) -> tuple[float, float, list[float], list[float]]:
    comm = Communicator(comm.rank, comm.size, links=links(comm.rank, *pools, latency=0.2, rate=1e9))
    started = time.monotonic()
    total = comm.sum(torch.ones(3))
    summed = time.monotonic() - started
    got = torch.zeros(4)
    if comm.rank == 0:
        comm.send(torch.arange(4.0), 1)
    else:
        comm.receive(got, 0)
    return summed, time.monotonic() - started, total.tolist(), got.tolist()


def test_messages_between_pools_arrive_late_and_unchanged():
    (summed, _, total, _), (_, received, _, got) = on_ranks(2, talk_over, ("a", "b"))
    assert summed >= 0.2
    assert received >= 0.4
    assert total == [2.0] * 3
    assert got == [0.0, 1.0, 2.0, 3.0]


def step_with_and_without_cables(comm: Communicator) -> list[Any]:
    """The same step of a pipeline twice, its stages in two pools the first time."""
    experts.PAD = FEW
    found = []
    for cable in (links(comm.rank, "a", "b", latency=0.001, rate=1e9), None):
        ranks = Ranks(DEEP, settings(), TWO_STAGES, Communicator(comm.rank, comm.size, links=cable))
        ranks.take_state((dict(random_model(3, DEEP).state_dict()), {}) if comm.leads else None)
        losses, norm = ranks.gradient(ranks.read(Rows(), 0))  # type: ignore[arg-type]
        found.append((losses.main, losses.balance, norm))
    return found


def test_a_step_over_delayed_links_is_the_same_step():
    for cabled, plain in on_ranks(2, step_with_and_without_cables):
        assert cabled == pytest.approx(plain, rel=1e-6)


# ------------------------------------------------------------------------------------------ the real command


@pytest.mark.slow(20)
def test_a_chip_that_fails_is_killed_at_its_step_and_the_restarted_job_learns_what_it_would_have(
    data: Path,
    shape: Path,
    tmp_path: Path,
):
    out, file = tmp_path / "run", tmp_path / "pretend.yaml"
    file.write_text(FLEET.replace("chips_per_node: 2", "chips_per_node: 1").replace("4 steps", "9 steps"))
    arguments = command(out, data, shape, precision="fp32", steps=12, emulate=file, emulate_by="wait")
    done = subprocess.run(torchrun(2, arguments, "--max-restarts=1"), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "rank 0 emulates chip 0 of pool big: 1 of full speed" in done.stderr
    assert "rank 1 emulates chip 0 of pool small: 0.25 of full speed, by waiting after each piece" in done.stderr
    assert "rank 1 fails now" in done.stderr
    undisturbed = tmp_path / "undisturbed"
    done = run(command(undisturbed, data, shape, precision="fp32", steps=12))
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-4)


@pytest.mark.slow(15)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_reaches_one_rank_only_ends_all_with_a_checkpoint(
    number: int,
    data: Path,
    shape: Path,
    tmp_path: Path,
):
    config = PretrainConfig(
        out=tmp_path / "run", data=(str(data),), model=str(shape), steps=100_000, batch_rows=4, seq_len=64,
        device="cpu", precision="fp32", warmup_steps=5,
    )  # fmt: skip
    (first, folder), (second, _) = on_ranks(2, stopped_run, config, int(number))
    assert first == second
    assert "the same command goes on from there" in first
    assert folder == f"step-{int(first.split()[3].rstrip(';')):08d}"


def stopped_run(comm: Communicator, config: PretrainConfig, number: int) -> tuple[str, str]:
    """(what a rank said when it ended, the newest checkpoint); only rank 1 gets the signal."""
    os.environ["WORLD_SIZE"] = str(comm.size)
    metrics = config.out / "metrics.jsonl"

    def ask() -> None:
        while not (metrics.is_file() and metrics.read_text().count("\n") > 5):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    if comm.rank == 1:
        threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as stopped:
        pretrain(config)
    return str(stopped.value), checkpoints(config.out)[-1].name
