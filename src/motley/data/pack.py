"""Turn documents or conversations into a folder of token shards (`motley.data.shards` describes its files).

    documents ─► duplicates dropped ─► train / valid ─► token ids ─► shards
    conversations ─► token ids ─► duplicates dropped ─► train / valid ─► rows of whole conversations ─► shards

Everything streams: in memory are one document, one batch of text and one shard, and a hash per document.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from motley.data.conversation import ConversationEncoder, Message
from motley.data.corpus import standard_library_documents, standard_library_files
from motley.data.shards import CONVERSATIONS, DATA_FILE, SPLITS, TEXT, Prepared, ShardWriter, Split, find
from motley.data.sources import DEFAULT_MAX_DOCUMENT_BYTES, Document, fingerprint_files, iter_documents
from motley.data.tokenizer import Tokenizer, train_tokenizer
from motley.errors import InputError
from motley.files import whole_folder
from motley.progress import Progress, note

__all__ = ["DATA_FILE", "DataConfig", "Prepared", "fill_rows", "pack_conversations", "prepare"]

SAMPLE_CHARACTERS = 8_000_000  # text the tokenizer is trained on,
SAMPLE_READ_CHARACTERS = 512_000_000  # drawn from so much text at the beginning of the sources,
SAMPLE_SLICE_CHARACTERS = 1 << 16  # in pieces of this size
ENCODE_SLICE_CHARACTERS = 1 << 18  # one piece of work for the tokenizer
ENCODE_BATCH_CHARACTERS = 1 << 21  # pieces encoded at once on all cores; bounds memory
VALID_SHARE = 0.02
ROW_BUFFER = 4096  # conversations among which rows are filled

Writers: TypeAlias = dict[Split, ShardWriter]


@dataclass(frozen=True)
class DataConfig:
    """Sources of text, and how to tokenize and split them."""

    data: tuple[str, ...] = ()
    """Files and folders (txt, md, py, jsonl, parquet, each plain, .gz or .zst), or hf:NAME[:CONFIG] for a
    dataset of the Hugging Face hub. Empty: the Python standard library of this machine."""
    tokenizer: Path | None = None
    """A tokenizer.json, or its folder, to use instead of training one: any published DeepSeek tokenizer."""
    vocab_size: int = 4096
    """Tokens of the tokenizer that is trained."""
    valid_share: float = VALID_SHARE
    """Share of the documents kept for validation, chosen by their hash; at least one, or the end of one."""
    seed: int = 0
    """Selects the documents that are kept for validation."""
    max_bytes: int | None = None
    """Stop after this many bytes of text."""
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    """A larger document is an error, so that no input can exhaust the memory."""


# ---------------------------------------------------------------------------------------------- text


def prepare(config: DataConfig, out: Path) -> Prepared:
    """Make the data folder `out` from the sources in `config`, unless it exists and was made from the same ones.

    Reads the sources twice where a tokenizer is trained: once for the sample, once to encode.

    Raises:
        InputError: bad input, naming file and line; too little text; `out` was made from other inputs, or is
            a folder of something else; the disk is full.
    """
    _check(config)
    inputs = inputs_of(config)
    if (finished := find(out, inputs)) is not None:
        return finished
    with whole_folder(out) as folder:
        total_bytes = None
        if config.tokenizer is not None:
            tokenizer = Tokenizer.load(config.tokenizer)
        else:
            sample, total_bytes = _sample(config)
            note(f"learning a vocabulary of {config.vocab_size:,} tokens from {sum(map(len, sample)):,} characters")
            tokenizer = train_tokenizer(sample, config.vocab_size)
        distinct = _Distinct(config)
        writers: Writers = {split: ShardWriter(folder, split, tokenizer.vocab_size) for split in SPLITS}
        with Progress("packing", total=total_bytes, unit="bytes") as bar:
            documents = split_documents(distinct, config.valid_share)
            for split, characters, size, ids in _encoded(tokenizer, documents):
                writers[split].add(ids, characters, size)
                writers[split].write_if_large()
                bar.advance(size, tokens=f"{sum(writer.total['tokens'] for writer in writers.values()):,}")
        divided = sum(writer.total["documents"] for writer in writers.values()) - distinct.kept
        _finish(folder, TEXT, tokenizer, writers, inputs, distinct.duplicates, distinct.empty, divided=divided)
    return Prepared.load(out)


def _check(config: DataConfig) -> None:
    if not 0 < config.valid_share <= 0.5:
        raise InputError(f"valid_share is {config.valid_share}; it must be above 0 and at most 0.5")
    for name in ("max_bytes", "max_document_bytes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")


def inputs_of(config: DataConfig) -> dict[str, Any]:
    """The inputs that the folder is made from, as JSON values; equal inputs give the same folder."""
    values = asdict(config)
    if config.tokenizer is not None:
        values["tokenizer"] = _hash_of(Tokenizer.load(config.tokenizer))
        values["vocab_size"] = None  # without effect
    values["data"] = list(config.data)
    values["files"] = fingerprint_files(config.data or standard_library_files())
    return values


def _hash_of(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.definition.encode()).hexdigest()


def _documents(config: DataConfig) -> Iterator[Document]:
    """All documents of the config's sources, up to `max_bytes`."""
    left = config.max_bytes
    source = iter_documents(config.data, config.max_document_bytes) if config.data else standard_library_documents()
    for document in source:
        if left is not None:
            encoded = document.text.encode()
            if len(encoded) >= left:
                yield Document(encoded[:left].decode(errors="ignore"), document.origin)
                return
            left -= len(encoded)
        yield document


