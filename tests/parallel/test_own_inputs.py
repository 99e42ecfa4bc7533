"""A worker whose own --data or --model is not that of the others is told so, and trains nothing."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import STEPS, TINY, command, losses, steps_done, until, wait
from elastic_members import arrived, member
from spawned_ranks import SERVER, Started, free_port, run, start

from motley.data.pack import DataConfig, prepare
from motley.model import ModelConfig, Transformer, save
from motley.parallel.elastic.rendezvous import FOLDER, Rendezvous
from motley.train.config import PretrainConfig
from motley.train.input_checks import own_model
from motley.train.pretrain import own_inputs


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "other.txt"
    file.write_text("quite another text " * 3000)
    return file


@pytest.fixture(scope="module")
def other(text: Path) -> Path:
    return prepare(DataConfig(data=(str(text),), vocab_size=300), text.parent / "prepared").folder


def started_as(rank: int, port: int, words: list[str]) -> Started:
    """Worker `rank` of two, as torchrun on a machine of its own starts it."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return start(words, environment=place)


def started_together(out: Path, first: dict[str, Any], second: dict[str, Any]) -> list[tuple[int, str]]:
    """(exit status, what it said) of two workers with data and networks of their own."""
    settings: dict[str, Any] = {"precision": "fp32", "steps": 2, "seq_len_warmup": ""}
    port = free_port()
    workers = [
        started_as(rank, port, command(out, **own_paths, **settings)) for rank, own_paths in enumerate((first, second))
    ]
    return [(worker.wait(), worker.communicate()[1]) for worker in workers]


@pytest.mark.slow(25)
def test_workers_started_with_other_data_or_another_model_are_named_on_all(
    data: Path, shape: Path, other: Path, text: Path, tmp_path: Path
) -> None:
    out, given = tmp_path / "run", {"data": data, "shape": shape}
    for changed, named in (
        ({"data": other}, "rank 1 has --data "),
        ({"data": text}, f"rank 1 has --data other than {data} was made from (different: data, "),
        ({"shape": "nano"}, "rank 1 has --model nano, rank 0 has "),
    ):
        for status, said in started_together(out, given, given | changed):
            assert status == 2, said
            assert named in said
            assert "all ranks need the same code, data and settings" in said
    copy, file = tmp_path / "copy", tmp_path / "same.json"
    shutil.copytree(data, copy)
    shutil.copy(shape, file)
    for status, said in started_together(out, given, {"data": copy, "shape": file}):
        assert status == 0, said


@pytest.mark.slow(25)
def test_a_newcomer_with_other_data_or_another_model_is_refused_and_the_job_trains_on(
    data: Path, shape: Path, other: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings: dict[str, Any] = {"precision": "fp32", "steps": 100_000, "seq_len_warmup": "", "valid_every": 100_000}
    comm = start([*command(out, data, shape, **settings), "--elastic"])
    until(lambda: steps_done(out) >= 1, comm)
    for given, named in (
        ({"data": other}, "this rank has --data "),
        ({"shape": "nano"}, "this rank has --model nano, the running job has "),
    ):
        words = [*command(out, **({"data": data, "shape": shape} | given), **settings), "--elastic"]
        stranger = run(words)
        assert stranger.returncode == 2, stranger.stderr
        assert named in stranger.stderr
        assert stranger.stderr.count("\n") == 1
        done = steps_done(out)
        until(lambda done=done: steps_done(out) > done, comm)
    comm.send_signal(signal.SIGTERM)
    _, said = comm.communicate()
    assert comm.returncode == 130, said
    assert "going on from step" not in said, "nobody disturbed it"


@pytest.mark.slow(15)
def test_a_newcomer_with_a_copy_of_the_data_joins_and_leads_with_that_of_the_crew(
    data: Path, shape: Path, alone: Path, tmp_path: Path
) -> None:
    out, gates, copy = tmp_path / "run", tmp_path / "gates", tmp_path / "copy"
    gates.mkdir()
    for step in (0, 6, 12):
        (gates / f"{step}.gate").touch()
    shutil.copytree(data, copy)
    arguments = {
        "out": out, "data": (str(data),), "model": str(shape), "steps": STEPS, "batch_rows": 4, "micro_batch": 3,
        "seq_len": 64, "valid_every": 10, "checkpoint_every": 7, "keep_last": 2, "precision": "fp32",
        "warmup_steps": 5, "seq_len_warmup": "16:0.3,32:0.6", "ngram_weight": 0.5, "device": "cpu",
        "elastic": True, "comm_timeout": 60.0,
    }  # fmt: skip

    def begin(**given: Any) -> Any:
        words = (gates, tmp_path / "said", "same", "same", arguments | given)
        process = SERVER.Process(target=member, args=words, daemon=True)
        process.start()
        return process

    comm, first = Rendezvous(out / FOLDER, "", 0), begin()
    wait(lambda: len(arrived(gates, 0)) == 1)
    second = begin(data=(str(copy),))
    wait(lambda: comm.waiting(2) == 1)
    (gates / "0.gate").unlink()
    wait(lambda: len(arrived(gates, 6)) == 2)
    shutil.rmtree(copy)
    os.kill(first.pid, signal.SIGKILL)
    (gates / "6.gate").unlink()
    wait(lambda: len(arrived(gates, 12)) == 1)
    third = begin()
    wait(lambda: comm.waiting(comm.newest().number + 1) == 1)
    (gates / "12.gate").unlink()
    for process in (second, third):
        process.join(90)
        assert process.exitcode == 0
    assert not (tmp_path / "said").exists()
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)


def test_text_is_the_data_in_use_as_long_as_nobody_changed_it(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    shutil.copy(text, file)
    config = PretrainConfig(data=(str(file),))
    used = prepare(DataConfig(data=config.data), tmp_path / "prepared").folder
    fingerprint = own_inputs(PretrainConfig(data=(str(used),)), used)["--data"]
    assert own_inputs(config, used)["--data"] == fingerprint
    other = f"other than {used} was made from (different: "
    assert own_inputs(PretrainConfig(data=config.data, seed=1), used)["--data"] == f"{other}seed)"
    assert own_inputs(PretrainConfig(), used)["--data"] == f"{other}data)"
    file.write_text("changed")
    assert own_inputs(config, used)["--data"] == f"{other}files)"
    assert own_inputs(PretrainConfig(data=("nowhere.txt",)), used)["--data"] == "missing (nowhere.txt does not exist)"
    assert own_inputs(config, tmp_path)["--data"] == "missing"


def test_weights_are_told_apart_by_their_bytes_and_networks_by_their_shape(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(TINY)
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        model = Transformer(config)
        model.initialize(seed)
        save(model, tmp_path / name)
    one, same, different = (own_model(str(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same != different
    file = tmp_path / "network.json"
    shutil.copy(tmp_path / "one" / "config.json", file)
    assert own_model(str(file)) not in (one, "missing")
    (tmp_path / "empty").mkdir()
    assert own_model(str(tmp_path / "empty")) == "missing"
    assert own_model("v2-lite") == "v2-lite"
