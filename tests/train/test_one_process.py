"""How short the way is from the command to the gradient of one process."""

import traceback
from pathlib import Path

import pytest
import torch

from motley.cli import main

MOST_FRAMES, MOST_FILES = 6, 12


def test_six_frames_lead_from_the_command_to_the_backward_pass(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    frames: list[list[str]] = []
    backward = torch.autograd.backward

    def noted(*arguments: object, **more: object) -> None:
        stack = [frame.filename for frame in traceback.extract_stack()]
        frames.append([name for name in stack if "/motley/" in name and "site-packages" not in name])
        backward(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "backward", noted)
    words = ["--data", data, "--steps", 2, "--batch-rows", 2, "--seq-len", 64, "--precision", "fp32"]
    tiny = Path(__file__).parents[2] / "examples" / "models" / "tiny.json"
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--model", str(tiny), *map(str, words)]) == 0
    assert frames
    assert max(map(len, frames)) <= MOST_FRAMES, frames[0]
    assert max(len(set(files)) for files in frames) <= MOST_FILES