class _Distinct:
    """The distinct non-empty documents of a config as (text, hash); counts them and those it leaves out.

    Equal means equal text, apart from white space at both ends and the kind of line ends. Only hashes are
    kept.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config, self.kept, self.duplicates, self.empty = config, 0, 0, 0

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        seen: set[bytes] = set()
        for document in _documents(self.config):
            normal = document.text.replace("\r\n", "\n").strip()
            digest = _digest(normal.encode(), self.config.seed)
            if not normal:
                self.empty += 1
            elif digest in seen:
                self.duplicates += 1
            else:
                seen.add(digest)
                self.kept += 1
                yield document.text, digest


def _digest(content: bytes, seed: int) -> bytes:
    return hashlib.blake2b(content, digest_size=16, salt=(seed % 2**64).to_bytes(8, "big")).digest()


def _is_valid(digest: bytes, valid_share: float) -> bool:
    return int.from_bytes(digest[:8], "big") < valid_share * 2**64


def split_documents(documents: Iterable[tuple[str, bytes]], valid_share: float) -> Iterator[tuple[Split, str]]:
    """Decide by its hash for each (text, hash) whether it is for training or for validation.

    The decision is the document's own, whatever else is there, except where none falls to validation (a few
    documents, or one book): then the document with the smallest hash gives its end, `valid_share` of all
    characters, or the whole of itself if it is not longer than that.

    Raises:
        InputError: there is too little text to divide.
    """
    held: tuple[bytes, str] | None = None  # smallest hash so far, as long as none fell to validation
    any_valid, train_characters = False, 0
    for text, digest in documents:
        if _is_valid(digest, valid_share):
            any_valid = True
            yield "valid", text
            continue
        train_characters += len(text)
        if any_valid:
            yield "train", text
        elif held is None:
            held = digest, text
        else:
            held, larger = sorted([held, (digest, text)])
            yield "train", larger[1]
    if held is None:
        if train_characters == 0:
            raise InputError("there is too little text to train on and to validate with; give more documents")
    elif any_valid:
        yield "train", held[1]
    else:
        yield from _end_for_validation(held[1], max(1, round(valid_share * train_characters)), train_characters)


def _end_for_validation(text: str, wanted: int, all_characters: int) -> Iterator[tuple[Split, str]]:
    if len(text) <= wanted and len(text) < all_characters:
        yield "valid", text
        return
    end = max(len(text) - wanted, 0)
    cut = text.rfind("\n", max(end - wanted, 0), end) + 1 or end  # at a line, if one is near
    if not text[:cut].strip() or not text[cut:].strip():
        raise InputError("there is too little text to train on and to validate with; give more documents")
    yield "train", text[:cut]
    yield "valid", text[cut:]


def _sample(config: DataConfig) -> tuple[list[str], int | None]:
    """Text to train the tokenizer on, drawn evenly from the training documents; and the bytes of all text.

    Every piece has a random but fixed priority, its hash, and the pieces with the lowest are kept. The bytes
    are None where not all of a very large source was read.
    """
    sample: list[tuple[bytes, str]] = []
    kept = read = total_bytes = 0
    with Progress("reading", total=None, unit="bytes") as bar:
        for text, digest in _Distinct(config):
            read += len(text)
            total_bytes += (size := len(text.encode()))
            bar.advance(size)
            if not _is_valid(digest, config.valid_share):
                for piece in slices(text, SAMPLE_SLICE_CHARACTERS):
                    sample.append((_digest(piece.encode(), config.seed), piece))
                    kept += len(piece)
            if kept > 2 * SAMPLE_CHARACTERS:
                kept = _keep_lowest(sample)
            if read > SAMPLE_READ_CHARACTERS:
                break
    _keep_lowest(sample)
    return [piece for _, piece in sample], total_bytes if read <= SAMPLE_READ_CHARACTERS else None


def _keep_lowest(sample: list[tuple[bytes, str]]) -> int:
    """Cut the sample to about `SAMPLE_CHARACTERS` in place; returns its characters."""
    sample.sort()
    kept = 0
    for number, (_, piece) in enumerate(sample):
        if kept >= SAMPLE_CHARACTERS:
            del sample[number:]
            break
        kept += len(piece)
    return kept


def slices(text: str, size: int) -> Iterator[str]:
    """Cut `text` into pieces of at most `size` characters; if possible before a line without indentation.

    No token of our tokenizers (nor of DeepSeek's) reaches across such a place, so that the pieces have the
    tokens of the whole. A cut elsewhere, in a line longer than `size`, may divide a token; the text stays the
    same.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        cut = text.rfind("\n", start, end)
        while cut > start and text[cut + 1].isspace():
            cut = text.rfind("\n", start, cut)
        end = cut + 1 if cut > start else end
        yield text[start:end]
        start = end
    yield text[start:]


def _encoded(
    tokenizer: Tokenizer, documents: Iterable[tuple[Split, str]]
) -> Iterator[tuple[Split, int, int, np.ndarray]]:
    """(split, characters, bytes, ids with begin and end token) of each document, in order."""
    begin, end = ([np.array([token], dtype=np.uint32)] for token in (tokenizer.bos_id, tokenizer.eos_id))
    parts: list[np.ndarray] = []
    for batch in _batches(documents):
        encoded = tokenizer.encode_batch([piece for piece, _ in batch])
        for (_, whole), ids in zip(batch, encoded, strict=True):
            parts.append(np.array(ids, dtype=np.uint32))
            if whole is not None:
                split, text = whole
                yield split, len(text), len(text.encode()), np.concatenate(begin + parts + end)
                parts = []


def _batches(documents: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[str, tuple[Split, str] | None]]]:
    """Pieces of documents, enough to encode at once; the last piece of each comes with the document."""
    batch: list[tuple[str, tuple[Split, str] | None]] = []
    characters = 0
    for split, text in documents:
        pieces = list(slices(text, ENCODE_SLICE_CHARACTERS))
        for number, piece in enumerate(pieces, start=1):
            batch.append((piece, (split, text) if number == len(pieces) else None))
            characters += len(piece)
            if characters >= ENCODE_BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------- conversations


