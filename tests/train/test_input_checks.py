"""Model, tokenizer and data that do not belong together are refused; those that do go on from any stage's folder."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from motley.data.conversation import Message
from motley.data.pack import DataConfig, pack_conversations, prepare
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.evaluate.command import EvalConfig, evaluate
from motley.model import SIZES, load
from motley.train.checkpoint import checkpoints
from motley.train.config import PretrainConfig, SftConfig
from motley.train.pretrain import pretrain
from motley.train.sft import sft

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CONVERSATIONS = [[Message("user", f"Say {word}."), Message("assistant", f"{word}!")] for word in WORDS]
COMMON: dict[str, Any] = {"batch_rows": 2, "micro_batch": 2, "seq_len": 32, "valid_rows": 4, "warmup_steps": 2,
                          "precision": "fp32", "device": "cpu", "checkpoint_every": 2}  # fmt: skip


def write_text(folder: Path, seed: int) -> Path:
    file = folder / f"text-{seed}.txt"
    chance = random.Random(seed)
    file.write_text("\n".join(" ".join(chance.choices(WORDS[seed:], k=30)) for _ in range(300)))
    return file


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Any:
    """`--model nano` is a model of a few thousand parameters here."""
    with pytest.MonkeyPatch.context() as patch:
        small = {"hidden_size": 32, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
        patch.setitem(SIZES, "nano", type(SIZES["nano"]).from_hf(SIZES["nano"].to_hf() | small))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return prepare(DataConfig(data=(str(write_text(folder, 0)),), vocab_size=300), folder / "prepared").folder


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many tokens in its vocabulary, but other ones."""
    folder = tmp_path_factory.mktemp("other")
    return prepare(DataConfig(data=(str(write_text(folder, 5)),), vocab_size=300), folder / "prepared").folder


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "run"
    pretrain(PretrainConfig(out=out, data=(str(data),), steps=4, **COMMON))
    return out


def packed(tokenizer_of: Path, out: Path) -> Path:
    return pack_conversations(CONVERSATIONS * 4, Tokenizer.load(tokenizer_of), out, 32).folder


def test_pretraining_goes_on_from_a_run_a_checkpoint_or_text_in_its_tokens(
    base: Path, data: Path, tmp_path: Path
) -> None:
    still: dict[str, Any] = COMMON | {"learning_rate": 1e-30, "weight_decay": 0.0, "bias_speed": 0.0}
    starts = {"run": (base, base / "model"), "checkpoint": (checkpoints(base)[0], checkpoints(base)[0])}
    for name, (start, weights) in starts.items():
        out = tmp_path / name
        pretrain(PretrainConfig(out=out, data=(str(data),), model=str(start), steps=1, **still))
        found, expected = load(out / "model").state_dict(), load(weights).state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    text = write_text(tmp_path, 1)
    pretrain(PretrainConfig(out=tmp_path / "text", data=(str(text),), model=str(base), steps=1, **still))
    assert Tokenizer.load(tmp_path / "text" / "data").definition == Tokenizer.load(data).definition


def test_a_run_that_stops_for_its_loss_names_a_start_that_works(data: Path, base: Path, tmp_path: Path) -> None:
    settings = PretrainConfig(out=tmp_path / "run", data=(str(data),), model=str(base), steps=20, **COMMON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("motley.train.config.factor", lambda step, *_: 1e30 if step == 4 else 1.0)
        with pytest.raises(InputError) as stopped:
            pretrain(settings)
    named = str(stopped.value).partition("give the command --model ")[2].partition(",")[0]
    assert named == str(checkpoints(tmp_path / "run")[-1])
    result = pretrain(PretrainConfig(out=tmp_path / "on", data=(str(data),), model=named, steps=2, **COMMON))
    assert math.isfinite(result["best_loss"])


def test_data_in_other_tokens_than_the_models_is_refused_everywhere(
    base: Path, other_data: Path, tmp_path: Path
) -> None:
    conversations = packed(other_data, tmp_path / "packed")
    for start in (
        lambda: pretrain(PretrainConfig(out=tmp_path / "a", data=(str(other_data),), model=str(base), **COMMON)),
        lambda: sft(SftConfig(out=tmp_path / "b", data=(str(conversations),), model=base, **COMMON)),
        lambda: evaluate(EvalConfig(model=base, data=other_data, families=(), device="cpu")),
    ):
        with pytest.raises(InputError, match="made with another tokenizer than that of"):
            start()


def test_text_is_no_conversations_and_conversations_are_no_text(base: Path, data: Path, tmp_path: Path) -> None:
    conversations = packed(data, tmp_path / "packed")
    with pytest.raises(InputError, match="holds text, and here --data must hold conversations"):
        sft(SftConfig(out=tmp_path / "a", data=(str(data),), model=base, **COMMON))
    with pytest.raises(InputError, match="holds conversations, and here --data must hold text"):
        pretrain(PretrainConfig(out=tmp_path / "b", data=(str(conversations),), **COMMON))
    with pytest.raises(InputError, match="holds conversations, and here --data must hold text"):
        evaluate(EvalConfig(model=base, data=conversations, families=(), device="cpu"))


def test_rows_longer_than_the_models_positions_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    longest = json.loads((base / "model" / "config.json").read_text())["max_position_embeddings"]
    too_long = COMMON | {"seq_len": longest + 1}
    file = tmp_path / "conversations.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9)
    for model in ("nano", str(base)):
        with pytest.raises(InputError, match=f"is longer than the model's {longest} positions"):
            pretrain(PretrainConfig(out=tmp_path / "a", data=(str(data),), model=model, **too_long))
    with pytest.raises(InputError, match=f"is longer than the model's {longest} positions"):
        sft(SftConfig(out=tmp_path / "b", data=(str(file),), model=base, **too_long))
