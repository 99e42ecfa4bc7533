"""A run that is killed at any point goes on bit for bit. Each run is the real command in a process of its own."""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import assert_same_run, command, records
from spawned_ranks import Started, run, start

from motley.data.pack import DataConfig, prepare
from motley.train.checkpoint import checkpoints


@pytest.fixture(scope="session")
def undisturbed(once: Any, data: Path, shape: Path) -> Path:
    """A run that nobody disturbed."""

    def make(folder: Path) -> None:
        done = run(command(folder / "run", data, shape))
        assert done.returncode == 0, done.stderr

    return once("undisturbed", make) / "run"


@pytest.fixture
def whole(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the run that nobody disturbed."""
    return shutil.copytree(undisturbed, tmp_path / "whole")


@pytest.fixture(scope="session")
def half(once: Any, data: Path, shape: Path) -> Path:
    """A run that was killed between its first checkpoint and its last."""

    def make(folder: Path) -> None:
        while not checkpoints(folder / "run") or (folder / "run" / "model").exists():  # it may have been too quick
            shutil.rmtree(folder / "run", ignore_errors=True)
            stopped_at(command(folder / "run", data, shape), folder / "run", 12, signal.SIGKILL)

    return once("half", make) / "run"


def stopped_at(words: list[str], out: Path, lines: int, how: signal.Signals) -> Started:
    """Start a run and send the signal once its metrics have that many lines (or the run has ended)."""
    process = start(words)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines):
        time.sleep(0.001)
    process.send_signal(how)
    process.wait(60)
    return process


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_points_ends_with_the_same_bits(
    seed: int, whole: Path, data: Path, shape: Path, tmp_path: Path
) -> None:
    out, chance = tmp_path / "run", random.Random(seed)
    for lines in sorted(chance.sample(range(1, 36), 2)):
        process = stopped_at(command(out, data, shape), out, lines + chance.randint(0, 2), signal.SIGKILL)
        assert process.returncode in (-signal.SIGKILL, 0)
    done = run(command(out, data, shape))
    assert done.returncode == 0, done.stderr
    assert_same_run(out, whole)
    assert list(out.rglob("*.writing-*")) == []


def test_ctrl_c_saves_says_so_and_the_same_command_goes_on(
    whole: Path, data: Path, shape: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = stopped_at(command(out, data, shape), out, 4, signal.SIGINT)
    assert process.returncode == 130
    _, said = process.communicate()
    assert re.search(r"stopped after step \d+; the same command goes on from there", said)
    assert "Traceback" not in said
    assert checkpoints(out), "a checkpoint was written before it ended"
    assert run(command(out, data, shape)).returncode == 0
    assert_same_run(out, whole)


def test_a_run_that_lost_its_last_breath_is_finished(whole: Path, data: Path, shape: Path, tmp_path: Path) -> None:
    for missing in (["result.json"], ["result.json", "model"]):
        out = tmp_path / f"without-{len(missing)}"
        shutil.copytree(whole, out)
        for name in missing:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        done = run(command(out, data, shape))
        assert done.returncode == 0, done.stderr
        assert_same_run(out, whole)
        found, expected = (json.loads((folder / "result.json").read_text()) for folder in (out, whole))
        assert found | {"out": "", "seconds": 0} == expected | {"out": "", "seconds": 0}


def test_a_finished_run_is_not_repeated(whole: Path, data: Path, shape: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*.safetensors")}
    assert run(command(whole, data, shape)).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"learning_rate": 0.01}, "learning_rate=0.004, now asked for 0.01"), ({"steps": 40}, "steps=30"),
     ({"seed": 1}, "seed=0"), ({"optimizer": "adamw"}, "optimizer='muon'")],
)  # fmt: skip
def test_other_settings_in_the_same_folder_are_refused_by_name(
    settings: dict[str, Any], named: str, whole: Path, data: Path, shape: Path
) -> None:
    done = run(command(whole, data, shape, **settings))
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_that_began_before_a_setting_existed_goes_on_at_its_default(whole: Path, data: Path, shape: Path) -> None:
    file = whole / "config.json"
    known = json.loads(file.read_text())
    del known["clip"]
    file.write_text(json.dumps(known))
    other = run(command(whole, data, shape, clip=2.0))
    assert other.returncode == 2
    assert "holds a run with clip=1.0, now asked for 2.0" in " ".join(other.stderr.split())
    assert run(command(whole, data, shape)).returncode == 0


def test_other_data_in_the_same_folder_is_refused(whole: Path, shape: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("quite another text " * 3000)
    other = prepare(DataConfig(data=(str(text),), vocab_size=300), tmp_path / "prepared").folder
    done = run(command(whole, other, shape))
    assert done.returncode == 2
    assert "data=" in done.stderr


def test_what_changes_no_result_may_change(whole: Path, data: Path, shape: Path) -> None:
    arguments = [*command(whole, data, shape, micro_batch=2, keep_last=5), "--recompute"]
    assert run(arguments).returncode == 0


def test_the_newest_checkpoints_and_the_best_are_kept_and_nothing_else(whole: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    kept = {int(folder.name.removeprefix("step-")) for folder in (whole / "checkpoints").iterdir()}
    assert kept == {28, 30} | ({result["best_step"]} & {7, 14, 21, 28, 30})
    readings = [one for one in records(whole) if one["kind"] == "valid"]
    assert result["best_loss"] == min(one["loss"] for one in readings)
    assert [one["step"] for one in readings] == [10, 20, 30]


def test_a_half_written_checkpoint_is_not_gone_on_with(
    half: Path, whole: Path, data: Path, shape: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(half, tmp_path / "run")
    newest = checkpoints(out)[-1]
    unfinished = newest.with_name("step-00000029.writing-12345678")
    shutil.copytree(newest, unfinished)
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert run(command(out, data, shape)).returncode == 0
    assert not unfinished.exists()
    assert_same_run(out, whole)


@pytest.mark.parametrize("megabytes", [0.004, 0.02, 0.1])
def test_a_full_disk_is_one_sentence_and_leaves_whole_checkpoints(
    megabytes: float, half: Path, whole: Path, data: Path, shape: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(half, tmp_path / "run")
    before = {folder.name for folder in checkpoints(out)}
    limit = int(megabytes * 1e6)  # no file may grow larger
    done = run(command(out, data, shape), before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2, done.stderr
    assert "could not write" in done.stderr
    assert "Traceback" not in done.stderr
    assert {folder.name for folder in checkpoints(out)} == before
    assert run(command(out, data, shape)).returncode == 0
    assert_same_run(out, whole)


def test_a_broken_training_state_names_the_file(half: Path, data: Path, shape: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "run")
    state = checkpoints(out)[-1] / "training.safetensors"
    os.truncate(state, state.stat().st_size // 2)
    done = run(command(out, data, shape))
    assert done.returncode == 2
    assert str(state) in done.stderr


def test_settings_that_cannot_be_are_named(data: Path, shape: Path, tmp_path: Path) -> None:
    for settings, named in (({"steps": 0}, "--steps"), ({"learning_rate": -1}, "--learning-rate"),
                            ({"seq_len": 4096}, "--seq-len"), ({"device": "cuda:99"}, "--device"),
                            ({"seq_len": 48}, "--seq-len-warmup"), ({"model": "huge"}, "--model")):  # fmt: skip
        done = run(command(tmp_path / "run", data, shape, **settings))
        assert done.returncode == 2
        assert named in done.stderr
        assert "Traceback" not in done.stderr
