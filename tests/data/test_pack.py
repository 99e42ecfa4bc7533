import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from motley.data import pack, shards
from motley.data.conversation import ConversationEncoder, Message
from motley.data.pack import DataConfig, fill_rows, pack_conversations, prepare, slices, split_documents
from motley.data.shards import SPLITS, Prepared, ShardWriter
from motley.data.tokenizer import Tokenizer, train_tokenizer
from motley.errors import InputError

WORDS = [
    "def",
    "return",
    "self",
    "value",
    "for",
    "in",
    "range",
    "12",
    "345",
    "=",
    "(",
    "):",
    "\n",
    "\n    ",
    "  ",
]
WORDS += ["# naïve", "你好", "🎉", "<think>", "\t"]


def random_text(rng: random.Random, words: int) -> str:
    return " ".join(["start", *rng.choices(WORDS, k=words), "end"])


def write_corpus(folder: Path, count: int = 120, seed: int = 1) -> list[str]:
    """A folder of documents of very different lengths, as jsonl; returns the texts."""
    rng = random.Random(seed)
    texts = [random_text(rng, rng.choice([1, 5, 40, 400])) for _ in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(rows, encoding="utf-8")
    return texts


def stored(prepared: Prepared, split: shards.Split) -> list[str]:
    """The documents in the shards, read without the stream."""
    tokenizer, found = prepared.tokenizer, []
    for entry in prepared.shards[split]:
        shard = shards.Shard(prepared, entry)
        for start, stop in itertools.pairwise([*shard.documents, len(shard.tokens)]):
            ids = shard.tokens[start:stop].tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert not set(ids[1:-1]) & tokenizer.control_ids
            found.append(tokenizer.decode(ids[1:-1]))
    return found


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_corpus(tmp_path / "in")
    return DataConfig(data=(str(tmp_path / "in"),), vocab_size=400, valid_share=0.1)


def test_every_document_is_stored_exactly_once(config: DataConfig, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)
    monkeypatch.setattr(pack, "ENCODE_SLICE_CHARACTERS", 300)
    monkeypatch.setattr(pack, "ENCODE_BATCH_CHARACTERS", 1000)
    texts = write_corpus(tmp_path / "in")
    prepared = prepare(config, tmp_path / "out")
    assert len(prepared.shards["train"]) > 5
    kept = {split: stored(prepared, split) for split in SPLITS}
    assert sorted(kept["train"] + kept["valid"]) == sorted(set(texts))
    assert kept["train"]
    assert kept["valid"]


def test_statistics_are_what_a_count_by_hand_gives(config: DataConfig, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "in")
    extra = [texts[0], texts[3] + "\r\n", "   \n", ""]  # two duplicates, two without text
    (tmp_path / "in" / "extra.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in extra))
    prepared = prepare(config, tmp_path / "out")
    unique = set(texts)
    assert prepared.duplicates == len(texts) - len(unique) + 2
    assert prepared.dropped == 2
    kept = {split: stored(prepared, split) for split in SPLITS}
    tokenizer = prepared.tokenizer
    for split in SPLITS:
        statistics = getattr(prepared, split)
        assert statistics.documents == len(kept[split])
        assert statistics.characters == sum(map(len, kept[split]))
        assert statistics.bytes == sum(len(text.encode()) for text in kept[split])
        assert statistics.tokens == sum(len(tokenizer.encode(text)) + 2 for text in kept[split])
    size = sum(len(text.encode()) for text in unique)
    assert prepared.bytes_per_token == pytest.approx(size / prepared.tokens)
    assert f"{len(unique):,} documents" in prepared.summary()
    assert prepared.vocab_size == tokenizer.vocab_size <= 400


def test_pieces_have_the_tokens_of_the_whole(tmp_path: Path) -> None:
    text = Path(pack.__file__).read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text], 500)
    for size in (50, 200, 1000):
        pieces = list(slices(text, size))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= size
    assert [one for piece in slices(text, 5000) for one in tokenizer.encode(piece)] == tokenizer.encode(text)
    assert "".join(slices("x" * 1001, 100)) == "x" * 1001  # no line to cut at


