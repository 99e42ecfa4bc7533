"""Sample the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from motley.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """Settings of sampling (defaults: DeepSeek-R1's recommendation).

    temperature: 0 takes the most probable token. top_p: sample from the smallest set of tokens with at least this
    probability. max_tokens: longest answer. seed: the same seed gives the same answer. stop: texts that end the answer.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise InputError(f"temperature is {self.temperature}; it must be from 0 to 2")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; it must be at least 1")


class BrokenLogits(RuntimeError):
    """The model's output is not finite: its weights are broken, or its number format is too narrow."""


class Sampler:
    """Samples tokens of one request with a random generator of its own, so that requests are independent."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def draw(self, logits: Tensor) -> Tensor:
        """logits [rows, vocab] → token ids [rows]. Raises BrokenLogits where they are not finite."""
        if not bool(torch.isfinite(logits).all()):
            raise BrokenLogits("the model's output is not a number; its weights are broken")
        if self.params.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = nucleus(torch.softmax(logits.float() / self.params.temperature, dim=-1), self.params.top_p)
        return torch.multinomial(probabilities.cpu(), 1, generator=self.generator).squeeze(1).to(logits.device)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most probable tokens whose probabilities reach top_p; [rows, vocab], renormalised."""
    if top_p >= 1:
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True)
    needed = ranked.cumsum(dim=-1) - ranked < top_p  # what stands before it does not suffice yet
    kept = torch.zeros_like(probabilities).scatter_(-1, order, ranked * needed)
    return kept / kept.sum(dim=-1, keepdim=True)
