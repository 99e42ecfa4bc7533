"""Say once when messages take most of a step: the links are slow, and islands would spare most of that.

rank 0     work ▏ gradients ▏ update ▏ weights         what even the last to come waits for a sum is the sum's own
rank 1     work          ▏ gr ▏ up ▏   weights         time, and no other's slowness: the least over the ranks
"""

from dataclasses import dataclass

from motley.parallel.telemetry.step_stats import StepStats
from motley.train.config import TrainingConfig

MOST_SHARE = 0.5
"""Of a step."""
LEAST_SECONDS = 0.5
"""Of a step: less is soon made by a busy machine, without any link."""
IN_A_ROW = 3
"""Steps, so that a single one that was disturbed says nothing."""


@dataclass
class CommBoundWatch:
    """Looks at every step of ranks without islands until it has something to say.

    Attributes:
        slow: steps in a row in which messages took most of the time.
        told: it was said.
    """

    slow: int = 0
    told: bool = False

    def complaint(self, timing: StepStats, config: TrainingConfig) -> list[str]:
        """A sentence, once, about messages that took most of the last few steps, of which `timing` is the newest."""
        spent = timing.exchange_seconds
        self.slow = self.slow + 1 if spent >= max(LEAST_SECONDS, MOST_SHARE * timing.step_seconds) else 0
        if self.told or self.slow < IN_A_ROW:
            return []
        self.told = True
        return [
            f"gradients and weights travel for {spent:.2g} s of a step of {timing.step_seconds:.2g} s: these links are "
            f"slow, and {_remedy(config)}"
        ]


def _remedy(config: TrainingConfig) -> str:
    if config.plan is not None:
        return (
            "the plan takes them for faster, or for worth it; measure them (`motley fleet probe` under torchrun) and "
            "plan again, or give more --batch-rows"
        )
    without = ", without --elastic," if config.elastic else ""
    return (
        f"islands, one on each side of a slow link, would spare most of that: --islands N{without} or a plan for "
        "measured links (`motley fleet probe` under torchrun, `motley plan`); else give more --batch-rows"
    )
