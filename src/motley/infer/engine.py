"""Generation with the latent cache: many prompts at once, or one conversation token by token.

prompts, padded on the right ──▶ one call fills the cache ──▶ one token a row and call ──▶ rows that end leave

A token waits for the device twice, however many layers the model has: whether its logits are finite, and which it is.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.infer.sampler import Sampler, SamplingParams
from motley.model import Transformer
from motley.progress import Progress

PREFILL_AT_ONCE = 512  # tokens of one prompt computed in one call; bounds the memory of long prompts


@dataclass(frozen=True)
class Completion:
    """What followed a prompt: `ids` without the end token, and whether it ended by itself ("stop") or was cut."""

    ids: list[int]
    finish_reason: Literal["stop", "length"]


class Engine:
    """Runs one model; not thread-safe: one call at a time.

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
        """Complete all prompts, `batch_rows` at a time; results stand in the order of the prompts.

        `progress` advances by one for each finished row. params.stop is not applied here: it is about text.
        """
        for prompt in prompts:
            self.check(prompt)
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        results: dict[int, Completion] = {}
        sampler = Sampler(params)
        for start in range(0, len(by_length), batch_rows):
            indices = by_length[start : start + batch_rows]
            completions = self._batch([prompts[index] for index in indices], params.max_tokens, sampler, progress)
            results |= dict(zip(indices, completions, strict=True))
        return [results[index] for index in range(len(prompts))]

    def _batch(
        self, prompts: list[Sequence[int]], max_tokens: int, sampler: Sampler, progress: Progress | None
    ) -> list[Completion]:
        model, end, device = self.model, self.tokenizer.eos_id, self.model.device
        counts = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest = int(counts.max())
        ids = torch.full((len(prompts), longest), self.tokenizer.pad_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        cache = model.new_cache(len(prompts), min(longest + max_tokens, self.context_length))
        logits = model(ids.to(device), cache=cache, counts=counts)[
            torch.arange(len(prompts), device=device), counts - 1
        ]
        said: list[list[int]] = [[] for _ in prompts]
        reasons: list[Literal["stop", "length"]] = ["length"] * len(prompts)
        rows = list(range(len(prompts)))  # which prompt each row of the cache belongs to
        while True:
            tokens = sampler.draw(logits)
            staying: list[int] = []
            for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
                if token == end:
                    reasons[row] = "stop"
                    continue
                said[row].append(token)
                if len(said[row]) < max_tokens and len(prompts[row]) + len(said[row]) < self.context_length:
                    staying.append(place)
            if progress and len(staying) < len(rows):
                progress.advance(len(rows) - len(staying))
            if not staying:
                return [Completion(ids, reason) for ids, reason in zip(said, reasons, strict=True)]
            if len(staying) < len(rows):
                kept = torch.tensor(staying, device=device)
                cache.select(kept)
                tokens, rows = tokens[kept], [rows[place] for place in staying]
            logits = model(tokens[:, None], cache=cache)[:, 0]

    @torch.inference_mode()
    def stream(
        self, prompt: Sequence[int], params: SamplingParams, cancelled: threading.Event | None = None
    ) -> Iterator[int]:
        """Yield the answer's tokens one by one, the end token last if the model ends by itself.

        Stops within one token of `cancelled` being set, at params.max_tokens, or at the end of the context.
        """
        self.check(prompt)
        room = min(params.max_tokens, self.context_length - len(prompt))
        cache = self.model.new_cache(1, len(prompt) + room)
        sampler = Sampler(params)
        ids = torch.tensor([list(prompt)], device=self.model.device)
        *chunks, last = ids.split(PREFILL_AT_ONCE, dim=1)
        for chunk in chunks:
            self.model(chunk, cache=cache)
            if cancelled is not None and cancelled.is_set():
                return
        for _ in range(room):
            token = sampler.draw(self.model(last, cache=cache)[:, -1])
            said = int(token)  # waits for the device
            yield said
            if said == self.tokenizer.eos_id or (cancelled is not None and cancelled.is_set()):
                return
            last = token[:, None]
