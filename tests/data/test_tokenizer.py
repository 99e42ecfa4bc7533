import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from motley.data.tokenizer import (
    ASSISTANT,
    BOS,
    CONTROL_TOKENS,
    END_THINK,
    EOS,
    PAD,
    THINK,
    USER,
    Tokenizer,
    train_tokenizer,
)
from motley.errors import InputError

TEXTS = [
    'def add(first, second):\n    """Return the sum of two numbers."""\n    return first + second\n\n\n' * 20,
    "The quick brown fox jumps over the lazy dog; 12345 times, in 2026. Ünïcödé, 你好, emoji 🎉.\n" * 20,
    "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n\n" * 20,
]
FRAGMENTS = [
    *CONTROL_TOKENS,
    *"<｜>|/▁",
    "<｜",
    "｜>",
    "<think",
    "/think>",
    "User",
    "\n",
    "    ",
    "\t",
    "\r\n",
    "\0",
    "7",
    "é",
    "你",
    "🎉",
    "é",
    "\u200d",
    "word",
    " word",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 600)


def deepseek_like(names: list[str]) -> str:
    """A `tokenizer.json` with the structure of DeepSeek-V3's: several regex splits, then byte level."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥\u3040-ゟ゠-ヿ]+"), "isolated"),
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    # As published, the tokens of conversations are added but not marked special.
    backend.add_tokens([AddedToken(name, special=name in (BOS, EOS, PAD), normalized=False) for name in names])
    return backend.to_str()


V3_NAMES = [BOS, EOS, PAD, "<｜place▁holder▁no▁0｜>", USER, ASSISTANT, THINK, END_THINK]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(FRAGMENTS, k=rng.randrange(12))) for _ in range(count)]


def test_any_text_comes_back_exactly_and_control_tokens_typed_in_it_stay_text(tokenizer: Tokenizer) -> None:
    for text in random_texts(2000, seed=1):
        ids = tokenizer.encode(text)
        assert not set(ids) & tokenizer.control_ids, repr(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_a_published_deepseek_tokenizer_keeps_the_same_promises(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(definition := deepseek_like(V3_NAMES), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizers.Tokenizer.from_str(definition).get_vocab(with_added_tokens=True)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (ids[BOS], ids[EOS], ids[PAD])
    assert (tokenizer.user_id, tokenizer.assistant_id) == (ids[USER], ids[ASSISTANT])
    assert (tokenizer.think_id, tokenizer.end_think_id) == (ids[THINK], ids[END_THINK])
    assert tokenizer.vocab_size == len(ids)
    for text in random_texts(1000, seed=2):
        encoded = tokenizer.encode(text)
        assert not set(encoded) & tokenizer.control_ids, repr(text)
        assert tokenizer.decode(encoded) == text
    assert len(tokenizer.encode("123")) == 1  # its own rules: up to three digits at once
    saved = tokenizer.save(tmp_path / "copy")
    assert saved.read_text(encoding="utf-8") == definition  # written back as it was published


def test_a_base_tokenizer_without_thinking_fails_only_where_a_conversation_needs_it(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(deepseek_like([BOS, EOS]), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("plain text")) == "plain text"
    assert tokenizer.pad_id == tokenizer.eos_id
    with pytest.raises(InputError, match=rf"{tmp_path}.*{THINK}"):
        _ = tokenizer.think_id


def test_digits_are_single_tokens_and_all_bytes_are_known(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("31415926535")) == 11
    assert {tokenizer.decode([one]) for one in tokenizer.encode("0123456789")} == set("0123456789")
    assert len(tokenizer.encode("x = 12")) == len(tokenizer.encode("x = 3")) + 1
    for byte in range(256):
        assert tokenizer.token_bytes()[tokenizer.encode(chr(byte))].sum() == len(chr(byte).encode())


def test_decoding_agrees_with_the_library(tokenizer: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_str(tokenizer.definition)
    rng = random.Random(3)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert library.decode(ids) == text
        start = rng.randrange(len(ids))  # cut within characters, too
        assert tokenizer.decode(ids[start : start + 9]) == library.decode(ids[start : start + 9])


def test_control_tokens_can_be_shown_or_left_out(tokenizer: Tokenizer) -> None:
    ids = [
        tokenizer.bos_id,
        *tokenizer.encode("a"),
        tokenizer.think_id,
        *tokenizer.encode("b"),
        tokenizer.eos_id,
    ]
    assert tokenizer.decode(ids) == f"{BOS}a{THINK}b{EOS}"
    assert tokenizer.decode(ids, skip_control=True) == "ab"
    assert tokenizer.token_bytes()[[tokenizer.bos_id, tokenizer.think_id]].tolist() == [0, 0]


def test_a_stream_gives_only_whole_characters(tokenizer: Tokenizer) -> None:
    for text in random_texts(300, seed=4):
        decoder, parts = tokenizer.stream_decoder(), []
        for one in tokenizer.encode(text):
            parts.append(decoder.push(one))
            assert "\ufffd" not in parts[-1]
        assert "".join(parts) + decoder.finish() == text
    decoder = tokenizer.stream_decoder()
    party = tokenizer.encode("🎉")
    assert [decoder.push(one) for one in party[:-1]] == [""] * (len(party) - 1)
    assert decoder.finish() == "\ufffd"
    assert decoder.push(tokenizer.vocab_size + 5) == ""  # models pad their embedding tables
    with pytest.raises(ValueError, match="-1"):
        decoder.push(-1)


def test_training_gives_the_same_vocabulary_in_every_process(tokenizer: Tokenizer) -> None:
    program = (
        "import json,sys; from motley.data.tokenizer import train_tokenizer;"
        "sys.stdout.buffer.write(train_tokenizer(json.load(sys.stdin), 600).definition.encode())"
    )
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(TEXTS).encode(),
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert result.stdout.decode() == tokenizer.definition


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.definition == tokenizer.definition
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    np.testing.assert_array_equal(loaded.token_bytes(), tokenizer.token_bytes())


def test_small_texts_give_small_vocabularies_and_too_small_ones_are_refused() -> None:
    tiny = train_tokenizer(["aa aa"], 4096)
    assert len(CONTROL_TOKENS) + 256 < tiny.vocab_size < 300
    assert tiny.decode(tiny.encode("aa 🎉")) == "aa 🎉"
    with pytest.raises(InputError, match="266"):
        train_tokenizer(TEXTS, 266)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "no tokenizer.json"),
        (b'{"added_tokens": [{}], "model": {}}', "no tokenizer.json"),
        (b'{"added_tokens": [], "model": {"type": "nonsense"}}', "not a tokenizer that can be read"),
        (b"\xff\xfe", "not valid UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
        (None, "does not exist"),
    ],
)
def test_a_broken_tokenizer_file_is_named(tmp_path, content: bytes | None, message: str) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.load(file)
    assert str(file) in str(caught.value)


def test_a_vocabulary_that_is_not_of_bytes_is_refused(tmp_path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"▁hello": 0, "a": 1}, []))
    backend.add_special_tokens([BOS, EOS])
    (tmp_path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    with pytest.raises(InputError, match="not a byte-level vocabulary"):
        Tokenizer.load(tmp_path)
