"""The endless stream of training rows, as a function of a position.

    position ─► epoch, index in the epoch ─► permutation keyed by (seed, epoch) ─► row ─► tokens

There is no state between calls: row number `position` depends on the seed and on `position` alone. So a checkpoint
holds one integer of a stream, and ranks share the work by reading different positions, also after a restart with
another number of ranks.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import cast

import numpy as np
import torch

from motley.data.shards import CONVERSATIONS, SPLITS, Prepared, Shard, Split
from motley.errors import InputError

NO_LOSS = -100  # target where nothing is to be predicted (torch's `ignore_index`)
PADDING = -1  # document id where there is no token
FEISTEL_ROUNDS = 8


@dataclass(frozen=True)
class Batch:
    """Rows for one step; all int64 [rows, seq_len].

    Attributes:
        input_ids: tokens; `pad_id` where the row is padded.
        targets: the token that follows each input, or `NO_LOSS`.
        documents: which document of the row each token belongs to (0, 1, …), or `PADDING`.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor

    def cut(self, length: int) -> "Batch":
        """The same tokens in the same order as sequences of at most `length`, which divides that of longer rows."""
        if length >= self.input_ids.shape[1]:
            return self
        return Batch(*(tensor.reshape(-1, length) for tensor in (self.input_ids, self.targets, self.documents)))