def pack_conversations(
    conversations: Iterable[Sequence[Message]],
    tokenizer: Tokenizer,
    out: Path,
    seq_len: int,
    valid_share: float = VALID_SHARE,
    seed: int = 0,
    inputs: Mapping[str, Any] | None = None,
) -> Prepared:
    """Make the data folder `out`: rows of at most `seq_len` tokens, each filled with whole conversations.

    A conversation of n tokens takes n - 1 places, since its last token is only predicted. Those that do not
    fit a row are left out and counted as dropped, exact repetitions as duplicates.

    Args:
        conversations: read once, in order, and not held in memory.
        tokenizer: turns the conversations into tokens.
        out: the folder.
        seq_len: places per row.
        valid_share: share of the conversations for validation, chosen by hash; at least one.
        seed: which conversations those are.
        inputs: what the conversations are made from (JSON values). A folder made from equal inputs is kept as
            it is and `conversations` is not read; without inputs the folder is always made anew.

    Raises:
        InputError: fewer than two conversations fit; a conversation is malformed; `out` was made from other
            inputs; the disk is full.
    """
    encoder = ConversationEncoder(tokenizer)
    if seq_len < 2 or not 0 < valid_share <= 0.5:
        raise InputError(f"seq_len {seq_len}, valid_share {valid_share}: at least 2, and above 0 up to 0.5, are needed")
    made_from = inputs_of_conversations(inputs, tokenizer, seq_len, valid_share, seed)
    if (finished := find(out, made_from if inputs is not None else None)) is not None:
        return finished
    with whole_folder(out) as folder:
        writers: Writers = {split: ShardWriter(folder, split, tokenizer.vocab_size) for split in SPLITS}
        rows = {split: _RowFiller(writers[split], seq_len) for split in SPLITS}
        seen: set[bytes] = set()
        duplicates = dropped = 0
        held: tuple[bytes, _Conversation] | None = None  # goes to validation if no other does
        with Progress("packing", total=None, unit="conversations") as bar:
            for messages in conversations:
                bar.advance(1)
                one = _Conversation.of(encoder, messages)
                digest = _digest(one.ids.tobytes(), seed)
                if digest in seen:
                    duplicates += 1
                elif len(one.ids) > seq_len + 1:
                    dropped += 1
                elif _is_valid(digest, valid_share):
                    rows["valid"].add(one)
                elif held is None:
                    held = digest, one
                else:
                    held, (_, larger) = sorted([held, (digest, one)], key=lambda pair: pair[0])
                    rows["train"].add(larger)
                seen.add(digest)
        if held is not None:
            rows["train" if rows["valid"].count else "valid"].add(held[1])
        if not all(filler.count for filler in rows.values()):
            raise InputError(
                f"too few conversations: {len(seen)} different ones, {dropped} of them longer than {seq_len} "
                "tokens; at least two that fit are needed, one of them for validation"
            )
        for filler in rows.values():
            filler.flush()
        _finish(folder, CONVERSATIONS, tokenizer, writers, made_from, duplicates, dropped, seq_len)
    return Prepared.load(out)


