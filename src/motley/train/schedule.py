"""What changes over a run: the learning rate, as a factor of its peak, and the length of sequences."""

import itertools
import math
from collections.abc import Sequence
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


def stages_of(text: str, seq_len: int) -> Stages:
    """`64:0.3,128:0.6`: sequences of 64 tokens for the first 30 % of a run, of 128 until 60 %, then of seq_len.

    Rows of seq_len tokens are cut into such sequences, so lengths divide it. Raises InputError where they do not, or
    do not grow.
    """
    stages: list[tuple[int, float]] = []
    for part in text.split(",") if text else []:
        length, colon, until = part.partition(":")
        try:
            stages.append((int(length), float(until)))
        except ValueError:
            colon = ""
        if not colon:
            raise InputError(f"--seq-len-warmup has {part!r}; it takes LENGTH:SHARE, such as 64:0.3,128:0.6")
    lengths, shares = [length for length, _ in stages], [until for _, until in stages]
    for length in lengths:
        if length < 1 or seq_len % length:
            raise InputError(
                f"--seq-len-warmup has sequences of {length} tokens; --seq-len {seq_len} is no multiple of that"
            )
    if any(later <= before for numbers in (lengths, shares) for before, later in itertools.pairwise(numbers)):
        raise InputError(f"--seq-len-warmup is {text}; lengths and shares must grow from one stage to the next")
    if shares and not 0 < shares[0] <= shares[-1] <= 1:
        raise InputError(f"--seq-len-warmup is {text}; shares of the run lie above 0 and are at most 1")
    return tuple(stages)


def sequence_length(stages: Sequence[tuple[int, float]], seq_len: int, gone: float) -> int:
    """Tokens of a sequence when a share `gone` of the run is over.

    Short sequences first cost less attention, and a new model learns more from a token among few (sequence length
    warmup: Li et al., arXiv 2108.06084).
    """
    return next((length for length, until in stages if gone < until), seq_len)
