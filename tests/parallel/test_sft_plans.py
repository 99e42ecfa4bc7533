"""`motley sft --plan`: fine-tuning laid out as the plan says learns what one process learns, and goes on exactly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from commands import losses, records, until
from conversations import CONVERSATIONS, as_lines
from plans import PRETEND, plan_file, plan_of
from safetensors.torch import load_file
from spawned_ranks import MOTLEY, run_ranks, start_ranks

from motley.data.tokenizer import Tokenizer
from motley.files import read_json
from motley.model import SIZES, ModelConfig, Transformer, save
from motley.parallel.build import as_planned
from motley.train.config import SftConfig

STEPS = 24


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers that has learned nothing yet."""
    config = dataclasses.replace(
        SIZES["nano"], hidden_size=64, num_hidden_layers=3, num_nextn_predict_layers=0, vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, max_position_embeddings=128,
    )  # fmt: skip
    model = Transformer(config)
    model.initialize(0)
    folder = tmp_path_factory.mktemp("base") / "model"
    save(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("conversations") / "conversations.jsonl"
    file.write_text(as_lines(CONVERSATIONS * 12))
    return file


def command(out: Path, base: Path, conversations: Path, **settings: Any) -> list[str]:
    chosen: dict[str, Any] = {
        "out": out, "model": base, "data": conversations, "steps": STEPS, "precision": "fp32", "device": "cpu",
        "valid_every": 12, "checkpoint_every": 5, "warmup_steps": 5,
    }  # fmt: skip
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (chosen | settings).items()]
    return [*MOTLEY, "sft", *options]


def trained(ranks: int, words: list[str]) -> str:
    done = run_ranks(ranks, words)
    assert done.returncode == 0, done.stderr
    return done.stderr


def killed(words: list[str], out: Path) -> None:
    """Start two ranks and kill one of them once a checkpoint is written."""
    process = start_ranks(2, words)
    until(lambda: any((out / "checkpoints").glob("step-????????")), process)
    process.ranks[-1].kill()
    _, said = process.communicate()
    assert process.returncode != 0
    assert " failed: " in said


def learned(out: Path) -> list[dict[str, Any]]:
    """What was learned and how it was scored, which no clock decides."""
    return [record for record in records(out) if record["kind"] in ("train", "valid")]


@pytest.mark.slow(40)
def test_uneven_rows_of_a_plan_learn_what_one_process_learns_also_after_one_was_killed(
    base: Path, conversations: Path, tmp_path: Path
) -> None:
    file, plan = plan_file(tmp_path, PRETEND, ModelConfig.from_hf(read_json(base / "config.json")))
    rows = [group["sequences"] for group in plan["groups"]]
    assert rows[0] != rows[1], "the plan is uneven"
    file.write_text(json.dumps(plan | {"model": "no network that is known", "global_batch": 8}))
    alone, out = tmp_path / "alone", tmp_path / "run"
    trained(1, command(alone, base, conversations, seq_len=64, batch_rows=8))
    words = command(out, base, conversations, plan=file)
    killed(words, out)
    said = trained(2, words)
    assert "from the plan: --seq-len 64, --batch-rows 8" in said
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
    found, expected = (load_file(folder / "model" / "model.safetensors") for folder in (out, alone))
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name


@pytest.mark.slow(30)
def test_a_pipeline_of_a_plan_that_was_killed_goes_on_bit_for_bit(
    base: Path, conversations: Path, tmp_path: Path
) -> None:
    plan, alone, whole, out = (tmp_path / name for name in ("plan.json", "alone", "whole", "run"))
    cut = plan_of({"strong": (1, 1), "weak": (1, 1)}, [(["strong", "weak"], 1, [2, 1])])
    plan.write_text(json.dumps(cut))
    settings: dict[str, Any] = {"seq_len": 64, "batch_rows": 4}
    trained(1, command(alone, base, conversations, **settings))
    trained(2, command(whole, base, conversations, plan=plan, **settings))
    killed(command(out, base, conversations, plan=plan, **settings), out)
    trained(2, command(out, base, conversations, plan=plan, **settings))
    assert losses(whole) == pytest.approx(losses(alone), rel=1e-4)
    assert learned(out) == learned(whole)
    for name in ("model/model.safetensors", f"checkpoints/step-{STEPS:08d}/training.safetensors"):
        found, expected = load_file(out / name), load_file(whole / name)
        assert found.keys() == expected.keys()
        assert all(tensor.equal(expected[label]) for label, tensor in found.items()), name


def test_a_plan_chooses_rows_but_not_the_weights_to_start_from(capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"model": "nano", "seq_len": 512, "global_batch": 24}
    nano = dataclasses.replace(SIZES["nano"], vocab_size=300)
    config = as_planned(SftConfig(), plan, True, nano)
    assert (config.model, config.seq_len, config.batch_rows) == (Path("runs/default"), 512, 24)
    assert capsys.readouterr().err == "from the plan: --seq-len 512, --batch-rows 24\n"
    other: ModelConfig = dataclasses.replace(nano, num_hidden_layers=1)
    as_planned(SftConfig(batch_rows=40), plan, True, other)
    said = capsys.readouterr().err
    assert "--model runs/default, although the plan was made for nano: its times will not be those of this run" in said
    assert "--batch-rows 40, although the plan was made for 24" in said
