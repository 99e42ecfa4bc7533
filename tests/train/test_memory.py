"""A model that cannot fit is refused before anything is allocated; one that runs out later says what to do."""

import dataclasses
from pathlib import Path

import pytest
import torch

from motley.errors import InputError
from motley.fleet.probe import host_memory
from motley.model import SIZES, Transformer
from motley.train.config import PretrainConfig
from motley.train.memory import check_memory, state_bytes
from motley.train.metrics import read_metrics
from motley.train.optimizer import Optimizer
from motley.train.pretrain import pretrain
from motley.train.worker import Worker


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

    monkeypatch.setattr(Worker, "gradient", out_of_memory)
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