def inputs_of_conversations(
    inputs: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    seq_len: int,
    valid_share: float = VALID_SHARE,
    seed: int = 0,
) -> dict[str, Any]:
    """The inputs of `pack_conversations` with the same arguments, as JSON values."""
    settings = {"tokenizer": _hash_of(tokenizer), "seq_len": seq_len, "valid_share": valid_share, "seed": seed}
    return {"conversations": inputs, **settings}


@dataclass(frozen=True)
class _Conversation:
    ids: np.ndarray
    loss_mask: np.ndarray
    characters: int
    size: int  # bytes

    @classmethod
    def of(cls, encoder: ConversationEncoder, messages: Sequence[Message]) -> "_Conversation":
        encoded = encoder.encode(messages)
        texts = [text for message in messages for text in (message.content, message.reasoning_content or "")]
        ids, loss_mask = np.array(encoded.ids, dtype=np.int64), np.array(encoded.loss_mask, dtype=bool)
        return cls(ids, loss_mask, sum(map(len, texts)), sum(len(text.encode()) for text in texts))


class _RowFiller:
    """Collects conversations and hands them, row by row, to a shard writer."""

    def __init__(self, writer: ShardWriter, seq_len: int) -> None:
        self.writer, self.seq_len, self.count = writer, seq_len, 0
        self._waiting: list[_Conversation] = []

    def add(self, conversation: _Conversation) -> None:
        self.count += 1
        self._waiting.append(conversation)
        if len(self._waiting) >= ROW_BUFFER:
            self.flush()

    def flush(self) -> None:
        for row in fill_rows([len(one.ids) - 1 for one in self._waiting], self.seq_len):
            self.writer.begin_row()
            for one in (self._waiting[index] for index in row):
                self.writer.add(one.ids, one.characters, one.size)
                self.writer.add_loss(one.loss_mask)
            self.writer.write_if_large()
        self._waiting = []


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items of these lengths into rows: longest first, each into the fullest row with room (best fit).

    Returns:
        The indices in each row; rows in the order in which they were begun.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (places left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(room, (lengths[index], -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


def _finish(
    folder: Path,
    kind: str,
    tokenizer: Tokenizer,
    writers: Writers,
    inputs: Mapping[str, Any],
    duplicates: int,
    dropped: int,
    seq_len: int | None = None,
    divided: int = 0,
) -> None:
    """Write the last shards, the tokenizer and the description."""
    tokenizer.save(folder)
    train, valid = writers["train"].close(), writers["valid"].close()
    parts = [_hash_of(tokenizer), *(writer.digest.hexdigest() for writer in writers.values())]
    Prepared(
        folder=folder,
        kind=kind,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        duplicates=duplicates,
        dropped=dropped,
        train=train,
        valid=valid,
        shards={split: writer.shards for split, writer in writers.items()},
        fingerprint=hashlib.sha256("".join(parts).encode()).hexdigest(),
        divided=divided,
    ).write(inputs)
