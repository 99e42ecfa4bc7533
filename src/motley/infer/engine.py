"""Decoding with the latent cache: a batch of prompts (`generate`), or one prompt token by token (`stream`).

    _prefill   prompts, padded on the right ──▶ cache filled, 512 columns a call ──▶ final hidden state of last tokens
    _decode    ┌▶ head ──▶ sampler ──▶ one token a row ──▶ rows that are complete leave the batch ──▶ layers ─┐
               └──────────────────────────────────────────────────────────────────────────────────────────────┘

The head computes logits only where a token is drawn. The host waits for the device twice a token, however many layers
the model has: whether the logits are finite, and which token was drawn.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.infer.sampler import Sampler, SamplingParams
from motley.model import Transformer
from motley.model.cache import Cache
from motley.progress import Progress

PREFILL_AT_ONCE = 512  # tokens of each prompt computed in one call; bounds the memory of long prompts


@dataclass(frozen=True)
class Completion:
    """A generated answer: `ids` without the end token; "stop" if the model ended it, "length" if it was cut."""

    ids: list[int]
    finish_reason: Literal["stop", "length"]


class Drawn(NamedTuple):
    """One token: of which prompt of the batch, and whether nothing follows it."""

    row: int
    token: int
    last: bool


class Engine:
    """Generates with one model; not thread-safe: one call at a time.

    Args:
        model: in eval mode.
        tokenizer: its vocabulary, for the end token.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context_length = model.config.max_position_embeddings

    def check(self, prompt: Sequence[int]) -> None:
        """Raises InputError for a prompt that is empty, too long, or not of this vocabulary."""
        if not prompt:
            raise InputError("the prompt is empty")
        if len(prompt) >= self.context_length:
            raise InputError(f"the prompt has {len(prompt)} tokens; this model reads at most {self.context_length - 1}")
        if min(prompt) < 0 or max(prompt) >= self.model.config.vocab_size:
            raise InputError(f"the prompt holds a token id outside the vocabulary of {self.model.config.vocab_size}")

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        batch_rows: int = 256,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Complete all prompts, `batch_rows` at a time; results have the order of the prompts.

        `progress` advances by one for each completion. params.stop is not applied here: it is about text.
        """
        for prompt in prompts:
            self.check(prompt)
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        results = {index: Completion([], "length") for index in range(len(prompts))}
        sampler = Sampler(params)
        for start in range(0, len(by_length), batch_rows):
            indices = by_length[start : start + batch_rows]
            for step in self._decode([prompts[index] for index in indices], sampler):
                for row, token, last in step:
                    index = indices[row]
                    if token == self.tokenizer.eos_id:
                        results[index] = Completion(results[index].ids, "stop")
                    else:
                        results[index].ids.append(token)
                    if last and progress:
                        progress.advance(1)
        return [results[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def stream(
        self, prompt: Sequence[int], params: SamplingParams, cancelled: threading.Event | None = None
    ) -> Iterator[int]:
        """Yield the answer's tokens one by one; the end token is the last, if the model produces it.

        Stops within one token after `cancelled` is set, at params.max_tokens, or at the end of the context.
        """
        self.check(prompt)
        for ((_, token, _),) in self._decode([prompt], Sampler(params), cancelled):
            yield token
            if cancelled is not None and cancelled.is_set():
                return

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampler: Sampler, cancelled: threading.Event | None = None
    ) -> Iterator[list[Drawn]]:
        """One batch: at each step, what was drawn in the rows that are not complete."""
        model, lengths = self.model, [len(prompt) for prompt in prompts]
        room = [min(sampler.params.max_tokens, self.context_length - length) for length in lengths]
        cache = model.new_cache(len(prompts), max(map(sum, zip(lengths, room, strict=True))))
        final_hidden = self._prefill(prompts, cache, cancelled)
        if final_hidden is None:
            return
        rows = list(range(len(prompts)))  # the prompt of each row of the cache
        for step in count(1):
            tokens = sampler.draw(model.lm_head(final_hidden))
            drawn = [
                Drawn(row, token, token == self.tokenizer.eos_id or step == room[row])
                for row, token in zip(rows, tokens.tolist(), strict=True)
            ]
            yield drawn
            staying = [place for place, one in enumerate(drawn) if not one.last]
            if not staying:
                return
            if len(staying) < len(rows):
                kept = torch.tensor(staying, device=model.device)
                cache.select(kept)
                tokens, rows = tokens[kept], [rows[place] for place in staying]
            final_hidden = model.final_hidden(tokens[:, None], cache=cache)[:, 0]

    def _prefill(
        self, prompts: Sequence[Sequence[int]], cache: Cache, cancelled: threading.Event | None
    ) -> Tensor | None:
        """Fill the cache; [prompts, hidden] of the last token of each prompt. None: cancelled in between."""
        device, lengths = self.model.device, [len(prompt) for prompt in prompts]
        ids = torch.full((len(prompts), max(lengths)), self.tokenizer.pad_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        last: list[Tensor] = [ids.new_empty(0)] * len(prompts)
        for start in range(0, max(lengths), PREFILL_AT_ONCE):
            if start and cancelled is not None and cancelled.is_set():
                return None
            chunk = ids[:, start : start + PREFILL_AT_ONCE].to(device)
            real = [min(max(0, length - start), chunk.shape[1]) for length in lengths]
            counts = None if min(real) == chunk.shape[1] else torch.tensor(real, device=device)
            hidden = self.model.final_hidden(chunk, cache=cache, counts=counts)
            for row, length in enumerate(lengths):
                if start < length <= start + chunk.shape[1]:
                    last[row] = hidden[row, length - start - 1].clone()  # a view would keep the whole chunk
        return torch.stack(last)
