"""The real commands: uneven workers learn what one process learns, and go on whoever is left."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from commands import STEPS, command, losses, until
from spawned_ranks import MOTLEY, free_port, on_ranks, run, run_ranks, start_ranks

from motley.apportion import apportion
from motley.errors import CommunicationError, InputError
from motley.parallel import build as start
from motley.parallel import communicator as crew_module
from motley.parallel.communicator import Communicator, join
from motley.parallel.layout import islands_side_by_side
from motley.parallel.load_balance import LoadBalancer


@pytest.mark.slow(60)
def test_a_crew_learns_what_one_process_learns_and_any_crew_goes_on_from_its_checkpoint(
    data: Path, shape: Path, alone: Path, tmp_path: Path
):
    """Three workers are killed half-way, one of them first; two go on, and one process ends the run."""
    out = tmp_path / "run"
    arguments = command(out, data, shape, precision="fp32", emulate="1:2:4", emulate_by="wait")
    process = start_ranks(3, arguments)
    until(lambda: len(list((out / "checkpoints").glob("step-????????"))) >= 1, process)
    process.ranks[-1].kill()
    _, said = process.communicate()
    assert process.returncode != 0
    assert " failed: " in said
    assert list((out / "checkpoints").glob("step-????????"))
    two = start_ranks(2, command(out, data, shape, precision="fp32", zero=0))
    written = len(losses(out))
    until(lambda: len(losses(out)) >= written + 6, two)
    two.send_signal(signal.SIGTERM)
    two.communicate()
    last = run(command(out, data, shape, precision="fp32"))
    assert last.returncode == 0, last.stderr
    found, expected = losses(out), losses(alone)
    assert len(found) == len(expected) >= STEPS
    assert found == pytest.approx(expected, rel=1e-4)


PLANNED = """
pools:
  - {name: strong, chip: Xeon-SPR-core, chips_per_node: 1}
  - {name: weak, chip: EPYC-9004-core, chips_per_node: 2}
