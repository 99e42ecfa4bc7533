"""Targets from counts: how the text usually goes on, learned by counting all of it once, in seconds.

    text ─▶ every three neighbours, sorted ─▶ Ngrams: for one and for two tokens before, what follows how often
                                                 │
    input_ids ───────────────────────────────────┴─▶ Expected: a distribution for each position, still as pointers:

        expected(c) = floor p(c)  +  factor row(b)[c]  +  factor row(a, b)[c]      a, b: the last two tokens
                      whole vocabulary     sparse rows, where they lie in the table

A token of text says that one thing followed, this once. A distribution says all that follows there, so its gradient
has far less noise, and it has seen text that the run will never reach. Interpolated Kneser-Ney (Kneser and Ney 1995;
Chen and Goodman 1999): DISCOUNT is taken from every count and given to the shorter context; shorter ones count in how
many different contexts something was seen, not how often. A network of any kind can be taught so, and its format stays.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from motley.data.stream import TokenStream
from motley.errors import InputError

COUNTED_TOKENS = 1 << 25  # of a longer text: about 5 seconds, and 0.5 to 1.2 gigabytes while counting
DISCOUNT = 0.75
ORDERS = 2  # sparse rows that a position has: after one token and after two


@dataclass(frozen=True)
class Rows:
    """Sparse distributions after contexts of one length.

    Attributes:
        contexts: int64 [contexts], ascending.
        begins: int64 [contexts + 1], where in the table each one's row begins; the next one's begin is its end.
        left: fp32 [contexts], the share that its row leaves to a shorter context.
    """

    contexts: Tensor
    begins: Tensor
    left: Tensor

    def find(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(begin, end, share left) of the row of each of `wanted`; those never seen have an empty one and leave all."""
        place = torch.searchsorted(self.contexts, wanted).clamp(max=len(self.contexts) - 1)
        known = self.contexts[place] == wanted
        begins, ends = self.begins[place], self.begins[place + 1]
        return begins, torch.where(known, ends, begins), torch.where(known, self.left[place], 1.0)