def test_the_same_inputs_find_the_folder_and_others_say_so(config: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare(config, out)
    before = (out / "data.json").stat().st_mtime_ns
    assert prepare(config, out) == first
    assert (out / "data.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"other inputs \(different: vocab_size, seed\)"):
        prepare(dataclasses.replace(config, vocab_size=350, seed=1), out)
    write_corpus(tmp_path / "in", seed=2)
    with pytest.raises(InputError, match=r"other inputs \(different: files\)"):
        prepare(config, out)


def test_a_folder_that_is_kept_says_so_and_how_to_read_the_sources_again(config, tmp_path: Path, capsys) -> None:
    prepare(config, tmp_path / "out")
    assert "is kept" not in capsys.readouterr().err
    prepare(config, tmp_path / "out")
    said = capsys.readouterr().err
    assert f"{tmp_path / 'out'} was prepared before and is kept" in said
    assert "remove it" in said


def test_the_same_inputs_give_the_same_folder_and_the_split_depends_on_the_seed(
    config: DataConfig, tmp_path: Path
) -> None:
    one, two = prepare(config, tmp_path / "one"), prepare(config, tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    three = prepare(dataclasses.replace(config, seed=3), tmp_path / "three")
    assert stored(three, "valid") != stored(one, "valid")
    assert three.fingerprint != one.fingerprint


def test_a_folder_of_something_else_is_not_touched(config: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not a data folder"):
        prepare(config, out)
    with pytest.raises(InputError, match="not a data folder"):
        pack_conversations([], train_tokenizer(["a b"], 300), out, 64)
    assert (out / "letter.txt").read_text() == "dear"


def test_bad_input_leaves_nothing_behind(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "in" / "z.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"z\.txt:1 is not valid UTF-8"):
        prepare(config, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("changes", [{"valid_share": 0}, {"valid_share": 0.9}, {"max_bytes": 0}])
def test_settings_without_sense_are_refused(config: DataConfig, tmp_path: Path, changes: dict) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        prepare(dataclasses.replace(config, **changes), tmp_path / "out")


def test_reading_stops_after_max_bytes(config: DataConfig, tmp_path: Path) -> None:
    prepared = prepare(dataclasses.replace(config, max_bytes=5000), tmp_path / "out")
    # One duplicate more or less, one character cut in two.
    assert 4000 < prepared.train.bytes + prepared.valid.bytes <= 5000


def test_one_book_gives_its_end_for_validation(tmp_path: Path) -> None:
    book = "".join(f"Line {n} of the book, {n * n}.\n" for n in range(2000))
    (tmp_path / "book.txt").write_text(book)
    prepared = prepare(DataConfig(data=(str(tmp_path / "book.txt"),), vocab_size=400), tmp_path / "out")
    (train,), (valid,) = stored(prepared, "train"), stored(prepared, "valid")
    assert train + valid == book
    assert valid.startswith("Line ")
    assert 0.02 <= len(valid) / len(book) < 0.022
    assert prepared.summary().startswith("1 documents, ")  # though both splits hold a part of it
    (tmp_path / "line.txt").write_text("x " * 5000 + "\n" + "y " * 20_000)  # no line ends near the end
    line = DataConfig(data=(str(tmp_path / "line.txt"),), vocab_size=280)
    assert len(stored(prepare(line, tmp_path / "line"), "valid")[0]) == 1000


def test_splitting_keeps_every_document_and_some_in_both_splits() -> None:
    rng = random.Random(1)
    for count in range(1, 12):
        texts = [f"document {n}\n" + "word word word\n" * rng.randrange(1, 200) for n in range(count)]
        for share in (0.01, 0.3):
            documents = [(text, rng.randbytes(16)) for text in texts]
            parts = list(split_documents(documents, share))
            assert {split for split, _ in parts} == set(SPLITS)
            joined = "".join(text for _, text in parts)
            assert sorted(joined.splitlines()) == sorted("".join(texts).splitlines())
    with pytest.raises(InputError, match="too little text"):
        list(split_documents([("x", bytes(16))], 0.1))
    with pytest.raises(InputError, match="too little text"):
        list(split_documents([], 0.1))


def test_a_documents_split_does_not_depend_on_the_others() -> None:
    rng = random.Random(2)
    documents = [(f"text {n}", rng.randbytes(16)) for n in range(500)]
    every = {text for split, text in split_documents(documents, 0.1) if split == "valid"}
    some = {text for split, text in split_documents(documents[100:400], 0.1) if split == "valid"}
    assert some == every & {text for text, _ in documents[100:400]}


def test_a_given_tokenizer_is_used_as_it_is(config: DataConfig, tmp_path: Path) -> None:
    mine = train_tokenizer(["other words entirely, in another order\n" * 10], 320)
    mine.save(tmp_path / "mine")
    prepared = prepare(dataclasses.replace(config, tokenizer=tmp_path / "mine"), tmp_path / "out")
    assert prepared.tokenizer.definition == mine.definition
    assert prepared.vocab_size == mine.vocab_size


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    for size, kind in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        writer = ShardWriter(tmp_path, "train", size)
        writer.add(np.array([0, size - 1, 1]), characters=1, size=1)
        writer.close()
        tokens = np.load(tmp_path / "train-00000.tokens.npy")
        assert tokens.dtype == kind
        assert tokens.tolist() == [0, size - 1, 1]


def test_the_tokenizer_sample_is_bounded_and_drawn_from_everywhere(config: DataConfig, monkeypatch) -> None:
    monkeypatch.setattr(pack, "SAMPLE_CHARACTERS", 3000)
    monkeypatch.setattr(pack, "SAMPLE_SLICE_CHARACTERS", 200)
    sample, total = pack._sample(config)
    texts = [json.loads(line)["text"] for line in Path(config.data[0], "corpus.jsonl").read_text().splitlines()]
    assert total == sum(len(text.encode()) for text in set(texts))
    assert 3000 <= sum(map(len, sample)) < 3200
    origins = [n for n, text in enumerate(texts) for piece in sample if piece in text]
    assert min(origins) < len(texts) / 4
    assert max(origins) > 3 * len(texts) / 4


PREPARE = textwrap.dedent("""
    import resource, signal, sys
    from pathlib import Path
    from motley.data.pack import DataConfig, prepare
    from motley.errors import InputError
    if limit := int(sys.argv[3]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        prepare(DataConfig(data=(sys.argv[1],), vocab_size=400), Path(sys.argv[2]))
    except InputError as error:
        print(error)
""")


def run_prepare(source: Path, out: Path, limit: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(source), str(out), str(limit)], stdout=subprocess.PIPE, text=True
    )


def test_a_full_disk_is_one_clear_sentence_and_leaves_nothing(config: DataConfig, tmp_path: Path) -> None:
    process = run_prepare(tmp_path / "in", tmp_path / "out", limit=4096)  # a file cannot grow further
    message, _ = process.communicate()
    assert message.startswith(f"could not write {tmp_path / 'out'}")
    assert message.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_killed_at_any_moment_the_folder_is_whole_or_absent(config: DataConfig, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "in", count=1500)
    out = tmp_path / "out"
    rng = random.Random(3)
    for _ in range(4):
        process = run_prepare(tmp_path / "in", out)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out*")) and time.monotonic() < deadline:
            time.sleep(0.005)  # it has begun
        time.sleep(rng.random() * 0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if out.exists():
            assert len(stored(Prepared.load(out), "train")) == Prepared.load(out).train.documents
            shutil.rmtree(out)
    process = run_prepare(tmp_path / "in", out)
    assert process.communicate()[0] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]  # nor is anything left over
    kept = [text for split in SPLITS for text in stored(Prepared.load(out), split)]
    assert sorted(kept) == sorted(set(texts))


# ------------------------------------------------------------------------------------------ conversations


def conversations(count: int, seed: int = 1) -> list[list[Message]]:
    rng = random.Random(seed)
    return [
        [
            Message("user", f"{number}: {random_text(rng, rng.randrange(1, 12))}"),
            Message("assistant", random_text(rng, rng.randrange(6)), rng.choice([None, random_text(rng, 9)])),
        ]
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS * 20)], 330)


def test_conversations_are_packed_whole_and_once(tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pack, "ROW_BUFFER", 50)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
    given = conversations(300)
    encoder, seq_len = ConversationEncoder(tokenizer), 60
    encoded = [encoder.encode(one) for one in given]
    fitting = [one for one in encoded if len(one.ids) <= seq_len + 1]
    prepared = pack_conversations(iter([*given, *given[:7]]), tokenizer, tmp_path / "out", seq_len, 0.1)
    assert prepared.duplicates == 7
    assert prepared.dropped == len(encoded) - len(fitting) > 0
    found = []
    for split in SPLITS:
        statistics = getattr(prepared, split)
        for entry in prepared.shards[split]:
            shard = shards.Shard(prepared, entry)
            for start, stop in itertools.pairwise([*shard.documents, len(shard.tokens)]):
                found.append((shard.tokens[start:stop].tolist(), shard.loss[start:stop].tolist()))
        assert statistics.rows == sum(entry["rows"] for entry in prepared.shards[split]) > 0
        assert statistics.documents == sum(entry["documents"] for entry in prepared.shards[split])
    assert sorted(found) == sorted((one.ids, one.loss_mask) for one in fitting)
    assert prepared.train.loss_tokens + prepared.valid.loss_tokens == sum(sum(one.loss_mask) for one in fitting)
    assert len(prepared.shards["train"]) > 1


def test_packed_conversations_are_found_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def never() -> list[list[Message]]:
        raise AssertionError("the conversations were read again")
        yield

    out, inputs = tmp_path / "out", {"families": ("sums", "sorting"), "count": 20}
    first = pack_conversations(conversations(20), tokenizer, out, 128, inputs=inputs)
    assert pack_conversations(never(), tokenizer, out, 128, inputs=inputs) == first
    with pytest.raises(InputError, match=r"different: conversations\)"):
        pack_conversations(never(), tokenizer, out, 128, inputs={**inputs, "count": 21})
    with pytest.raises(InputError, match=r"different: seq_len\)"):
        pack_conversations(never(), tokenizer, out, 256, inputs=inputs)
    anew = pack_conversations(conversations(21), tokenizer, out, 128)  # nothing to compare with: made anew
    assert anew.train.documents + anew.valid.documents == 21


def test_too_few_conversations_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for given, seq_len in ((conversations(1), 128), (conversations(1) * 5, 128), (conversations(50), 4)):
        with pytest.raises(InputError, match="too few conversations"):
            pack_conversations(given, tokenizer, tmp_path / "out", seq_len)
        assert not (tmp_path / "out").exists()


def test_rows_are_filled_well_and_never_too_full() -> None:
    rng = random.Random(1)
    for _ in range(20):
        capacity = rng.randrange(50, 200)
        lengths = [rng.randrange(1, capacity + 1) for _ in range(rng.randrange(1, 300))]
        rows = fill_rows(lengths, capacity)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
        # No packing needs fewer rows than these, and this one needs little more.
        fewest = max(-(-sum(lengths) // capacity), sum(length > capacity / 2 for length in lengths))
        assert len(rows) <= 1.25 * fewest + 1
