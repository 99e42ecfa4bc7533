"""Fine-tuning learns what the assistant says and nothing else, in packed rows that do not see each other."""

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conversations import CONVERSATIONS, WORDS, as_lines
from spawned_ranks import MOTLEY, run

from motley.data.conversation import ConversationEncoder, Message
from motley.data.pack import DataConfig, pack_conversations, prepare
from motley.data.stream import TokenStream
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.infer.load import open_engine
from motley.infer.sampler import SamplingParams
from motley.model import SIZES, Transformer, load, save
from motley.train.config import SftConfig
from motley.train.metrics import read_metrics
from motley.train.sft import sft
from motley.train.step import LossWeights, accumulate
from motley.train.validation import summed_nats, validate


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned nothing yet."""
    shape = SIZES["nano"].to_hf() | {
        "hidden_size": 64, "num_hidden_layers": 2, "num_nextn_predict_layers": 0, "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "max_position_embeddings": 128,
    }  # fmt: skip
    model = Transformer(type(SIZES["nano"]).from_hf(shape))
    model.initialize(0)
    folder = tmp_path_factory.mktemp("base") / "model"
    save(model, folder)
    tokenizer.save(folder)
    return folder


def test_the_gradient_of_a_packed_batch_is_that_of_each_conversation_alone(
    tokenizer: Tokenizer, base: Path, tmp_path: Path
) -> None:
    folder = pack_conversations(CONVERSATIONS * 3, tokenizer, tmp_path / "packed", seq_len=64).folder
    stream = TokenStream(folder, "train", 64, shuffle=False)
    batch = stream.rows(0, stream.rows_per_epoch)
    assert int(batch.documents.max()) > 0, "rows hold several conversations"
    model = load(base)
    accumulate(model, batch, 2, LossWeights(0.0, 0.0), confined=True)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}

    plain = load(base)
    encoder, total, count = ConversationEncoder(tokenizer), torch.zeros(()), 0
    spoken = [encoder.encode(conversation) for conversation in _trained_on(batch, encoder)]
    for one in spoken:
        ids, mask = torch.tensor([one.ids]), torch.tensor(one.loss_mask[1:])
        losses = F.cross_entropy(plain(ids)[0, :-1], ids[0, 1:], reduction="none")
        total, count = total + losses[mask].sum(), count + int(mask.sum())
    (total / count).backward()
    assert count == int((batch.targets >= 0).sum())
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            continue
        own = found[name]
        assert own is not None
        assert float((own - parameter.grad).abs().max()) <= 1e-5 * float(parameter.grad.abs().max()) + 1e-9, name


def _trained_on(batch: Any, encoder: ConversationEncoder) -> list[list[Message]]:
    """The conversations that stand in the batch (some were kept for validation), by their tokens."""
    standing = []
    for row, documents in zip(batch.input_ids, batch.documents, strict=True):
        for document in range(int(documents.max()) + 1):
            standing.append(row[documents == document].tolist())
    found = []
    for ids in standing:
        found += [one for one in CONVERSATIONS if encoder.encode(one).ids[: len(ids)] == ids][:1]
    assert len(found) == len(standing)
    return found


def test_held_out_loss_and_bits_per_byte_are_those_of_whole_logits(
    tokenizer: Tokenizer, base: Path, tmp_path: Path
) -> None:
    folder = pack_conversations(CONVERSATIONS * 20, tokenizer, tmp_path / "packed", seq_len=64).folder
    stream = TokenStream(folder, "valid", 64, shuffle=False)
    model, spelled = load(base), tokenizer.token_bytes()
    reading = validate(partial(summed_nats, model, confined=True), stream, 100, spelled)
    batch = stream.rows(0, stream.rows_per_epoch)
    with torch.no_grad():
        logits = model(batch.input_ids, batch.documents)
    nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum").item()
    targets = batch.targets[batch.targets >= 0].numpy()
    assert reading.tokens == len(targets)
    assert reading.bytes == int(np.asarray(spelled)[targets].sum())
    assert reading.nats_per_token == pytest.approx(nats / len(targets), rel=1e-5)
    assert reading.bits_per_byte == pytest.approx(nats / np.log(2) / reading.bytes, rel=1e-5)


def motley_sft(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run([*MOTLEY, "sft", *map(str, arguments)])


def test_a_model_learns_its_conversations_and_says_them(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "conversations.jsonl"
    file.write_text(as_lines(CONVERSATIONS * 12))
    out = tmp_path / "run"
    done = motley_sft(
        "--model", base, "--data", file, "--out", out, "--steps", 150, "--batch-rows", 4, "--seq-len", 64,
        "--learning-rate", 0.01, "--precision", "fp32", "--device", "cpu", "--valid-every", 50,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    engine = open_engine(out, "cpu")
    encoder = ConversationEncoder(engine.tokenizer)
    prompts = [encoder.prompt([Message("user", f"Say {word}.")]) for word in WORDS]
    said = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=40))
    texts = [engine.tokenizer.decode(one.ids) for one in said]
    right = [text == f"the word is {word}</think>{word}!" for text, word in zip(texts, WORDS, strict=True)]
    assert sum(right) >= len(WORDS) - 1, texts  # one conversation was kept for validation
    assert (out / "model" / "chat_template.jinja").is_file()


def test_fine_tuning_in_fp8_learns_what_it_learns_in_fp32(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "conversations.jsonl"
    file.write_text(as_lines(CONVERSATIONS * 12))
    losses: dict[str, list[float]] = {}
    for precision in ("fp32", "fp8"):
        out = tmp_path / precision
        sft(
            SftConfig(
                out=out, data=(str(file),), model=base, steps=20, batch_rows=4, seq_len=64, learning_rate=0.01,
                precision=precision, device="cpu", valid_every=20,
            )
        )  # fmt: skip
        losses[precision] = [record["loss"] for record in read_metrics(out) if record["kind"] == "train"]
    assert losses["fp8"] != losses["fp32"]
    assert losses["fp8"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["fp8"][-1] < losses["fp8"][0] - 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ".jsonl:12"),
        ('{"text": "no messages"}', ".jsonl:12"),
        ('{"messages": []}', ".jsonl:12"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', ".jsonl:12"),
        ('{"messages": [{"role": "user", "content": "only a question"}]}', "no assistant message"),
        ('{"messages": [{"role": "user", "content": 5}]}', ".jsonl:12"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(line: str, said: str, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "conversations.jsonl"
    file.write_text(as_lines(CONVERSATIONS) + line + "\n")
    with pytest.raises(InputError) as refused:
        sft(SftConfig(out=tmp_path / "run", data=(str(file),), model=base, steps=1, seq_len=64))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_conversation_longer_than_a_row_is_said(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "conversations.jsonl"
    file.write_text(as_lines([*CONVERSATIONS, [Message("user", "word " * 500), Message("assistant", "long")]]))
    done = motley_sft(
        "--model", base, "--data", file, "--out", tmp_path / "run", "--steps", 1, "--seq-len", 64, "--device", "cpu"
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0
    assert "1 too long" in done.stderr


def test_a_model_without_conversation_tokens_or_without_weights_is_refused(base: Path, tmp_path: Path) -> None:
    done = motley_sft("--model", tmp_path, "--data", tmp_path / "x.jsonl", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "holds no model" in done.stderr
    done = motley_sft("--model", base, "--seq-len", 64, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "--data is missing" in done.stderr


def test_a_pretrained_run_goes_on_as_fine_tuning(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 400))
    data = prepare(DataConfig(data=(str(text),), vocab_size=300), tmp_path / "data").folder
    common = ["--steps", "3", "--batch-rows", "2", "--seq-len", "64", "--device", "cpu", "--precision", "fp32"]
    pretrained = run([*MOTLEY, "pretrain", "--data", str(data), "--out", str(tmp_path / "base"), *common])
    assert pretrained.returncode == 0, pretrained.stderr
    file = tmp_path / "conversations.jsonl"
    file.write_text(as_lines(CONVERSATIONS * 3))
    done = motley_sft("--model", tmp_path / "base", "--data", file, "--out", tmp_path / "chat", *common, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 3
    before, after = load(tmp_path / "base" / "model"), load(tmp_path / "chat" / "model")
    assert before.config == after.config
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
