"""Copies of the same weights are the same to the bit, or everybody stops and says whose are not."""

import dataclasses
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command
from layouts import random_layout, settings
from spawned_ranks import SERVER, exit_with_parent, free_port, on_ranks
from tiny_models import DEEP, FEW, Rows, random_model

from motley.errors import InputError
from motley.model import experts
from motley.parallel.communicator import Communicator
from motley.parallel.consistency import COMPARE_EVERY, MASK, checksum
from motley.parallel.layout import Layout, PipelineGroup, side_by_side
from motley.parallel.rank import Ranks
from motley.parallel.run import pretrain
from motley.train.config import PretrainConfig


def test_a_checksum_sees_a_bit_and_two_that_cancel_in_a_sum() -> None:
    numbers = torch.randn(200_001, generator=torch.Generator().manual_seed(0))
    expected = int(checksum(numbers))
    assert 0 <= expected <= MASK
    for places in ([7], [200_000], [3, 150_000]):
        other = numbers.clone()
        bits = other.view(torch.int32)
        for place, step in zip(places, (1, -1), strict=False):
            bits[place] += step
        assert int(checksum(other)) != expected
    assert int(checksum(numbers.clone())) == expected


def fingerprints_of(comm: Communicator, cases: list[Layout], disturbed: list[Any]) -> list[str]:
    """What is said of the copies after a step, and after (worker, weight or bias) was changed by one bit."""
    experts.PAD, found = FEW, []
    for layout, change in zip(cases, disturbed, strict=True):
        ranks = Ranks(DEEP, settings(), layout, comm)
        whole = random_model(1, DEEP).state_dict() if comm.leads else None
        ranks.take_state(None if whole is None else (dict(whole), {}))
        losses, norm = ranks.gradient(ranks.read(Rows(), 0))  # type: ignore[arg-type]
        ranks.update(losses, norm, 1e-2)
        ranks.share_rows(1)
        ranks.check_copies(1)
        if change is not None and comm.rank == change[0]:
            held = [
                *(ranks.buffers.view(part).data for part in ranks.buffers.here if part.name == change[1]),
                *(buffer for name, buffer in ranks.model.named_buffers() if name == change[1]),
            ]
            held[0].view(-1).view(torch.int32)[-1] ^= 1
        try:
            ranks.share_rows(2)
            found.append("")
        except InputError as error:
            found.append(str(error))
    return found


NORM, BIAS = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.slow(20)
def test_equal_copies_pass_in_any_layout_and_one_bit_is_named() -> None:
    chance = random.Random(5)
    beside = [dataclasses.replace(side_by_side(4, DEEP.num_hidden_layers, 2), zero=zero) for zero in (0, 1, 2, 3)]
    layouts = [*(random_layout(4, chance) for _ in range(4)), *beside, beside[0], beside[1], beside[3], beside[3]]
    changes = [None] * 8 + [(2, NORM), (1, BIAS), (3, BIAS), None]
    by_worker = on_ranks(4, fingerprints_of, layouts, changes)
    assert all(found == by_worker[0] for found in by_worker), "everybody stops, and says the same"
    said = by_worker[0]
    assert said[:8] == [""] * 8
    assert said[8].startswith("rank 2 holds weights that differ from the copies of ranks 0, 1 and 3 after step 2: ")
    assert "choose --zero 1" in said[8]
    assert said[9].startswith("rank 1 holds weights that differ from the copies of ranks 0, 2 and 3 after step 2: ")
    assert "a machine computes, keeps or transmits wrongly" in said[9]
    assert said[10].startswith("rank 3 holds ")
    assert said[11] == ""


def test_of_two_copies_nobody_knows_which_is_right_and_copies_of_a_table_in_two_stages_count() -> None:
    """The embedding lies in the first stage and, for the MTP module, in the last."""
    piped = Layout((PipelineGroup(((0, 1),), (2, 2), micro_batch=2),))
    (said,), other = on_ranks(2, fingerprints_of, [piped], [(1, "model.embed_tokens.weight")])
    assert said.startswith("ranks 0 and 1 hold copies of the same weights that differ after step 2: ")
    assert other == [said]


# ------------------------------------------------------------------------------------------------ the real loop


def disturbed(rank: int, port: int, at: int, said: Path, arguments: dict[str, Any]) -> None:
    """`motley pretrain` on one of two workers; worker 1's weights change by one bit in step `at`, as if it rounded."""
    exit_with_parent()
    torch.set_num_threads(1)
    if not arguments.get("elastic"):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    update, taken = Ranks.update, 0

    def one_bit_off(self: Ranks, *values: Any) -> None:
        nonlocal taken
        update(self, *values)
        taken += self.comm.size == 2
        if taken == at and self.comm.rank == 1:
            part = self.buffers.here[-1]
            self.buffers.view(part).data.view(-1).view(torch.int32)[0] ^= 1

    Ranks.update = one_bit_off  # type: ignore[method-assign]
    try:
        pretrain(PretrainConfig(**arguments))
    except InputError as error:
        (said / str(rank)).write_text(str(error))


@pytest.mark.slow(15)
@pytest.mark.parametrize(
    ("more", "at", "seen"),
    [
        ({"zero": 0}, 3, COMPARE_EVERY),
        ({"zero": 0, "checkpoint_every": 4}, 3, 4),  # before it is written
        ({"elastic": True, "comm_timeout": 60.0}, 1, None),
    ],
)
def test_a_run_whose_copies_differ_stops_with_a_sentence(
    more: dict[str, Any], at: int, seen: int | None, data: Path, shape: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = {
        "out": out, "data": (str(data),), "model": str(shape), "steps": 400, "batch_rows": 4, "micro_batch": 2,
        "seq_len": 32, "valid_every": 1000, "checkpoint_every": 1000, "precision": "fp32", "device": "cpu", **more,
    }  # fmt: skip
    port = free_port()
    workers = [
        SERVER.Process(target=disturbed, args=(rank, port, at, tmp_path, arguments), daemon=True) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
        assert worker.exitcode == 0
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert first == second
    assert first.startswith("ranks 0 and 1 hold copies of the same weights that differ after step ")
    assert "choose --zero 1" in first
    if seen:
        assert f"after step {seen}:" in first
    assert not list((out / "checkpoints").glob("step-*")), "no copy of two that differ is kept"


@pytest.mark.slow(15)
@pytest.mark.parametrize("zero", [0, 1])
def test_workers_whose_cpus_can_do_different_things_share_updates_or_are_refused(
    zero: int, data: Path, shape: Path, tmp_path: Path
) -> None:
    arguments = command(tmp_path / "run", data, shape, precision="fp32", zero=zero, steps=12)
    port, processes = str(free_port()), []
    for rank in range(2):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own |= {"ATEN_CPU_CAPABILITY": "default"} if rank else {}
        environment = os.environ | own | {"OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [process.communicate(timeout=240)[0] for process in processes]
    codes = [process.returncode for process in processes]
    if zero:
        assert codes == [0, 0], said
    else:
        assert 0 not in codes
        assert all("PyTorch uses DEFAULT" in text and "choose --zero 1" in text for text in said), said
