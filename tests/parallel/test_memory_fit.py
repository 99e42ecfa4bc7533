"""A model that cannot fit is refused before anything is allocated; one that runs out later says what to do."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_settings
from spawned_ranks import on_ranks

from motley.emulation.apply import EmulatedFleet
from motley.errors import InputError
from motley.fleet.device import Format
from motley.fleet.probe import host_memory
from motley.model import SIZES, Transformer, experts, native
from motley.parallel import memory_fit as memory
from motley.parallel.communicator import Communicator
from motley.parallel.layout import coordinates_of, islands_side_by_side, side_by_side
from motley.parallel.memory_fit import (
    MemoryBudgets,
    budget,
    check_gathering,
    gathered_bytes,
    row_bytes,
    within_memory,
)
from motley.parallel.rank import Ranks
from motley.parallel.run import pretrain
from motley.train.config import PretrainConfig
from motley.train.input_checks import check_memory, state_bytes
from motley.train.metrics import read_metrics
from motley.train.optimizer import Optimizer

pytestmark = pytest.mark.usefixtures("tiny_nano")


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_state_is_what_a_step_really_allocates(name) -> None:  # type: ignore[no-untyped-def]
    config = dataclasses.replace(SIZES["nano"], vocab_size=300)
    model = Transformer(config)
    model.initialize(0)
    optimizer = Optimizer(model.named_parameters(), name, 0.1, torch.float32)
    hidden = model.hidden(torch.zeros(1, 8, dtype=torch.long))
    sum(state.sum() for state in (hidden.main, *hidden.further)).backward()  # type: ignore[union-attr]
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    optimizer.step(1e-3)
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *optimizer.state_tensors().values()]
    measured = sum(tensor.nbytes for tensor in held if tensor is not None)
    assert state_bytes(config, name) <= measured < 1.2 * state_bytes(config, name)


def test_a_model_larger_than_the_machine_is_refused_with_both_numbers(tmp_path: Path) -> None:
    assert state_bytes(SIZES["v3"], "muon") > host_memory()[0], "8 TB"
    with pytest.raises(InputError, match=r"takes at least 8,\d+\.\d GB .* cpu has .* GB"):
        check_memory(SIZES["v3"], "muon", torch.device("cpu"))


def test_running_out_of_memory_says_which_option_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of the text" for n in range(3000)))

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Ranks, "gradient", out_of_memory)
    config = PretrainConfig(
        out=tmp_path / "run", data=(str(tmp_path / "text.txt"),), steps=2, seq_len=32, device="cpu", precision="fp32"
    )
    with pytest.raises(InputError, match=r"lower it .* --recompute"):
        pretrain(config)


def test_the_memory_of_a_run_on_the_cpu_is_the_process_own_even_beside_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of the text" for n in range(3000)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = PretrainConfig(
        out=tmp_path, data=(str(tmp_path / "text.txt"),), steps=1, batch_rows=1, seq_len=32, device="cpu",
        precision="fp32", valid_rows=1,
    )  # fmt: skip
    pretrain(config)
    (step,) = (one for one in read_metrics(tmp_path) if one["kind"] == "train")
    assert step["memory_bytes"] > state_bytes(dataclasses.replace(SIZES["nano"], vocab_size=300), "muon")


# ------------------------------------------------------------------------------------------ a crew

NANO = dataclasses.replace(SIZES["nano"], vocab_size=300)
WEIGHTS = 4 * sum(p.numel() for p in Transformer(NANO).parameters())
STATE = 1.15 * (3 + 1 + 4) * WEIGHTS  # with Muon, about; messages; copies while the update is made


def within(
    comm: Communicator, budgets: list[float | None], formats: Sequence[Format] = ("fp32", "fp32"), **settings: Any
) -> list[int] | str:
    """Micro-batches of all workers, or why they are refused; each worker pretends to have its entry of `budgets`."""
    config = PretrainConfig(seq_len=64, **settings)
    islands = islands_side_by_side("1", comm.size, NANO.num_hidden_layers, config.micro_batch, 0)
    try:
        bytes_each = [budget(comm.device, pretended) for pretended in budgets]
        (fitting,) = within_memory(islands, NANO, config, comm, bytes_each, formats, planned=False, shrink=True)
    except InputError as error:
        return str(error)
    return [group.micro_batch for group in fitting.layout.groups]


def test_a_worker_over_its_budget_is_refused_on_all_with_need_and_budget() -> None:
    first, second = on_ranks(2, within, [None, STATE / 2])
    assert first == second
    assert re.match(r"rank 1 needs about \d+ MB \(\d+ MB for weights.* may hold \d+ MB; choose a smaller", str(first))


def gathering(comm: Communicator, islands: str, hosts: list[int]) -> str | None:
    """Why workers on hosts of so many bytes cannot gather a checkpoint of NANO, if so."""
    memory.host_memory = lambda: (hosts[comm.rank], 0)  # of this process alone, which ends with the crew
    try:
        check_gathering(islands_side_by_side(islands, comm.size, NANO.num_hidden_layers, 1, 1), NANO, "muon", comm)
    except InputError as error:
        return str(error)
    return None


def test_a_host_too_small_for_what_a_checkpoint_gathers_is_named_on_all() -> None:
    needed = gathered_bytes(NANO, "muon")
    assert needed == pytest.approx(2 * WEIGHTS, rel=0.01)
    for islands, hosts, named in (
        ("1", [needed - 1, 10 * needed], "rank 0 gathers"), ("1", [needed, 1], None), ("2", [1, 1], None),
    ):  # fmt: skip
        first, second = on_ranks(2, gathering, islands, hosts)
        assert first == second
        assert (named is None) == (first is None)
        assert named is None or named in first


def test_each_worker_takes_the_largest_micro_batch_that_fits_its_memory() -> None:
    first, second = on_ranks(2, within, [None, STATE + 60e6])
    assert first == second
    assert first[0] == 16
    assert 1 <= first[1] < 16


def test_activations_are_counted_in_the_format_that_the_worker_computes_in() -> None:
    (wide,), (narrow,) = (within(Communicator(), [STATE + 60e6], [name], micro_batch=64) for name in ("fp32", "fp16"))
    assert 2 * int(wide) <= int(narrow) <= 2 * int(wide) + 1


def test_who_holds_more_than_its_budget_is_named_again_only_at_a_new_high() -> None:
    budgets = MemoryBudgets((4, 5), [1000e6, 500e6], [0.0, 100e6])
    assert budgets.exceeded([1000e6, 600e6]) == []
    assert budgets.exceeded([900e6, 601e6]) == ["rank 5 holds 501 MB for training, and may hold 500 MB"]
    assert budgets.exceeded([900e6, 650e6]) == []
    assert budgets.exceeded([1001e6, 652e6]) == [
        "rank 4 holds 1,001 MB for training, and may hold 1,000 MB",
        "rank 5 holds 552 MB for training, and may hold 500 MB",
    ]


def test_memory_above_the_budget_is_an_event_and_a_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A leak of half a gigabyte in the third step."""
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text("pools: [{name: one, chip: desktop-core, chips_per_node: 1, emulated: {memory: 400 MB}}]")
    update, leaked = Ranks.update, []

    def leaking(self: Ranks, *arguments: Any) -> None:
        update(self, *arguments)
        leaked.append(torch.ones(125_000_000 if len(leaked) == 2 else 1))

    monkeypatch.setattr(Ranks, "update", leaking)
    config = run_settings(tmp_path / "run", data, steps=5, emulate=str(fleet))
    pretrain(config, emulation=EmulatedFleet.asked_by(config))
    events = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "event"]
    (event,) = [event for event in events if "usually it takes" not in event["message"]]
    found = re.fullmatch(r"rank 0 holds (\d+) MB for training, and may hold 400 MB", event["message"])
    assert found
    assert 500 <= int(found[1]) < 800
    assert event["step"] == 3
    assert event["message"] in capfd.readouterr().err.splitlines()


def test_activations_of_a_row_are_what_its_forward_pass_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "PAD", 16)  # as many rows as a small micro-batch leaves an expert
    model, kept = Transformer(NANO), {}
    model.initialize(0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    def measured() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden(torch.zeros(1, 128, dtype=torch.long), None, mtp=True)
        return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)

    place = coordinates_of(side_by_side(1, NANO.num_hidden_layers, 1), 0)
    foreseen = row_bytes(NANO, place, 128, 4, recompute=False)
    with native.switched_off():
        plain = measured()
    assert 0.9 * plain < foreseen < 1.4 * plain
    assert measured() <= plain, "our own kernels keep no more than what is foreseen without them"
