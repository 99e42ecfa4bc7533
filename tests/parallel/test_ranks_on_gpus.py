"""Crews on GPUs, or on GPUs and CPUs, take the step of a single process. The same crews on CPUs alone, always."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import command, losses
from layouts import TWO_STAGES, assert_same_steps, settings, take_steps
from spawned_ranks import free_port, on_ranks, run_ranks
from tiny_models import DEEP

from motley.parallel.communicator import Communicator, join
from motley.parallel.layout import Layout, PipelineGroup

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
ONE_GPU = pytest.mark.skipif(GPUS < 1, reason="this machine has no GPU")
TWO_GPUS = pytest.mark.skipif(GPUS < 2, reason=f"two GPUs are needed, this machine has {GPUS}")
CREWS = [
    pytest.param(["cpu", "cpu"], False, id="CPUs"),
    pytest.param(["cuda:0", "cuda:0"], True, id="two that share a GPU", marks=ONE_GPU),
    pytest.param(["cuda:0", "cpu"], True, id="a GPU that leads a CPU", marks=ONE_GPU),
    pytest.param(["cpu", "cuda:0"], True, id="a CPU that leads a GPU", marks=ONE_GPU),
    pytest.param(["cuda:0", "cuda:1"], False, id="two GPUs", marks=TWO_GPUS),
]
"""Devices, and whether sums travel through the host's memory: NCCL takes GPUs only, each for one worker."""


def on_host(value: Any) -> Any:
    """The same with all tensors in the host's memory: who compares them may have no GPU of its own."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: on_host(one) for name, one in value.items()}
    return type(value)(map(on_host, value)) if isinstance(value, list | tuple) else value


def steps_on(comm: Communicator, devices: list[str], cases: list[Any], port: int) -> tuple[bool, list[Any]]:
    """Workers meet anew as torchrun's do, each on its device; how they talk, and what `take_steps` makes there."""
    dist.destroy_process_group()
    os.environ |= {"RANK": str(comm.rank), "WORLD_SIZE": str(comm.size), "MASTER_PORT": str(port)}
    device = torch.device(devices[comm.rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    met = join(device)
    return met.by_host, on_host(take_steps(met, cases))


def unequal(zero: int, sizes: tuple[int, int] = (1, 3)) -> Layout:
    """Two workers, the second three times as fast."""
    groups = tuple(
        PipelineGroup(((rank,),), (DEEP.num_hidden_layers,), micro_batch=size) for rank, size in enumerate(sizes)
    )
    return Layout(groups, zero=zero, rates=(1.0, 3.0))  # type: ignore[arg-type]


@pytest.mark.slow(15)
@pytest.mark.parametrize(("devices", "by_host"), CREWS)
def test_workers_of_unequal_speed_take_the_step_of_a_single_process(devices: list[str], by_host: bool):
    """Rows as 1 to 3, with all that ZeRO shares; a pipeline of two stages; experts spread 3 to 1."""
    layouts = [unequal(zero) for zero in (1, 2, 3)]
    if len({device.split(":")[0] for device in devices}) == 1:  # copies on chips of several makes drift apart
        layouts.append(unequal(0))
    layouts.append(TWO_STAGES)
    layouts.append(
        Layout((PipelineGroup(((0,), (1,)), (DEEP.num_hidden_layers,), experts=(3, 1), micro_batch=2),), zero=1)
    )
    optimizers = ["muon", "adamw"]
    cases = [(layout, settings(optimizer=optimizers[n % 2]), n) for n, layout in enumerate(layouts)]
    found = on_ranks(2, steps_on, devices, cases, free_port())
    assert [host for host, _ in found] == [by_host] * 2
    assert_same_steps([steps for _, steps in found], cases, device=devices[0])


@pytest.mark.slow(15)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ONE_GPU)])
def test_the_real_command_with_a_fast_and_a_slow_worker_on_one_device_learns_what_one_process_learns(
    device: str, data: Path, shape: Path, alone: Path, tmp_path: Path
):
    """With two and more GPUs each worker takes one of its own."""
    out = tmp_path / "run"
    arguments = command(out, data, shape, precision="fp32", device=device, emulate="1:3", emulate_by="wait")
    done = run_ranks(2, arguments)
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
