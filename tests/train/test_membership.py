"""Workers come and go: what is lost is said, and the loss is the undisturbed run's."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_crew import alone as alone  # fixtures
from test_crew import children, losses, torchrun, until
from test_crew import shape as shape
from test_resume import command
from test_resume import data as data


def steps_done(out: Path) -> int:
    """Of the last record that a run wrote."""
    file = out / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def events(out: Path) -> list[str]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["message"] for record in records if record["kind"] == "event"]


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
    arguments: Any = command(out, data, shape, precision="fp32", patience=2, steps=100_000)
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
