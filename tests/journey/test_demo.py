"""One command makes the whole journey, and goes on where it was stopped, however it was stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motley.data.tasks import FAMILIES
from motley.fleet.probe import Machine, probe
from motley.infer.opening import open_engine
from motley.journey.about import about
from motley.journey.demo import STAGES
from motley.journey.plan import FEWEST_STEPS, DemoPlan, make_plan

MINUTES = "0.2"  # too short anywhere: the fewest steps are taken, however fast or slow the machine is


def demo(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "motley", "demo", "--out", str(out), "--minutes", MINUTES, "--no-serve", *arguments]


def facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "journey.json").read_text())


def run_until(command: list[str], holds: Callable[[], bool], how: signal.Signals) -> subprocess.Popen[str]:
    """Start the command and send it a signal as soon as something holds; it must not end by itself before."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, f"ended before it was stopped: {process.communicate()}"
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(timeout=60)
    return process


def losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [(one["step"], one["loss"]) for one in records if one["kind"] == "train"]


def reached(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").is_file() and len(losses(run)) >= step


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A demo killed in pretraining and stopped with Ctrl-C in fine-tuning; and what the three starts said."""
    out = tmp_path_factory.mktemp("journey") / "demo"
    said = []
    killed = run_until(demo(out), lambda: reached(out / "pretrain", 3), signal.SIGKILL)
    said.append(killed.communicate()[1])
    stopped = run_until(demo(out), lambda: reached(out / "sft", 3), signal.SIGINT)
    assert stopped.returncode == 130
    said.append(stopped.communicate()[1])
    done = subprocess.run(demo(out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, [*said, done.stderr, done.stdout]


def test_a_journey_that_was_killed_and_stopped_is_whole_in_the_end(out: tuple[Path, list[str]]) -> None:
    folder, _ = out
    stages = facts(folder)["stages"]
    assert [stage["name"] for stage in stages] == ["probe", *(name for name, _, _ in STAGES)]
    assert all(stage["seconds"] > 0 and stage["predicted_seconds"] > 0 for stage in stages)
    plan = DemoPlan.from_json(facts(folder)["plan"])
    for run, steps in (("pretrain", plan.pretrain.steps), ("sft", plan.finetune.steps)):
        numbers = [step for step, _ in losses(folder / run)]
        assert numbers == list(range(1, steps + 1)), "every step stands in the metrics once"
    assert list(folder.rglob("*.writing-*")) == []


def test_no_stage_that_was_complete_is_repeated(out: tuple[Path, list[str]]) -> None:
    _, (first, second, third, _) = out
    assert "done before" not in first
    assert re.findall(r"✓ (.+?) \(done before", second) == ["Data and tokenizer", "Problems with thinking"]
    assert re.findall(r"✓ (.+?) \(done before", third) == [
        "Data and tokenizer",
        "Problems with thinking",
        "Pretraining",
    ]
    assert "going on where it stopped" in third


def test_predicted_and_actual_time_and_measured_answers_are_shown_at_the_end(out: tuple[Path, list[str]]) -> None:
    folder, (*_, last, stdout) = out
    problems = facts(folder)["results"]["problems"]
    assert f"{problems['accuracy']:.1%} of {problems['count']} fresh problems" in last
    assert re.search(r"Predicted .+ took .+ \([+-]\d+%\)", last)
    assert str(folder / "report.html") in stdout
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_output_that_nobody_watches_is_plain(out: tuple[Path, list[str]]) -> None:
    assert all("\x1b" not in text and "\r" not in text for text in out[1])


def test_the_page_tells_what_was_measured(out: tuple[Path, list[str]]) -> None:
    folder, _ = out
    told = json.loads((folder / "export" / "about.json").read_text())
    problems = facts(folder)["results"]["problems"]
    assert told["accuracy"]["accuracy"] == problems["accuracy"]
    assert told["accuracy"]["standard_error"] == problems["standard_error"]
    assert f"{problems['accuracy']:.0%} of its answers were right" in " ".join(told["about"])
    assert "cannot" in " ".join(told["about"])
    assert {prompt["family"] for prompt in told["prompts"]} == set(FAMILIES)
    offered = {prompt["text"] for prompt in told["prompts"]}
    trained_on = {
        json.loads(line)["messages"][0]["content"]
        for line in (folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    }
    assert not offered & trained_on, "prompts on the page are problems it has not seen"
    assert about(facts(folder)["results"], DemoPlan.from_json(facts(folder)["plan"]), ()) == told


def test_the_exported_model_answers(out: tuple[Path, list[str]]) -> None:
    engine = open_engine(out[0], "cpu")
    assert engine.model.config.num_hidden_layers == 4
    assert all(bool(torch.isfinite(parameter).all()) for parameter in engine.model.parameters())


def test_a_finished_journey_is_only_shown_again(out: tuple[Path, list[str]]) -> None:
    folder, _ = out
    before = (folder / "export" / "model.safetensors").stat().st_mtime_ns
    done = subprocess.run([*demo(folder), "--json"], capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["problems"] == facts(folder)["results"]["problems"]
    assert (folder / "export" / "model.safetensors").stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(out: tuple[Path, list[str]]) -> None:
    done = subprocess.run([*demo(out[0]), "--seed", "5"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "seed=0, now asked for 5" in done.stderr


@pytest.fixture(scope="module")
def machine() -> Machine:
    return probe(1.0, torch.device("cpu"))


def test_the_plan_fits_into_the_time_given(machine: Machine) -> None:
    started = time.monotonic()
    plan = make_plan(machine, 20.0, seed=0)  # room enough for a busy machine
    tried = time.monotonic() - started
    assert 0.8 * 1200 <= tried + sum(plan.seconds.values()) <= 1200 + 1
    assert plan.finetune_tokens > plan.pretrain_tokens > 0
    assert DemoPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_time_that_measuring_takes_is_part_of_the_time_given(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]

    def trial(*_: object) -> tuple[float, float]:
        clock[0] += 10
        return 0.08, 0.02

    monkeypatch.setattr("motley.journey.plan.step_seconds", trial)
    monkeypatch.setattr("motley.journey.plan.time.monotonic", lambda: clock[0])
    left = sum(make_plan(machine, 3.0, seed=0, spent=30.0).seconds.values())
    assert 180 - 30 - 20 - 1 <= left <= 180 - 30 - 20  # two trials of 10 s; a step is never cut


def test_where_time_is_too_short_the_fewest_steps_are_taken_and_it_is_said(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("motley.journey.plan.step_seconds", lambda *_: (6.0, 4.0))
    plan = make_plan(machine, 2.0, seed=0)
    assert plan.pretrain.steps == plan.finetune.steps == FEWEST_STEPS
    assert plan.seconds["pretrain"] > 10 * FEWEST_STEPS
    assert "--minutes 2 is too short for this machine (a step takes 10.00 s)" in capsys.readouterr().err


def test_bad_text_is_refused_in_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [*demo(tmp_path / "demo"), "--data", str(tmp_path / "nothing.txt")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 2
    assert "nothing.txt" in done.stderr
    assert "Traceback" not in done.stderr
