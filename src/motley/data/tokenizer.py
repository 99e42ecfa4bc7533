"""Encode and decode text: byte-level BPE with DeepSeek's control tokens.

Two kinds of tokens live in one vocabulary. *Ordinary* tokens stand for bytes of text; all 256 bytes are among
them, so any text has an encoding and comes back exactly. *Control* tokens (`<｜User｜>`, `<think>`, …) stand
for structure. Ordinary text never turns into control tokens, whatever somebody types: `Tokenizer.encode` does
not look for them, and only `motley.data.conversation` puts their ids into a sequence.

A tokenizer is trained here (`train_tokenizer`) or is any published DeepSeek `tokenizer.json`
(`Tokenizer.load`).
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from motley.errors import InputError
from motley.files import GIT_LFS, write_text

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
FILL_IN_THE_MIDDLE = ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")
CONTROL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, *FILL_IN_THE_MIDDLE)  # ids 0, 1, 2, …

# How text is cut before merges are learned; no token reaches across a cut. In this order:
PIECES = "|".join(
    (
        r"\p{N}",  # every digit alone: numbers of any length are made of the same ten tokens
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",  # a word, with a space or sign: " word", "_name"
        r" ?[^\s\p{L}\p{M}\p{N}]+",  # a run of signs, with the space before it: " +=", "):"
        r"\s*[\r\n][ \t]*",  # line ends and the indentation that follows: one step in code
        r"\s+(?!\S)|\s+",  # other white space; the last space goes to the word behind it
    )
)


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: GPT-2's printable spelling."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _is_control(token: str) -> bool:
    return token.startswith("<") and token.endswith(">")


class Tokenizer:
    """A byte-level BPE vocabulary with control tokens.

    Args:
        definition: content of a `tokenizer.json`; kept as it is, so that `save` writes back what was loaded.

    Attributes:
        vocab_size: highest id + 1, control tokens included.
        bos_id, eos_id, pad_id: begin of text, end of text, padding (a vocabulary without a padding token pads
            with `eos_id`, as DeepSeek-V2 does).
        user_id, assistant_id, think_id, end_think_id: conversation structure; reading one that the vocabulary
            lacks (those of models before R1 know no `<think>`) raises InputError.
    """

    def __init__(self, definition: str, origin: str = "tokenizer") -> None:
        self.definition, self.origin = definition, origin
        content = _parse(definition, origin)
        for added in content["added_tokens"]:
            # Published files mark `<think>` and `<｜User｜>` as not special, so that other tools show them.
            # Here every control token must be special, or `encode` would find it in ordinary text.
            added["special"] = _is_control(added["content"])
        try:
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the Rust side raises nothing narrower
            raise InputError(f"{origin} is not a tokenizer that can be read: {error}") from error
        self._backend.encode_special_tokens = True  # special tokens in the text are not looked for
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._added = {added["content"] for added in content["added_tokens"]}
        self._control = {name: index for name, index in vocabulary.items() if name in self._added and _is_control(name)}
        self._control_ids = frozenset(self._control.values())
        self.vocab_size: int = max(vocabulary.values()) + 1
        self._bytes = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            self._bytes[index] = self._spelled(token)
        self.bos_id, self.eos_id = self._id(BOS), self._id(EOS)
        self.pad_id = self._control.get(PAD, self.eos_id)

    def _spelled(self, token: str) -> bytes:
        if token in self._added:
            return token.encode()
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:
            raise InputError(f"{self.origin} is not a byte-level vocabulary: it holds the token {token!r}") from None

    def _id(self, token: str) -> int:
        if token not in self._control:
            raise InputError(
                f"{self.origin} has no control token {token}, which is needed here; "
                "use the tokenizer of a DeepSeek-R1, V3.1 or later model, or let motley train one"
            )
        return self._control[token]

    @cached_property
    def user_id(self) -> int:
        return self._id(USER)

    @cached_property
    def assistant_id(self) -> int:
        return self._id(ASSISTANT)

    @cached_property
    def think_id(self) -> int:
        return self._id(THINK)

    @cached_property
    def end_think_id(self) -> int:
        return self._id(END_THINK)

    @property
    def has_conversation_tokens(self) -> bool:
        """Whether the vocabulary has tokens for the speakers; some published before R1 have none for thinking."""
        return {USER, ASSISTANT} <= self._control.keys()

    @property
    def has_thinking_tokens(self) -> bool:
        return {THINK, END_THINK} <= self._control.keys()

    def control_id(self, token: str) -> int | None:
        """The id of the control token of this name; None if it is ordinary text for this vocabulary."""
        return self._control.get(token)

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of all control tokens; `encode` returns none of them."""
        return self._control_ids

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids. Control tokens typed in the text stay ordinary text; nothing is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Like `encode` for many texts at once, on all cores.

        Raises:
            InputError: a text holds half a surrogate pair (from broken JSON), so it is not Unicode.
        """
        try:
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
                raise InputError("the text is not valid Unicode: it holds half a surrogate pair") from None
            raise
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int], skip_control: bool = False) -> str:
        """Ids to text; bytes that are no UTF-8 (a sequence cut within a character) become U+FFFD."""
        decoder = self.stream_decoder(skip_control)
        return "".join([decoder.push(int(one)) for one in ids]) + decoder.finish()

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token stands for, int64 [vocab_size]; 0 for control tokens.

        Their sum over a sequence is the length of its text: it turns a loss per token into bits per byte.
        """
        lengths = np.array([len(spelled) for spelled in self._bytes], dtype=np.int64)
        lengths[sorted(self._control_ids)] = 0
        return lengths

    def stream_decoder(self, skip_control: bool = True) -> "StreamDecoder":
        """A decoder that takes one id at a time; by default control tokens give no text."""
        return StreamDecoder(self._bytes, self._control_ids, skip_control)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`, or the folder that holds one.

        Raises:
            InputError: no such file, not a byte-level tokenizer, or one without DeepSeek's begin and end.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            return cls(file.read_text(encoding="utf-8"), str(file))
        except FileNotFoundError:
            raise InputError(f"{file} does not exist; a tokenizer is a file tokenizer.json or its folder") from None
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not valid UTF-8 (byte {error.start}), so it is no tokenizer.json") from None

    def save(self, path: str | Path) -> Path:
        """Write `path`, or `path/tokenizer.json` unless it ends in .json; returns the file written.

        `ConversationEncoder.save` writes it together with what other tools need beside it.
        """
        path = Path(path)
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        write_text(file, self.definition)
        return file


class StreamDecoder:
    """Ids to text one at a time: `push` gives only whole characters, `finish` what is left."""

    def __init__(self, spellings: list[bytes], control: frozenset[int], skip_control: bool) -> None:
        self._spellings, self._control, self._skip_control = spellings, control, skip_control
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text completed by this token, often empty within a character.

        An id beyond the vocabulary gives no text: models pad their embedding tables.
        """
        if token_id in self._control:
            return self.finish() + ("" if self._skip_control else self._spellings[token_id].decode())
        if token_id < 0:
            raise ValueError(f"{token_id} is not a token id")
        return self._utf8.decode(self._spellings[token_id]) if token_id < len(self._spellings) else ""

    def finish(self) -> str:
        """U+FFFD if a character was begun and not completed, else nothing; the decoder starts afresh."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Learn a byte-level BPE vocabulary; the same texts in the same order give the same vocabulary.

    Args:
        texts: a sample of the text to be encoded; a few MB are enough for thousands of tokens.
        vocab_size: tokens wanted, control tokens and the 256 bytes included. Little text gives fewer.

    Raises:
        InputError: `vocab_size` leaves no room for a single merge.
    """
    smallest = len(CONTROL_TOKENS) + 256
    if vocab_size <= smallest:
        raise InputError(f"vocab_size is {vocab_size}; it must be more than {smallest} (control tokens and bytes)")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizers.AddedToken(name, normalized=False, special=True) for name in CONTROL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Other tools then put the begin token before plain text, as they do with DeepSeek's own tokenizers.
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, CONTROL_TOKENS.index(BOS))]
    )
    content = json.loads(backend.to_str())
    for added in content["added_tokens"]:
        # As published: what is not special is shown by other tools, and thinking should be.
        added["special"] = added["content"] not in (THINK, END_THINK)
    return Tokenizer(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _parse(definition: str, origin: str) -> dict[str, Any]:
    if definition.startswith(GIT_LFS):
        raise InputError(f"{origin} is a git-lfs pointer, not the file itself: run `git lfs pull` in that repository")
    try:
        content = json.loads(definition)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("added_tokens"), list) or "model" not in content:
        raise InputError(f"{origin} is no tokenizer.json: it lacks `model` or `added_tokens`")
    if not all(isinstance(added, dict) and isinstance(added.get("content"), str) for added in content["added_tokens"]):
        raise InputError(f"{origin} is no tokenizer.json: an entry of `added_tokens` lacks `content`")
    return content