class TokenStream:
    """Rows of one split of a folder written by `motley.data.pack`.

    *Text*: all documents behind each other are cut into windows of `seq_len` tokens; only the last window of
    the split is padded. Every token is a target once, except the begin token of a document, which nothing can
    predict.

    *Conversations*: each row holds the whole conversations that `pack_conversations` put together for it,
    padded; the loss is on what the assistant says.

    Args:
        folder: the prepared data.
        split: "train" or "valid".
        seq_len: tokens per row; None takes the length conversations were packed for.
        seed: which order; another seed gives another permutation in every epoch.
        shuffle: False gives rows in the order of the files (validation).

    Attributes:
        rows_per_epoch: rows in which every token comes once.

    Raises:
        InputError: the folder or one of its shards is missing or damaged, or `seq_len` does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        split: Split = "train",
        seq_len: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.folder, self.split, self.seed, self.shuffle = Path(folder), split, seed, shuffle
        if seed < 0:
            raise InputError(f"seed is {seed}; it must not be negative")
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}; there are {' and '.join(SPLITS)}")
        self.prepared = Prepared.load(self.folder)
        self.pad_id = self.prepared.pad_id
        packed_for = self.prepared.seq_len  # None for text
        if seq_len is None and packed_for is None:
            raise InputError(f"{self.folder} holds text: seq_len must say how many tokens a row has")
        self.seq_len: int = seq_len if seq_len is not None else cast(int, packed_for)
        if packed_for is not None and self.seq_len != packed_for:
            raise InputError(f"{self.folder} was packed for rows of {packed_for} tokens, not {self.seq_len}")
        if self.seq_len < 1:
            raise InputError(f"seq_len is {self.seq_len}; it must be at least 1")
        self._shards = [Shard(self.prepared, entry) for entry in self.prepared.shards[split]]
        # Where each shard begins in the split: in tokens, and in rows for conversations.
        self._first_token = np.cumsum([0, *(shard.tokens.shape[0] for shard in self._shards)])
        self._first_row = np.cumsum([0, *(shard.rows.shape[0] for shard in self._shards)])
        self._conversations = self.prepared.kind == CONVERSATIONS
        if self._conversations:
            self.rows_per_epoch = int(self._first_row[-1])
        else:  # the last token of all is only a target
            self.rows_per_epoch = -(-(int(self._first_token[-1]) - 1) // self.seq_len)
        if self.rows_per_epoch < 1:
            raise InputError(f"{self.folder} holds no rows of the split {split}")

    def rows(self, position: int, count: int) -> Batch:
        """Rows number `position` to `position + count` of the endless stream; a pure function of the
        arguments.
        """
        if position < 0 or count < 1:
            raise ValueError(f"rows(position={position}, count={count}): a position >= 0 and a count >= 1 are needed")
        read = self._conversation_row if self._conversations else self._window
        inputs = np.full((count, self.seq_len), self.pad_id, dtype=np.int64)
        targets = np.full((count, self.seq_len), NO_LOSS, dtype=np.int64)
        documents = np.full((count, self.seq_len), PADDING, dtype=np.int64)
        for place, row in enumerate(self.row_numbers(position, count)):
            read(int(row), inputs[place], targets[place], documents[place])
        return Batch(*(torch.from_numpy(array) for array in (inputs, targets, documents)))

    def text(self, limit: int) -> np.ndarray:
        """Tokens of the split in the order of its files: all of them, or the first of each shard, `limit` in all."""
        everything = int(self._first_token[-1])
        share = min(1.0, limit / max(1, everything))
        return np.concatenate([shard.tokens[: int(len(shard.tokens) * share)] for shard in self._shards])

    def row_numbers(self, position: int, count: int) -> np.ndarray:
        """Rows of the files at these positions of the stream, int64 [count]."""
        positions = np.arange(position, position + count, dtype=np.int64)
        epochs, indices = np.divmod(positions, self.rows_per_epoch)
        if self.shuffle:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                indices[chosen] = permute(indices[chosen], self.rows_per_epoch, self.seed, int(epoch))
        return indices

    def _window(self, row: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray) -> None:
        start = row * self.seq_len
        tokens, starts = self._tokens(start, start + self.seq_len + 1)
        given = tokens.shape[0] - 1
        inputs[:given] = tokens[:-1]
        # starts[i]: token i begins a document. Document 0 is the one the first token belongs to.
        targets[:given] = np.where(starts[1:], NO_LOSS, tokens[1:])
        documents[:given] = np.cumsum(starts[:-1]) - starts[0]

    def _tokens(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `start` to `stop` of the split (fewer at its end); and which of them begin a document."""
        stop = min(stop, int(self._first_token[-1]))
        tokens, begins = np.empty(stop - start, dtype=np.int64), np.zeros(stop - start, dtype=bool)
        index = int(np.searchsorted(self._first_token, start, side="right")) - 1
        while index < len(self._shards) and (first := int(self._first_token[index])) < stop:
            shard = self._shards[index]
            low, high = max(start, first), min(stop, first + shard.tokens.shape[0])
            tokens[low - start : high - start] = shard.tokens[low - first : high - first]
            from_, to = np.searchsorted(shard.documents, [low - first, high - first])
            begins[np.asarray(shard.documents[from_:to]) + first - start] = True
            index += 1
        return tokens, begins

    def _conversation_row(self, row: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray) -> None:
        index = int(np.searchsorted(self._first_row, row, side="right")) - 1
        shard, local = self._shards[index], row - int(self._first_row[index])
        last = shard.rows[local + 1] if local + 1 < shard.rows.shape[0] else shard.documents.shape[0]
        edges = [*shard.documents[shard.rows[local] : last], shard.tokens.shape[0]]
        if last < shard.documents.shape[0]:
            edges[-1] = shard.documents[last]
        place = 0
        for number, (start, stop) in enumerate(pairwise(edges)):
            given = int(stop - start) - 1  # the last token is only a target
            inputs[place : place + given] = shard.tokens[start : stop - 1]
            spoken = np.asarray(shard.loss[start + 1 : stop])
            targets[place : place + given] = np.where(spoken, shard.tokens[start + 1 : stop].astype(np.int64), NO_LOSS)
            documents[place : place + given] = number
            place += given


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Positions of `indices` after a shuffle of `size` items, without storing the permutation.

    A Feistel network permutes the pairs (left, right) of a grid just larger than `size`, each round adding to
    one half a hash of the other; what falls outside `size` is sent through again until it falls inside
    ("cycle walking"), which keeps it one-to-one.

    Args:
        indices: int64, each in [0, size).
        size: number of items.
        seed: which shuffle; with `epoch` the key of the hash.
        epoch: every epoch has a shuffle of its own.
    """
    width = isqrt(size - 1) + 1
    height = -(-size // width)
    keys = _round_keys(seed, epoch)
    result = indices.astype(np.int64)
    outside = np.arange(result.shape[0])
    while outside.size:
        left, right = np.divmod(result[outside], width)  # left < height, right < width
        for pair in range(0, FEISTEL_ROUNDS, 2):
            left = (left + _hash(right, keys[pair], height)) % height
            right = (right + _hash(left, keys[pair + 1], width)) % width
        result[outside] = left * width + right
        outside = outside[result[outside] >= size]
    return result


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    return np.random.SeedSequence([seed, epoch]).generate_state(FEISTEL_ROUNDS, np.uint64)


def _hash(values: np.ndarray, key: np.uint64, modulus: int) -> np.ndarray:
    """A well-mixed number in [0, modulus) for each value (the finaliser of splitmix64)."""
    mixed = values.astype(np.uint64) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(modulus)).astype(np.int64)
