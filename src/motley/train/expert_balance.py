"""Are the experts used? How far the router's bias moves in a step, and a word where one expert takes what is for many.

A bias has to travel as far as scores lie apart before it can even out a load, and it moves by gamma a step:

    bias    0 ──▶ gamma ──▶ 2 gamma ──▶ …  gamma * steps          at 0.001 a run of 120 steps comes to 0.12 of the range
                                                                 of a score, and the busiest of 8 experts keeps nearly
                                                                 all the places it can have
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor

from motley.model import ModelConfig

SLOWEST = 1e-3  # of DeepSeek-V3 (report, 4.2), over millions of steps
FASTEST = 1e-2
TRAVEL = 3.0
"""How far a bias can come in a run, between the two: in a third of it as far as a sigmoid's scores can lie apart."""


class ByLength(float):
    """A speed of the bias that nobody gave: it follows the number of steps, also in a copy of settings with others."""

    @classmethod
    def of(cls, steps: int) -> Self:
        """For a run of so many steps."""
        return cls(min(FASTEST, max(SLOWEST, TRAVEL / steps)))


def imbalance(counts: Tensor) -> float:
    """Load of the busiest expert over the mean, 1 where all are alike (MaxVio of arXiv 2408.15664, plus 1).

    counts: int64 [experts], tokens sent to each.
    """
    total = int(counts.sum())
    return float(counts.max()) * len(counts) / total if total else 1.0


MOST_UNEVEN = 3.0
"""Times the mean; with few experts, half way from even to the most there can be comes first."""


@dataclass
class ExpertBalance:
    """Looks at the loads of every step until it has something to say.

    Attributes:
        uneven: for each MoE layer, steps in a row in which its busiest expert took far too much.
        told: it was said.
    """

    uneven: list[int] = field(default_factory=list)
    told: bool = False

    def complaint(self, imbalances: Sequence[float], shape: ModelConfig, steps: int, speed: float) -> list[str]:
        """A sentence, once, about the layer that is uneven the longest, if that is too long.

        Args:
            imbalances: `imbalance` of each MoE layer, MTP's last.
            shape: of the model.
            steps: of the whole run.
            speed: of the bias.
        """
        experts, each = shape.n_routed_experts or 1, shape.num_experts_per_tok
        limit = min(MOST_UNEVEN, (1 + experts / each) / 2)
        before = self.uneven or [0] * len(imbalances)
        self.uneven = [count + 1 if now > limit else 0 for count, now in zip(before, imbalances, strict=True)]
        longest = max(self.uneven, default=0)
        if self.told or longest < patience(steps):
            return []
        self.told = True
        layer = self.uneven.index(longest)
        worst, now, even, most = (
            f"{n:.0%}" for n in (limit / experts, imbalances[layer] / experts, 1 / experts, 1 / each)
        )
        return [
            f"for {longest} steps now the busiest of {experts} experts of MoE layer {layer} has taken more than "
            f"{worst} of the places ({now} in this step; {even} is even, {most} all that one can take), so the others "
            f"learn little: {_remedy(shape, speed)}"
        ]


def patience(steps: int) -> int:
    """For how many steps in a row a load may be uneven, as it is in the beginning: two fifths of a short run.

    Runs of fewer than 50 steps are never blamed: no bias comes far enough in them.
    """
    return min(200, max(50, steps * 2 // 5))


def _remedy(shape: ModelConfig, speed: float) -> str:
    if shape.topk_method != "noaux_tc":
        return "begin anew with a higher --balance-weight or a lower --learning-rate"
    return f"begin anew with a higher --bias-speed than {speed:g}, or a lower --learning-rate"
