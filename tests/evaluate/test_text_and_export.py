"""Bits per byte are what a naive computation gives; what is exported generates the same text in transformers."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from spawned_ranks import MOTLEY, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from motley.data.conversation import ConversationEncoder, Message
from motley.data.pack import DataConfig, prepare
from motley.data.stream import TokenStream
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.evaluate.command import EvalConfig, evaluate, summary
from motley.evaluate.export import ExportConfig, export
from motley.evaluate.text import SEQ_LEN, bits_per_byte
from motley.files import write_json
from motley.infer.load import open_engine
from motley.infer.sampler import SamplingParams
from motley.model import SIZES, Transformer, load, save

QUESTIONS = ["What is 2 + 3?", "  leading spaces,\n\nlines and ünïcödé 漢字", "Sort 5, 1, 4 in ascending order."]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(60):
        words = " ".join(f"word{(number * 7 + place) % 50} ümläut" for place in range(120))
        (folder / f"{number}.txt").write_text(words)
    return prepare(DataConfig(data=(str(folder),), vocab_size=400), folder / "prepared").folder


@pytest.fixture(scope="module")
def short_documents(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many in each row, in tokens of the same tokenizer."""
    folder = tmp_path_factory.mktemp("short")
    for number in range(60):
        words = " ".join(f"word{(number * 3 + place) % 50}" for place in range(12))
        (folder / f"{number}.txt").write_text(words)
    config = DataConfig(data=(str(folder),), tokenizer=data, valid_share=0.5)
    return prepare(config, folder / "prepared").folder


@pytest.fixture(scope="module")
def model_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the tokenizer of the text."""
    tokenizer = Tokenizer.load(data)
    shape = SIZES["nano"].to_hf() | {"hidden_size": 64, "num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    shape |= {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    model = Transformer(type(SIZES["nano"]).from_hf(shape))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1, generator=generator)
    folder = tmp_path_factory.mktemp("model") / "model"
    save(model, folder)
    tokenizer.save(folder)
    return folder


@torch.no_grad()
def test_bits_per_byte_are_those_of_whole_logits_row_by_row(data: Path, model_folder: Path) -> None:
    model = load(model_folder)
    result = bits_per_byte(model, data, rows=5)
    stream = TokenStream(data, "valid", SEQ_LEN, shuffle=False)
    spelled, nats, size = Tokenizer.load(data).token_bytes(), 0.0, 0
    for row in range(min(5, stream.rows_per_epoch)):
        batch = stream.rows(row, 1)
        real = int((batch.documents[0] >= 0).sum())
        losses = F.cross_entropy(
            model(batch.input_ids[:, :real])[0].double(), batch.targets[0, :real], ignore_index=-100, reduction="sum"
        )
        nats += losses.item()
        size += sum(int(spelled[target]) for target in batch.targets[0].tolist() if target >= 0)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result["bytes"] == size


@torch.no_grad()
def test_within_documents_each_is_read_as_if_it_stood_alone(short_documents: Path, model_folder: Path) -> None:
    model = load(model_folder)
    result = bits_per_byte(model, short_documents, rows=3, confined=True)
    stream = TokenStream(short_documents, "valid", SEQ_LEN, shuffle=False)
    nats, documents = 0.0, 0
    for row in range(min(3, stream.rows_per_epoch)):
        batch = stream.rows(row, 1)
        for document in range(int(batch.documents.max()) + 1):
            own = batch.documents[0] == document
            documents += 1
            logits = model(batch.input_ids[:, own])[0].double()
            nats += F.cross_entropy(logits, batch.targets[0, own], ignore_index=-100, reduction="sum").item()
    assert documents > 3
    assert result["nats_per_token"] == pytest.approx(nats / result["tokens"], rel=1e-5)
    assert result["attention"] == "within documents"
    across = bits_per_byte(model, short_documents, rows=3)
    assert across["attention"] == "across documents"
    assert across["nats_per_token"] != pytest.approx(result["nats_per_token"], rel=1e-6)


@pytest.mark.parametrize("where", ["model", "checkpoints/step-00000002"])
def test_text_is_measured_as_the_run_was_trained_unless_told_otherwise(
    where: str, short_documents: Path, model_folder: Path, tmp_path: Path
) -> None:
    def measured(asked: Path, confined: bool | None = None) -> tuple[float, str]:
        config = EvalConfig(asked, data=short_documents, families=(), device="cpu", confine_to_document=confined)
        result = evaluate(config)
        assert result["text"]["attention"] in summary(result)
        return result["text"]["nats_per_token"], result["text"]["attention"]

    model = load(model_folder)
    within, across = (bits_per_byte(model, short_documents, confined=way)["nats_per_token"] for way in (True, False))
    assert within != across
    assert measured(model_folder) == (across, "across documents"), "it belongs to no run"
    assert measured(model_folder, True) == (within, "within documents")
    settings = {
        "within": ({"stage": "pretrain", "confine_to_document": True}, within),
        "across": ({"stage": "pretrain", "confine_to_document": False}, across),
        "older": ({"stage": "pretrain"}, across),
        "older-sft": ({"stage": "sft"}, within),
    }
    for name, (values, expected) in settings.items():
        run = tmp_path / name
        shutil.copytree(model_folder, run / where)
        write_json(run / "config.json", values)
        assert measured(run)[0] == measured(run / where)[0] == expected, name
        assert measured(run, expected == across)[0] == (across if expected == within else within), name


def test_what_is_exported_says_the_same_greedy_text_in_transformers(model_folder: Path, tmp_path: Path) -> None:
    export(ExportConfig(model_folder, tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    engine = open_engine(model_folder, "cpu")
    encoder = ConversationEncoder(engine.tokenizer)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt = encoder.prompt([Message("user", question)])
        assert inputs["input_ids"][0].tolist() == prompt
        said = theirs.generate(**inputs, do_sample=False, max_new_tokens=40)[0, len(prompt) :]
        (ours,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=40))
        theirs_text = tokenizer.decode(said, skip_special_tokens=False)
        assert theirs_text.removesuffix(tokenizer.eos_token) == engine.tokenizer.decode(ours.ids)
        assert len(ours.ids) > 3


def test_the_command_exports_a_whole_folder(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run([*MOTLEY, "export", str(model_folder), "--to", "hf", str(out), "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(out)
    assert {file.name for file in out.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json",
    }  # fmt: skip
    before, after = load(model_folder).state_dict(), load(out).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_with_something_else_in_it_is_left_alone(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes.txt, which is no part of a checkpoint"):
        export(ExportConfig(model_folder, tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_earlier_export_is_replaced(model_folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        export(ExportConfig(model_folder, tmp_path / "out"))
    assert load(tmp_path / "out").config == load(model_folder).config


def test_what_a_killed_export_to_the_same_place_left_is_removed_and_nothing_else(
    model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out[1].writing-12345678").mkdir()
    (tmp_path / "out[1].writing-12345678" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "other.writing-12345678").mkdir()
    export(ExportConfig(model_folder, tmp_path / "out[1]"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.writing-12345678", "out[1]"]
