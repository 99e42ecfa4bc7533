"""Workers come and go: what is lost is said, and the loss is the undisturbed run's."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from commands import STEPS, TINY, children, command, events, losses, records, steps_done, torchrun, until, wait
from elastic_members import ROWS, arrived, member
from spawned_ranks import SERVER
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

import motley.parallel.build
import motley.parallel.elastic.agent
from motley.errors import CommunicationError, InputError
from motley.model import ModelConfig
from motley.parallel.communicator import Communicator, free_port
from motley.parallel.elastic.agent import ElasticCommunicator, _part
from motley.parallel.elastic.rendezvous import Door
from motley.parallel.run import pretrain
from motley.train.config import PretrainConfig
from motley.train.metrics import MetricsWriter, RecentRecords, read_metrics, records_of
from motley.train.run_state import Position, RunState, stop_requests


def started(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow(15)
def test_torchrun_starts_a_crew_again_and_the_steps_done_twice_are_reported(
    data: Path, shape: Path, alone: Path, tmp_path: Path
):
    out = tmp_path / "run"
    arguments = command(out, data, shape, precision="fp32", checkpoint_every=20)
    process = started(torchrun(2, arguments, "--max-restarts=1"))
    until(lambda: steps_done(out) >= 5, process)
    os.kill(min(children(process.pid)), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
    (event,) = events(out)
    assert event.startswith("steps 1 to ")
    assert event.endswith(" are computed again, from the state after step 0")


@pytest.mark.slow(15)
def test_a_worker_that_stays_silent_beyond_the_patience_of_the_others_is_named(data: Path, shape: Path, tmp_path: Path):
    out = tmp_path / "run"
    arguments: Any = command(out, data, shape, precision="fp32", timeout=8, steps=100_000)
    process = started(torchrun(2, arguments))
    until(lambda: steps_done(out) >= 2, process)
    victim = max(children(process.pid))
    os.kill(victim, signal.SIGSTOP)
    assert process.stdout is not None
    said = next(line for line in process.stdout if "lost" in line)
    os.kill(victim, signal.SIGKILL)  # torchrun would give it 30 s to end by itself
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.startswith(f"motley pretrain: worker 0 lost worker 1, whose process {victim} is stopped, while ")
    assert said.endswith("start the job again, it goes on from its newest checkpoint\n")


@pytest.mark.slow(15)
def test_workers_go_on_without_torchrun_and_say_so(data: Path, shape: Path, alone: Path, tmp_path: Path):
    out = tmp_path / "run"
    process = started(torchrun(2, command(out, data, shape, precision="fp32")))
    until(lambda: steps_done(out) >= 2, process)
    process.kill()
    process.communicate(timeout=120)  # the workers hold the other end
    wait((out / "result.json").is_file)
    assert events(out) == ["torchrun is gone: the workers go on, but nobody would start them again"]
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)


def test_a_crew_that_goes_on_and_parts_before_its_first_step_keeps_what_is_written_of_the_checkpoint(tmp_path: Path):
    written = [{"kind": "train", "step": step, "loss": 1.0} for step in (4, 5)]
    with MetricsWriter(tmp_path) as file:
        for record in written:
            file.write(**record)
    course = RunState(Position(step=5), recent=records_of(tmp_path, 5))
    for message in ("first", "second"):  # crews that meet and part again
        with MetricsWriter(tmp_path, course.written) as file:
            RecentRecords(file, course.recent).write("event", step=5, message=message)
    assert read_metrics(tmp_path)[:2] == written
    assert [record["message"] for record in read_metrics(tmp_path)[2:]] == ["first", "second"]


class Empty(Door):
    """A door that one member has left for ever."""

    def parted(self, names: Any) -> str:
        return f"worker {names.index('b')}, who is gone,"


def test_one_that_dies_while_members_meet_is_named_and_nobody_is_told_to_start_again(tmp_path: Path):
    comm = ElasticCommunicator(0, 2, door=Empty(tmp_path, "a", 1.0), names=("a", "b"))

    def reset() -> None:
        raise RuntimeError("Connection reset by peer")

    with pytest.raises(
        CommunicationError, match=r"worker 0 lost worker 1, who is gone, while meeting: Connection reset by peer$"
    ):
        comm.talk("meeting", reset)


@pytest.mark.slow(15)
@pytest.mark.parametrize("seed", range(2))
def test_a_live_crew_loses_one_and_gains_one_and_learns_what_one_process_learns(
    seed: int, data: Path, shape: Path, alone: Path, tmp_path: Path
):
    """Three begin; one, worker 0 or another, is killed in the middle of a step; one that is not like them is sent away;
    a third joins."""
    out, gates, chance = tmp_path / "run", tmp_path / "gates", random.Random(seed)
    gates.mkdir()
    for step in (0, 6, 12, 18):
        (gates / f"{step}.gate").touch()
    arguments = {
        "out": out, "data": (str(data),), "model": str(shape), "steps": STEPS, "batch_rows": ROWS, "micro_batch": 3,
        "seq_len": 64, "valid_every": 10, "checkpoint_every": 7, "keep_last": 2, "precision": "fp32",
        "warmup_steps": 5, "seq_len_warmup": "16:0.3,32:0.6", "ngram_weight": 0.5, "device": "cpu",
        "live": True, "patience": 60.0,
    }  # fmt: skip

    def begin(program: str = "same", make: str = "same") -> Any:
        process = SERVER.Process(target=member, args=(gates, tmp_path / "said", program, make, arguments), daemon=True)
        process.start()
        return process

    comm = Door(out / "crew", "", 0)
    processes = [begin()]
    wait(lambda: len(arrived(gates, 0)) == 1)  # the first works alone until the others knock
    processes += [begin(), begin()]
    wait(lambda: len(comm.members()) == 3 and comm.knocking(2) == 2)
    (gates / "0.gate").unlink()
    wait(lambda: len(arrived(gates, 6)) == 3)
    victim = processes.pop(0) if seed == 0 else processes.pop(chance.choice([1, 2]))
    os.kill(victim.pid, signal.SIGKILL)
    (gates / "6.gate").unlink()
    wait(lambda: len(arrived(gates, 12)) == 2)
    stranger = begin(program="other") if seed == 0 else begin(make="other")
    stranger.join(90)
    sent_away = f"this worker has {'the processor' if seed else 'source code'} other, the crew at work has same;"
    assert (tmp_path / "said").read_text().startswith(sent_away)
    processes.append(begin())
    wait(lambda: comm.knocking(comm.newest().number + 1) == 1)
    (gates / "12.gate").unlink()
    wait(lambda: len(arrived(gates, 18)) == 3)
    (gates / "18.gate").unlink()
    for process in processes:
        process.join(90)
        assert process.exitcode == 0
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
    steps = [record["step"] for record in records(out) if record["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    tokens = {r["step"]: r["tokens"] for r in records(out) if r["kind"] == "train"}
    assert tokens == {r["step"]: r["tokens"] for r in records(alone) if r["kind"] == "train"}
    said = events(out)
    assert said[-2] == "2 workers go on with step 7 (0 new, 1 gone); what the gone had computed of it is computed again"
    assert said[-1] == "3 workers go on with step 14 (1 new, 0 gone)"
    assert json.loads((out / "result.json").read_text())["step"] == STEPS


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_live_worker_that_is_to_share_its_state_is_refused(zero: Any, tmp_path: Path):
    with pytest.raises(InputError, match=f"^--live beside --zero {zero}: .* leave --zero out") as refused:
        pretrain(PretrainConfig(out=tmp_path, elastic=True, zero=zero, device="cpu"))
    assert "\n" not in str(refused.value)


def test_workers_share_what_was_asked_for_and_live_ones_nothing():
    shape = ModelConfig.from_hf(TINY)

    def zero(**settings: Any) -> int:
        (island,), _ = motley.parallel.build.islands_for(PretrainConfig(**settings), shape, Communicator(0, 2), None)
        return island.layout.zero

    assert [zero(), zero(zero=0), zero(zero=3), zero(elastic=True), zero(elastic=True, zero=0)] == [1, 0, 3, 0, 0]
    with pytest.raises(InputError, match=r"^--zero 2 beside --plan: the plan says itself what workers share"):
        motley.parallel.build.islands_for(PretrainConfig(zero=2), shape, Communicator(0, 2), {"groups": []})


@pytest.mark.usefixtures("handlers")
def test_who_was_asked_to_stop_still_is_when_the_crew_ends_for_another_reason():
    course = RunState()

    def step() -> None:
        with stop_requests(course):
            os.kill(os.getpid(), signal.SIGTERM)
            assert course.asked_to_stop
            raise CommunicationError("somebody else is gone")

    with pytest.raises(CommunicationError):
        step()
    assert course.asked_to_stop
    assert not RunState().asked_to_stop


@pytest.fixture
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handlers")
def test_one_that_lost_the_others_is_not_ended_before_it_has_said_so():
    """torchrun sends SIGTERM to all who are left, a tenth of a second after one died."""
    course = RunState()

    def step() -> None:
        with stop_requests(course):
            raise CommunicationError("somebody is gone")

    with pytest.raises(CommunicationError):
        step()
    os.kill(os.getpid(), signal.SIGTERM)
    assert course.asked_to_stop


def test_a_crew_that_never_met_leaves_no_number_behind_that_others_do_not_have():
    limit = timedelta(seconds=1)
    store = TCPStore("127.0.0.1", free_port(), is_master=True, timeout=limit, wait_for_workers=False)
    with pytest.raises(dist.DistError):  # the second of them died on the way
        dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=limit)
    assert dist.distributed_c10d._world.group_count > 0, "which is what this is about"
    _part()
    assert dist.distributed_c10d._world.group_count == 0
