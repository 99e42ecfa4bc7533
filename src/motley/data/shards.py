"""A folder of token shards: write it, find it again, open it.

It holds `data.json` (what is in it, from what it was made, statistics), `tokenizer.json`, and for each shard,
as NumPy arrays that are memory-mapped when read:

    train-00000.tokens.npy       token ids, uint16 (or uint32 for more than 65,536 tokens)
    train-00000.documents.npy    where in it each document or conversation begins, int64
    train-00000.loss.npy         conversations only: whether each token is trained on, bool
    train-00000.rows.npy         conversations only: the first conversation of each row, int64

A document or conversation lies within one shard, from its begin token to its end token. The folder is
complete or absent.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.files import TEMPORARY_MARK, read_json, write_json
from motley.progress import note

DATA_FILE = "data.json"
FORMAT = 1  # of the folder; another number means the files cannot be read as described above
TEXT, CONVERSATIONS = "text", "conversations"
Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")
SHARD_TOKENS = 1 << 24  # a shard is written when it holds this many; 32 MB as uint16


@dataclass(frozen=True)
class SplitStatistics:
    """Statistics of one split. `characters` and `bytes` (UTF-8) are of the text alone; `tokens` are all tokens.

    `rows` and `loss_tokens` (tokens that are trained on) are 0 for text, where rows depend on the reader.
    """

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    rows: int = 0
    loss_tokens: int = 0


@dataclass(frozen=True)
class Prepared:
    """A finished data folder and its statistics.

    Attributes:
        folder: where it is.
        kind: "text" or "conversations".
        seq_len: tokens per row that conversations were packed for; None for text.
        vocab_size, pad_id: of the tokenizer.
        duplicates: documents left out because an equal one came before.
        dropped: documents without text, or conversations longer than a row.
        divided: documents of which the end is kept for validation, so that they count in both splits; 0 or 1.
        train, valid: what was kept.
        shards: for each split, name and number of tokens, documents and rows of each shard.
        fingerprint: hash over tokenizer and shards; equal ones are the same data.
    """

    folder: Path
    kind: str
    seq_len: int | None
    vocab_size: int
    pad_id: int
    duplicates: int
    dropped: int
    train: SplitStatistics
    valid: SplitStatistics
    shards: Mapping[Split, list[dict[str, Any]]]
    fingerprint: str
    divided: int = 0

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the shards were made with."""
        return Tokenizer.load(self.folder)

    @property
    def tokens(self) -> int:
        """Tokens of both splits, control tokens included."""
        return self.train.tokens + self.valid.tokens

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token; more is better compression."""
        return (self.train.bytes + self.valid.bytes) / max(self.tokens, 1)

    def summary(self) -> str:
        """One line for people."""
        noun, left_out = ("documents", "empty") if self.kind == TEXT else ("conversations", "too long")
        return (
            f"{self.train.documents + self.valid.documents - self.divided:,} {noun}, "
            f"{self.train.characters + self.valid.characters:,} characters, "
            f"{self.tokens:,} tokens ({self.valid.tokens:,} for validation), "
            f"{self.bytes_per_token:.2f} bytes per token, vocabulary of {self.vocab_size:,}; "
            f"left out: {self.duplicates:,} duplicates, {self.dropped:,} {left_out}"
        )

    def write(self, inputs: Mapping[str, Any]) -> None:
        """Write `data.json`; `inputs` are what the folder was made from, as JSON values."""
        values = asdict(self)
        del values["folder"]
        write_json(self.folder / DATA_FILE, {"format": FORMAT, **values, "inputs": inputs})

    @classmethod
    def load(cls, folder: Path) -> "Prepared":
        """Read `data.json`.

        Raises:
            InputError: it is missing, damaged or of another format.
        """
        file = folder / DATA_FILE
        values = read_json(file)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise InputError(f"{file} does not describe data of format {FORMAT}; prepare the data again")
        try:
            del values["inputs"]
            for split in SPLITS:
                values[split] = SplitStatistics(**values[split])
            return cls(folder=folder, **values)
        except (KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged ({error}); prepare the data again") from None


def find(out: Path, inputs: Mapping[str, Any] | None) -> Prepared | None:
    """The data in `out` if it was made from `inputs`, None if there is none; removes what a killed process left.

    Raises:
        InputError: `out` was made from other inputs, or is no data folder.
    """
    for leftover in out.parent.glob(f"{out.name}{TEMPORARY_MARK}*"):
        shutil.rmtree(leftover)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / DATA_FILE).is_file():
        raise InputError(f"{out} exists and is not a data folder; choose another place")
    if inputs is None:  # nothing to compare with: to be made anew
        return None
    prepared = Prepared.load(out)
    if changed := differences(out, inputs):
        raise InputError(
            f"{out} was prepared from other inputs (different: {', '.join(changed)}); remove it or choose another place"
        )
    note(f"{out} was prepared before and is kept; to read the sources again, a changed hub dataset say, remove it")
    return prepared


def differences(folder: Path, inputs: Mapping[str, Any]) -> list[str]:
    """The names of those `inputs` that are not what the data in `folder` was made from."""
    before: dict[str, Any] = read_json(folder / DATA_FILE)["inputs"]
    now: dict[str, Any] = json.loads(json.dumps(inputs))  # as it comes back from a file: lists for tuples
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


@dataclass
class ShardWriter:
    """Collects the documents of one split and writes a shard whenever enough tokens have come together."""

    folder: Path
    split: Split
    vocab_size: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    total: dict[str, int] = field(default_factory=lambda: asdict(SplitStatistics()))
    digest: "hashlib.blake2b" = field(default_factory=hashlib.blake2b)
    _tokens: list[np.ndarray] = field(default_factory=list)
    _loss: list[np.ndarray] = field(default_factory=list)
    _rows: list[int] = field(default_factory=list)

    def add(self, ids: np.ndarray, characters: int, size: int) -> None:
        """Add a document: its ids with begin and end token; characters and bytes of its text."""
        self._tokens.append(ids.astype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32))
        more = {"documents": 1, "characters": characters, "bytes": size, "tokens": len(ids)}
        self.total |= {name: self.total[name] + value for name, value in more.items()}

    def add_loss(self, mask: np.ndarray) -> None:
        """For conversations: which tokens of the document just added are trained on."""
        self._loss.append(mask)
        self.total["loss_tokens"] += int(mask.sum())

    def begin_row(self) -> None:
        """For conversations: the next document is the first of a row."""
        self._rows.append(len(self._tokens))
        self.total["rows"] += 1

    def write_if_large(self) -> None:
        """Call where a shard may end: after a document of text, or after a row."""
        if self.total["tokens"] - sum(shard["tokens"] for shard in self.shards) >= SHARD_TOKENS:
            self._write()

    def close(self) -> SplitStatistics:
        """Write what is left."""
        if self._tokens:
            self._write()
        return SplitStatistics(**self.total)

    def _write(self) -> None:
        name = f"{self.split}-{len(self.shards):05d}"
        lengths = [len(ids) for ids in self._tokens]
        arrays = {
            "tokens": np.concatenate(self._tokens),
            "documents": np.cumsum([0, *lengths[:-1]], dtype=np.int64),
        }
        if self._rows:
            arrays |= {"loss": np.concatenate(self._loss), "rows": np.array(self._rows, dtype=np.int64)}
        for kind, array in arrays.items():
            np.save(self.folder / f"{name}.{kind}.npy", array)
            self.digest.update(array.tobytes())
        counts = {"tokens": sum(lengths), "documents": len(lengths), "rows": len(self._rows)}
        self.shards.append({"name": name, **counts})
        self._tokens, self._loss, self._rows = [], [], []


class Shard:
    """The memory-mapped arrays of one shard, checked when it is opened.

    Raises:
        InputError: a file is missing, damaged, or not as long as `data.json` says.
    """

    def __init__(self, prepared: Prepared, entry: Mapping[str, Any]) -> None:
        def opened(kind: str, length: int) -> np.ndarray:
            return _open(prepared.folder / f"{entry['name']}.{kind}.npy", length)

        nothing = np.empty(0, dtype=np.int64)
        conversations = prepared.kind == CONVERSATIONS
        self.tokens = opened("tokens", entry["tokens"])
        self.documents = opened("documents", entry["documents"])
        self.loss = opened("loss", entry["tokens"]) if conversations else nothing
        self.rows = opened("rows", entry["rows"]) if conversations else nothing


def _open(file: Path, length: int) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{file} is missing; prepare the data again") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} is damaged ({error}); prepare the data again") from None
    if array.shape != (length,):
        raise InputError(f"{file} is not the file that {DATA_FILE} describes; prepare the data again")
    return array
