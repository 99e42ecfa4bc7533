"""Ranks fail, join and leave: it is reported, and the loss is that of an undisturbed run."""

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
from motley.parallel.elastic.agent import ElasticCommunicator, _disconnect
from motley.parallel.elastic.rendezvous import FOLDER, Rendezvous
from motley.parallel.run import pretrain
from motley.train.config import PretrainConfig
from motley.train.metrics import MetricsWriter, RecentRecords, read_metrics, records_of
from motley.train.run_state import Position, RunState
from motley.train.trainer import stop_requests


def started(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow(15)
def test_torchrun_restarts_ranks_and_repeated_steps_are_reported(data: Path, shape: Path, alone: Path, tmp_path: Path):
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
def test_a_rank_that_is_silent_beyond_the_timeout_is_named(data: Path, shape: Path, tmp_path: Path):
    out = tmp_path / "run"
    arguments: Any = command(out, data, shape, precision="fp32", comm_timeout=8, steps=100_000)
    process = started(torchrun(2, arguments))
    until(lambda: steps_done(out) >= 2, process)
    victim = max(children(process.pid))
    os.kill(victim, signal.SIGSTOP)
    assert process.stdout is not None
    said = next(line for line in process.stdout if " failed: " in line)
    os.kill(victim, signal.SIGKILL)  # torchrun would give it 30 s to end by itself
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.startswith("motley pretrain: rank 0: ")
    assert f" failed: rank 1 (pid {victim}) is stopped: " in said
    assert said.endswith("start the job again, it goes on from its newest checkpoint\n")


@pytest.mark.slow(15)
def test_ranks_go_on_without_torchrun_and_report_it(data: Path, shape: Path, alone: Path, tmp_path: Path):
    out = tmp_path / "run"
    process = started(torchrun(2, command(out, data, shape, precision="fp32")))
    until(lambda: steps_done(out) >= 2, process)
    process.kill()
    process.communicate(timeout=120)  # the ranks hold the other end
    wait((out / "result.json").is_file)
    assert events(out) == ["torchrun exited: the ranks go on, but nothing would start them again"]
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)


def test_ranks_that_regroup_before_their_first_step_keep_the_records_of_the_checkpoint(tmp_path: Path):
    written = [{"kind": "train", "step": step, "loss": 1.0} for step in (4, 5)]
    with MetricsWriter(tmp_path) as file:
        for record in written:
            file.write(**record)
    state = RunState(Position(step=5), recent=records_of(tmp_path, 5))
    for message in ("first", "second"):  # two generations without a step
        with MetricsWriter(tmp_path, state.written) as file:
            RecentRecords(file, state.recent).write("event", step=5, message=message)
    assert read_metrics(tmp_path)[:2] == written
    assert [record["message"] for record in read_metrics(tmp_path)[2:]] == ["first", "second"]


class OneExited(Rendezvous):
    """A rendezvous whose member b has exited."""

    def missing(self, names: Any) -> str:
        return f"rank {names.index('b')} exited"


def test_a_rank_that_exits_while_ranks_connect_is_named_without_advice_to_restart(tmp_path: Path):
    comm = ElasticCommunicator(0, 2, rendezvous=OneExited(tmp_path, "a", 1.0), names=("a", "b"))

    def reset() -> None:
        raise RuntimeError("Connection reset by peer")

    said = r"^rank 0: connecting failed: rank 1 exited: Connection reset by peer$"
    with pytest.raises(CommunicationError, match=said):
        comm.talk("connecting", reset)