"""


@pytest.fixture(scope="module")
def plan(shape: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    fleet, plan = folder / "fleet.yaml", folder / "plan.json"
    fleet.write_text(PLANNED)
    asked = ["plan", str(shape), f"--fleet={fleet}", "--tokens=1M", "--seq-len=64", "--global-batch=4", f"--out={plan}"]
    made = run([*MOTLEY, *asked])
    assert made.returncode == 0, made.stderr
    return plan


@pytest.mark.slow(15)
def test_a_plan_runs_as_it_is_written(data: Path, shape: Path, alone: Path, plan: Path, tmp_path: Path):
    values = json.loads(plan.read_text())
    out = tmp_path / "run"
    arguments = command(out, data, shape, precision="fp32", plan=plan)
    done = run_ranks(values["chips"], arguments)
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
    wrong = run_ranks(values["chips"] + 1, command(tmp_path / "x", data, shape, plan=plan))
    assert wrong.returncode != 0
    assert f"{values['chips'] + 1} were started" in wrong.stderr


@pytest.mark.slow(8)
def test_a_plan_runs_in_fp8_where_that_is_asked(data: Path, shape: Path, alone: Path, plan: Path, tmp_path: Path):
    out, workers = tmp_path / "run", json.loads(plan.read_text())["chips"]
    arguments = command(out, data, shape, precision="fp8", plan=plan)
    done = run_ranks(workers, arguments)
    assert done.returncode == 0, done.stderr
    for worker in range(workers):
        assert f"rank {worker} computes in fp8" in done.stderr
    assert losses(out) == pytest.approx(losses(alone), rel=0.01)
    assert losses(out) != pytest.approx(losses(alone), rel=1e-4), "products are rounded"


def disagree(comm: Communicator) -> str:
    with pytest.raises(InputError) as refused:
        comm.agree({"data": "abc" if comm.rank != 1 else "xyz", "steps": 5})
    return str(refused.value)


def test_a_worker_with_other_data_is_named_on_every_worker():
    for message in on_ranks(3, disagree):
        assert message.startswith("rank 1 has data xyz, rank 0 has abc;")


def meet_as(comm: Communicator, kinds: list[str], port: int) -> tuple[bool, list[list[float]], float, list[float]]:
    """Crews meet anew as torchrun's workers do, on devices of these kinds; all tensors lie in the host's memory."""
    dist.destroy_process_group()
    os.environ |= {"RANK": str(comm.rank), "WORLD_SIZE": str(comm.size), "MASTER_PORT": str(port)}
    crew_module.seat_of = lambda device: str(device)  # there is no GPU to ask
    met = join(torch.device(kinds[comm.rank]))
    ours = met.part([[0, 1]])
    passed = torch.full((3,), float(comm.rank))
    ours.send(passed, 1) if comm.leads else ours.receive(passed, 0)
    return ours.by_host, ours.everyone([float(comm.rank)]), float(ours.sum(torch.ones(()))), passed.tolist()


@pytest.mark.parametrize(
    ("kinds", "by_host"), [(["cpu", "cpu"], False), (["cpu", "cuda:0"], True), (["cuda:0", "cuda:0"], True)]
)
def test_cpus_and_gpus_and_those_who_share_a_gpu_meet_in_the_hosts_memory(kinds: list[str], by_host: bool):
    for found in on_ranks(2, meet_as, kinds, free_port()):
        assert found == (by_host, [[0.0], [1.0]], 2.0, [0.0, 0.0, 0.0])


def of_makes(comm: Communicator, makes: list[str], zero: int) -> str:
    start.kind_of_chip = lambda device: makes[comm.rank]  # type: ignore[assignment]
    try:
        start.check_devices(islands_side_by_side("1", comm.size, 2, 1, zero), comm)  # type: ignore[arg-type]
    except InputError as error:
        return str(error)
    return ""


def test_copies_of_the_model_on_chips_of_several_kinds_are_refused_on_all():
    first, second = on_ranks(2, of_makes, ["one kind", "another"], 0)
    assert first == second
    assert "ranks 0 (one kind) and 1 (another) round differently" in first
    assert "choose --zero 1" in first
    assert on_ranks(2, of_makes, ["one kind", "another"], 1) == on_ranks(2, of_makes, ["one", "one"], 0) == ["", ""]


def test_a_worker_that_is_gone_ends_the_others_with_a_sentence():
    first, second = on_ranks(2, lose_one)
    assert first.startswith("rank 0: all-reduce failed: another rank exited or is silent: ")
    assert second == "gone"


def lose_one(comm: Communicator) -> str:
    if comm.rank == 1:
        comm.leave()
        return "gone"
    try:
        comm.sum(torch.ones(1))
    except CommunicationError as error:
        return str(error)
    return "never noticed"


def wait_in_vain(comm: Communicator) -> str:
    try:
        if comm.leads:
            comm.receive(torch.empty(3), 1, seconds=0.5)
        comm.share(None)  # until the other one is gone
    except CommunicationError as error:
        return str(error)
    return "never noticed"


def test_who_sends_no_message_is_waited_for_no_longer_than_is_said():
    """PyTorch's limit between two workers is that with which they met, half an hour here."""
    first, _ = on_ranks(2, wait_in_vain, seconds=60)
    assert first.startswith("rank 0: receiving from rank 1 failed: another rank exited or is silent: ")


def test_shares_follow_speed_and_absorb_a_straggler_within_ten_steps():
    speeds = [1.0, 2.0, 4.0, 1.0]
    shares = LoadBalancer([1.0] * 4)
    idle = []
    for step in range(30):
        if step == 15:
            speeds[2] = 1.0
        rows = shares.rows(64)
        assert sum(rows) == 64
        seconds = [count / speed for count, speed in zip(rows, speeds, strict=True)]
        idle.append(64 / sum(speeds) / max(seconds))
        shares.measured(rows, seconds)
    assert idle[0] < 0.6
    assert min(idle[2:15]) > 0.97
    assert idle[15] < 0.5
    assert min(idle[25:]) > 0.95


def test_a_lane_that_got_nothing_gets_rows_again_when_the_others_slow_down():
    shares = LoadBalancer([0.001, 1.0])
    assert shares.rows(8) == [0, 8]
    shares.measured([0, 8], [0.0, 8000.0])
    assert shares.rows(8)[0] >= 4


def test_a_lane_that_was_slow_for_a_while_comes_back_when_it_is_fast_again():
    shares = LoadBalancer([1.0] * 8)
    for step in range(400):
        slow = 1 / 30 if 5 <= step < 9 else 1.0
        rows = shares.rows(16)
        shares.measured(rows, [count / (slow if replica == 0 else 1.0) for replica, count in enumerate(rows)])
    assert shares.rows(16) == [2] * 8


def test_shares_are_the_nearest_whole_numbers():
    assert apportion(36, [4, 1, 2]) == [21, 5, 10]
    assert apportion(1, [1, 1, 1]) == [1, 0, 0]
