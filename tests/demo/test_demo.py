"""One command makes the whole journey, and goes on where it was stopped, however it was stopped."""

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spawned_ranks import MOTLEY, Started, run, start

from motley.demo.about import about
from motley.demo.demo import STAGES
from motley.demo.levels import LEVELS
from motley.demo.plan import FEWEST_STEPS, DemoPlan, make_plan
from motley.demo.show import skill
from motley.fleet.probe import Machine, probe
from motley.infer.load import open_engine

MINUTES = "0.2"  # too short anywhere: the fewest steps are taken, however fast or slow the machine is


def demo(out: Path, *arguments: str) -> list[str]:
    return [*MOTLEY, "demo", "--out", str(out), "--minutes", MINUTES, "--no-serve", *arguments]


def facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "journey.json").read_text())


def run_until(command: list[str], holds: Callable[[], bool], how: signal.Signals) -> Started:
    """Start the command and send it a signal as soon as something holds; it must not end by itself before."""
    process = start(command)
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, f"ended before it was stopped: {process.communicate()}"
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(60)
    return process


def losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [(one["step"], one["loss"]) for one in records if one["kind"] == "train"]


def reached(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").is_file() and len(losses(run)) >= step


@pytest.fixture(scope="session")
def out(once: Any) -> tuple[Path, list[str]]:
    """A demo killed in pretraining and stopped with Ctrl-C in fine-tuning; and what the three starts said."""

    def make(top: Path) -> None:
        out = top / "a folder 文件夹" / "demo"
        killed = run_until(demo(out), lambda: reached(out / "pretrain", 3), signal.SIGKILL)
        stopped = run_until(demo(out), lambda: reached(out / "sft", 3), signal.SIGINT)
        assert stopped.returncode == 130
        done = run(demo(out), timeout=600)
        assert done.returncode == 0, done.stderr
        said = [killed.communicate()[1], stopped.communicate()[1], done.stderr, done.stdout]
        (top / "said.json").write_text(json.dumps(said))

    top = once("journey", make)
    return top / "a folder 文件夹" / "demo", json.loads((top / "said.json").read_text())


def test_a_journey_that_was_killed_and_stopped_is_whole_in_the_end(out: tuple[Path, list[str]]) -> None:
    folder, _ = out
    stages = facts(folder)["stages"]
    assert [stage["name"] for stage in stages] == ["probe", *(name for name, _, _ in STAGES)]
    assert all(stage["seconds"] > 0 and stage["predicted_seconds"] > 0 for stage in stages)
    plan = DemoPlan.from_json(facts(folder)["plan"])
    for stage, steps in (("pretrain", plan.pretrain.steps), ("sft", plan.finetune.steps)):
        numbers = [step for step, _ in losses(folder / stage)]
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


def test_each_training_stage_was_planned_again_once_however_often_the_demo_was_stopped(
    out: tuple[Path, list[str]],
) -> None:
    folder, _ = out
    revisions = facts(folder)["revisions"]
    assert [revision["before"] for revision in revisions] == ["pretrain", "sft"]
    assert facts(folder)["plan"]["finetune"]["steps"] == revisions[-1]["finetune_steps"]
    assert len(losses(folder / "sft")) == revisions[-1]["finetune_steps"]


def test_what_helps_where_time_is_short_is_said_before_it_starts(out: tuple[Path, list[str]]) -> None:
    first = out[1][0]
    assert re.search(r"--minutes 0.2 is too short for this machine .* The longer run: .* demo --out \S+ ", first)
    assert first.index("The longer run") < first.index("Data and tokenizer")
    assert "measuring this machine" in first


def test_predicted_and_actual_time_and_measured_answers_are_shown_at_the_end(out: tuple[Path, list[str]]) -> None:
    folder, (*_, last, stdout) = out
    problems = facts(folder)["results"]["problems"]
    assert f"{problems['accuracy']:.1%} of {problems['count']} fresh problems" in last
    assert re.search(r"Predicted .+ took .+ \([+-]\d+%\)", last)
    assert str(folder / "report.html") in stdout
    report = (folder / "report.html").read_text()
    assert report.startswith("<!doctype html>")
    for line in skill(DemoPlan.from_json(facts(folder)["plan"])):
        assert line in report


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
    plan = DemoPlan.from_json(facts(folder)["plan"])
    assert {prompt["family"] for prompt in told["prompts"]} == set(plan.families) == set(problems["families"])
    for line in skill(plan):
        assert line in " ".join(told["about"]), "which kinds of problem, and how difficult, is said"
    offered = {prompt["text"] for prompt in told["prompts"]}
    trained_on = {
        json.loads(line)["messages"][0]["content"]
        for line in (folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    }
    assert not offered & trained_on, "prompts on the page are problems it has not seen"
    assert about(facts(folder)["results"], plan, ()) == told


def test_the_exported_model_answers(out: tuple[Path, list[str]]) -> None:
    engine = open_engine(out[0], "cpu")
    assert engine.model.config.num_hidden_layers == 4
    assert all(bool(torch.isfinite(parameter).all()) for parameter in engine.model.parameters())


def test_a_finished_journey_is_only_shown_again(out: tuple[Path, list[str]]) -> None:
    folder, _ = out
    before = (folder / "export" / "model.safetensors").stat().st_mtime_ns
    done = run([*demo(folder), "--json"])
    assert done.returncode == 0
    assert json.loads(done.stdout)["problems"] == facts(folder)["results"]["problems"]
    assert (folder / "export" / "model.safetensors").stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(out: tuple[Path, list[str]]) -> None:
    done = run([*demo(out[0]), "--seed", "5"])
    assert done.returncode == 2
    assert "seed=0, now asked for 5" in done.stderr


@pytest.fixture(scope="session")
def machine() -> Machine:
    return probe(1.0, torch.device("cpu"))


def test_the_plan_fits_into_the_time_given(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motley.demo.plan.step_seconds", lambda *_, **__: (0.08, 0.02))
    monkeypatch.setattr("motley.demo.plan.slowness", lambda: 1.0)
    monkeypatch.setattr("motley.demo.plan.time.monotonic", lambda: 1000.0)
    plan = make_plan(machine, 60.0, seed=0)
    assert 0.8 * 3600 <= sum(plan.seconds.values()) <= 3600 + 1
    assert plan.finetune_tokens > plan.pretrain_tokens > 0
    assert DemoPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_time_that_measuring_takes_is_part_of_the_time_given(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]

    def trial(*_: object, **__: object) -> tuple[float, float]:
        clock[0] += 10
        return 0.008, 0.002

    monkeypatch.setattr("motley.demo.plan.step_seconds", trial)
    monkeypatch.setattr("motley.demo.plan.slowness", lambda: 1.0)
    monkeypatch.setattr("motley.demo.plan.time.monotonic", lambda: clock[0])
    left = sum(make_plan(machine, 3.0, seed=0, spent=30.0).seconds.values())
    measured = clock[0] - 1000 + 30
    assert measured > 30
    assert 180 - measured - 3 <= left <= 180 - measured  # a step is never cut


def test_every_trial_is_said_although_nobody_watches(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("motley.demo.plan.step_seconds", lambda *_, **__: (6.0, 4.0))
    plan = make_plan(machine, 2.0, seed=0)
    assert (plan.level, plan.pretrain.steps) == (LEVELS[-1].name, FEWEST_STEPS)
    assert f"trying a few steps of the network `{plan.size}`" in capsys.readouterr().err


def test_bad_text_is_refused_in_one_sentence(tmp_path: Path) -> None:
    done = run([*demo(tmp_path / "demo"), "--data", str(tmp_path / "nothing.txt")])
    assert done.returncode == 2
    assert "nothing.txt" in done.stderr
    assert "Traceback" not in done.stderr
