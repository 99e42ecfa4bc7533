"""What changes over a run: the learning rate, as a factor of its peak, and the length of sequences."""

import itertools
import math
from typing import Literal

from motley.errors import InputError

Schedule = Literal["wsd", "cosine"]


def factor(step: int, steps: int, kind: Schedule, warmup_steps: int, decay_share: float, final_share: float) -> float:
    """Factor of the peak learning rate at `step` (0 … steps-1).

        wsd      ╱▔▔▔▔▔▔╲     warmup, stable, then linear decay over the last `decay_share` of the steps
        cosine   ╱▔▔╲__       warmup, then half a cosine over the rest

    Both end at `final_share` of the peak. (WSD: MiniCPM, arXiv 2404.06395; DeepSeek-V3 also holds before it decays.)
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = max(1, round(steps * decay_share))
    left = (steps - step) / decay_steps
    return 1.0 if left >= 1 else final_share + (1 - final_share) * left


Stages = tuple[tuple[int, float], ...]
"""(tokens of a sequence, until which share of the run)."""


def stages_of(text: str) -> Stages:
    """`64:0.3,128:0.6`: sequences of 64 tokens for the first 30 % of a run, of 128 until 60 %, then whole rows.

    Raises InputError where it says something else, or lengths or shares do not grow.
    """
    stages: list[tuple[int, float]] = []
    for part in text.split(",") if text else []:
        length, _, until = part.partition(":")
        try:
            stages.append((int(length), float(until)))
        except ValueError:
            raise InputError(f"--seq-len-warmup has {part!r}; it takes LENGTH:SHARE, such as 64:0.3,128:0.6") from None
    if any(length < 1 or not 0 < until <= 1 for length, until in stages):
        raise InputError(f"--seq-len-warmup is {text}; lengths are at least 1, shares of the run above 0 and at most 1")
    if any(not (less < more and before < after) for (less, before), (more, after) in itertools.pairwise(stages)):
        raise InputError(f"--seq-len-warmup is {text}; lengths and shares must grow from one stage to the next")
    return tuple(stages)


def check_stages(text: str, seq_len: int) -> None:
    """Raises InputError where rows of seq_len tokens cannot be cut into the lengths of `stages_of`."""
    for length, _ in stages_of(text):
        if length >= seq_len or seq_len % length:
            raise InputError(
                f"--seq-len-warmup has sequences of {length} tokens, into which --seq-len {seq_len} cannot be cut"
            )


def sequence_length(stages: Stages, seq_len: int, passed: float) -> int:
    """Tokens of a sequence after a share `passed` of the run.

    Short sequences first cost less attention, and a new model learns more from a token among few (sequence length
    warmup: Li et al., arXiv 2108.06084).
    """
    return next((length for length, until in stages if passed < until), seq_len)
