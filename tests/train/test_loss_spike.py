"""Training that breaks ends in a sentence, keeps the last whole checkpoint, and is never taken for complete."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run_settings
from safetensors.torch import load_file

from motley.errors import InputError
from motley.model import load
from motley.train.checkpoint import checkpoints, prune, step_folder
from motley.train.optimizer import Optimizer
from motley.train.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("tiny_nano")


def break_update(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The update of that step (1, 2, ...) leaves weights that are finite and give no finite loss."""
    take, taken = Optimizer.step, 0

    def step(self: Optimizer, learning_rate: float) -> None:
        nonlocal taken
        taken += 1
        take(self, learning_rate * (1e30 if taken == number else 1))

    monkeypatch.setattr(Optimizer, "step", step)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(torch.arange(20)[None])


def test_the_update_that_breaks_the_weights_is_no_checkpoint_and_pushes_none_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    pretrain(run_settings(whole, data, keep_last=12))
    assert torch.isfinite(logits(whole / "model")).all()

    out = tmp_path / "broken"
    break_update(monkeypatch, 5)
    with pytest.raises(InputError, match="10 steps in a row") as stopped:
        pretrain(run_settings(out, data, steps=20))
    named = checkpoints(out)[-1]
    assert f"the last good state is {named};" in str(stopped.value)
    assert torch.isfinite(logits(named)).all()
    assert [folder.name for folder in checkpoints(out)] == ["step-00000003", "step-00000004"]
    assert not (out / "model").exists()
    assert not (out / "result.json").exists()


def test_a_run_that_broke_goes_on_from_its_last_whole_checkpoint_bit_for_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(run_settings(tmp_path / "whole", data))
    out = tmp_path / "broken"
    with monkeypatch.context() as once:
        break_update(once, 5)
        with pytest.raises(InputError):
            pretrain(run_settings(out, data))
    pretrain(run_settings(out, data))  # a passing fault of the machine, say
    found, expected = (load_file(run / "model" / "model.safetensors") for run in (out, tmp_path / "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("number", [12, 10])  # the last update; or one after which the last steps are skipped
def test_a_run_that_ends_broken_is_not_complete(
    number: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_update(monkeypatch, number)
    with pytest.raises(InputError, match=f"stopped at step 12: .* is {tmp_path}/checkpoints/step-{number - 1:08d};"):
        pretrain(run_settings(tmp_path, data))
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "result.json").exists()


def test_training_that_breaks_at_once_has_the_untrained_model_to_name(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the last good state is the untrained model"):
        pretrain(run_settings(tmp_path, data, learning_rate=1e30))
    assert checkpoints(tmp_path) == []


def test_a_checkpoint_half_deleted_by_a_killed_run_does_not_look_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        step_folder(tmp_path, step).mkdir(parents=True)
        (step_folder(tmp_path, step) / "training.json").write_text("{}")

    alone: Any = SimpleNamespace(leads=True, prune_own=lambda run, kept: None)

    def die(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, alone, 2, None)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    prune(tmp_path, alone, 2, None)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