@dataclass(frozen=True)
class NgramCounts:
    """Counts of a text.

    Attributes:
        vocabulary: fp32 [vocab], how often each token comes whatever was before.
        after: rows after one token and after two.
        tokens: int32, of all rows one behind the other.
        shares: fp32, of each of `tokens`.
    """

    vocabulary: Tensor
    after: tuple[Rows, Rows]
    tokens: Tensor
    shares: Tensor

    @classmethod
    def of(cls, text: np.ndarray, vocab_size: int, device: torch.device | None = None) -> "NgramCounts":
        """Count a text.

        Args:
            text: token ids [tokens], at least three.
            vocab_size: below 2²¹, so that three tokens fit into 63 bits.
            device: where the table is kept.
        """
        assert vocab_size**3 < 1 << 63, "three tokens must fit into 63 bits"
        assert int(text.max()) < vocab_size, "tokens of another vocabulary"
        neighbours = text[:-2].astype(np.int64)
        for following in (text[1:-1], text[2:]):
            neighbours *= vocab_size
            neighbours += following
        neighbours.sort()
        triples, counts = _counted(neighbours)
        del neighbours
        ends = triples % vocab_size**2  # each as often as it has different tokens before it
        ends.sort()
        pairs, contexts_of_pairs = _counted(ends)
        del ends
        contexts_of_tokens = np.bincount(pairs % vocab_size, minlength=vocab_size)
        vocabulary = contexts_of_tokens / len(pairs)
        after_one, tokens_one, shares_one = _rows(pairs, contexts_of_pairs, vocab_size, 0)
        after_two, tokens_two, shares_two = _rows(triples, counts, vocab_size, len(tokens_one))

        def there(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(array).to(device or torch.device("cpu"), dtype)

        def rows(parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Rows:
            contexts, begins, left = parts
            return Rows(there(contexts, torch.int64), there(begins, torch.int64), there(left, torch.float32))

        return cls(
            there(vocabulary, torch.float32),
            (rows(after_one), rows(after_two)),
            there(np.concatenate([tokens_one, tokens_two]), torch.int32),
            there(np.concatenate([shares_one, shares_two]), torch.float32),
        )

    def expected(self, input_ids: Tensor) -> "Expected":
        """How each position of input_ids [rows, seq] should go on, by the tokens of its row up to it."""
        last = input_ids
        before = torch.full_like(last, -1)
        before[:, 1:] = last[:, :-1]
        context = torch.where(before < 0, -1, before * len(self.vocabulary) + last)
        begins_one, ends_one, left_one = self.after[0].find(last.flatten())
        begins_two, ends_two, left_two = self.after[1].find(context.flatten())
        return Expected(
            self,
            floor=left_one * left_two,
            begins=torch.stack([begins_one, begins_two], dim=1),
            ends=torch.stack([ends_one, ends_two], dim=1),
            factors=torch.stack([left_two, torch.ones_like(left_two)], dim=1),
        )


@dataclass(frozen=True)
class Expected:
    """A distribution over the vocabulary for each of some positions.

    Attributes:
        ngrams: the table.
        floor: fp32 [positions], the share of `ngrams.vocabulary`.
        begins, ends: int64 [positions, ORDERS], rows of the table.
        factors: fp32 [positions, ORDERS], by which their shares are multiplied.
    """

    ngrams: NgramCounts
    floor: Tensor
    begins: Tensor
    ends: Tensor
    factors: Tensor

    def __getitem__(self, positions: Tensor | slice) -> "Expected":
        """That of some of the positions."""
        parts = (self.floor, self.begins, self.ends, self.factors)
        return Expected(self.ngrams, *(part[positions] for part in parts))

    def dense(self) -> Tensor:
        """All of it, fp32 [positions, vocab]."""
        table = self.ngrams
        whole = self.floor[:, None] * table.vocabulary
        lengths = (self.ends - self.begins).flatten()
        row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        first = (lengths.cumsum(0) - lengths)[row]
        entry = self.begins.flatten()[row] + torch.arange(len(row), device=row.device) - first
        place = row // ORDERS * len(table.vocabulary) + table.tokens[entry]
        whole.view(-1).index_add_(0, place, table.shares[entry] * self.factors.flatten()[row])
        return whole


@dataclass(frozen=True)
class NgramTargets:
    """What a step learns besides what came next.

    Attributes:
        counts: of the training text.
        share: of what they expect; 1 - share is left to the token that came.
    """

    counts: NgramCounts
    share: float


def counts_of(rows: TokenStream, vocab_size: int, device: torch.device) -> NgramCounts:
    """Counts of the text that a stream reads: of all of it, or of equal parts of its shards up to COUNTED_TOKENS.

    vocab_size: of the model, which may have room for more tokens than the text's tokenizer knows.

    Raises InputError where there is nothing to count.
    """
    text = rows.text(COUNTED_TOKENS)
    if len(text) < 3:
        raise InputError(f"{rows.folder} holds {len(text)} tokens, too few to count; leave --ngram-weight out")
    return NgramCounts.of(text, vocab_size, device)


def _counted(ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(different values, how often each comes)."""
    firsts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    return ascending[firsts], np.diff(firsts, append=len(ascending))


def _rows(
    sequences: np.ndarray, counts: np.ndarray, vocab_size: int, begin: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
    """((contexts, begins from `begin` on, shares left), tokens, shares) of sequences that end in those tokens."""
    contexts, kinds = _counted(sequences // vocab_size)
    begins = np.concatenate([[0], np.cumsum(kinds)])
    totals = np.add.reduceat(counts, begins[:-1])
    shares = (counts - DISCOUNT) / np.repeat(totals, kinds)
    return (contexts, begin + begins, DISCOUNT * kinds / totals), sequences % vocab_size, shares
