"""Learning rate over a run, as a factor of its peak."""

import math
from typing import Literal

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