@pytest.mark.slow(15)
@pytest.mark.parametrize("seed", range(2))
def test_elastic_ranks_lose_one_and_gain_one_and_learn_what_one_process_learns(
    seed: int, data: Path, shape: Path, alone: Path, tmp_path: Path
):
    """Three begin; one, rank 0 or another, is killed in the middle of a step; one that differs from them is refused;
    a third joins."""
    out, gates, chance = tmp_path / "run", tmp_path / "gates", random.Random(seed)
    gates.mkdir()
    for step in (0, 6, 12, 18):
        (gates / f"{step}.gate").touch()
    arguments = {
        "out": out, "data": (str(data),), "model": str(shape), "steps": STEPS, "batch_rows": ROWS, "micro_batch": 3,
        "seq_len": 64, "valid_every": 10, "checkpoint_every": 7, "keep_last": 2, "precision": "fp32",
        "warmup_steps": 5, "seq_len_warmup": "16:0.3,32:0.6", "ngram_weight": 0.5, "device": "cpu",
        "elastic": True, "comm_timeout": 60.0,
    }  # fmt: skip

    def begin(program: str = "same", make: str = "same") -> Any:
        process = SERVER.Process(target=member, args=(gates, tmp_path / "said", program, make, arguments), daemon=True)
        process.start()
        return process

    comm = Rendezvous(out / FOLDER, "", 0)
    processes = [begin()]
    wait(lambda: len(arrived(gates, 0)) == 1)  # the first trains alone until the others ask to join
    processes += [begin(), begin()]
    wait(lambda: len(comm.members()) == 3 and comm.waiting(2) == 2)
    (gates / "0.gate").unlink()
    wait(lambda: len(arrived(gates, 6)) == 3)
    victim = processes.pop(0) if seed == 0 else processes.pop(chance.choice([1, 2]))
    os.kill(victim.pid, signal.SIGKILL)
    (gates / "6.gate").unlink()
    wait(lambda: len(arrived(gates, 12)) == 2)
    stranger = begin(program="other") if seed == 0 else begin(make="other")
    stranger.join(90)
    sent_away = f"this rank has {'the processor' if seed else 'source code'} other, the running job has same;"
    assert (tmp_path / "said").read_text().startswith(sent_away)
    processes.append(begin())
    wait(lambda: comm.waiting(comm.newest().number + 1) == 1)
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
    assert said[-2] == "2 ranks go on with step 7 (0 joined, 1 left); their part of it is computed again"
    assert said[-1] == "3 ranks go on with step 14 (1 joined, 0 left)"
    assert json.loads((out / "result.json").read_text())["step"] == STEPS


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_an_elastic_rank_with_zero_is_refused(zero: Any, tmp_path: Path):
    with pytest.raises(InputError, match=f"^--elastic beside --zero {zero}: .* leave --zero out") as refused:
        pretrain(PretrainConfig(out=tmp_path, elastic=True, zero=zero, device="cpu"))
    assert "\n" not in str(refused.value)


def test_ranks_use_the_zero_stage_that_was_asked_for_and_elastic_ranks_zero_0():
    shape = ModelConfig.from_hf(TINY)

    def zero(**settings: Any) -> int:
        (island,), _ = motley.parallel.build.islands_for(PretrainConfig(**settings), shape, Communicator(0, 2), None)
        return island.layout.zero

    assert [zero(), zero(zero=0), zero(zero=3), zero(elastic=True), zero(elastic=True, zero=0)] == [1, 0, 3, 0, 0]
    with pytest.raises(InputError, match=r"^--zero 2 beside --plan: the plan says itself what ranks share"):
        motley.parallel.build.islands_for(PretrainConfig(zero=2), shape, Communicator(0, 2), {"groups": []})


@pytest.mark.usefixtures("handlers")
def test_a_request_to_stop_is_kept_when_the_generation_ends_for_another_reason():
    state = RunState()

    def step() -> None:
        with stop_requests(state):
            os.kill(os.getpid(), signal.SIGTERM)
            assert state.asked_to_stop
            raise CommunicationError("another rank exited")

    with pytest.raises(CommunicationError):
        step()
    assert state.asked_to_stop


@pytest.fixture
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handlers")
def test_a_rank_whose_peers_exited_is_not_ended_before_it_has_reported_it():
    """torchrun sends SIGTERM to all other ranks a tenth of a second after one exited."""
    state = RunState()

    def step() -> None:
        with stop_requests(state):
            raise CommunicationError("a rank exited")

    with pytest.raises(CommunicationError):
        step()
    os.kill(os.getpid(), signal.SIGTERM)
    assert state.asked_to_stop


def test_a_process_group_that_was_never_complete_leaves_the_count_of_groups_at_zero():
    limit = timedelta(seconds=1)
    store = TCPStore("127.0.0.1", free_port(), is_master=True, timeout=limit, wait_for_workers=False)
    with pytest.raises(dist.DistError):  # the second rank never connects
        dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=limit)
    assert dist.distributed_c10d._world.group_count > 0, "which is what this is about"
    _disconnect()
    assert dist.distributed_c10d._world.group_count == 0
