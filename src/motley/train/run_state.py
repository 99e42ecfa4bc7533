"""Where a run stands between two steps: with model and optimizer all that going on needs."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from motley.train.expert_balance import ExpertBalance
from motley.train.loss_spike import LossSpikeGuard
from motley.train.slow_step import SlowStepWatch


@dataclass
class Position:
    """How far a run is; part of every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float = 1e30  # JSON knows no infinity
    best_bits_per_byte: float = 1e30


@dataclass
class RunState:
    """A step changes it in one go, once the sums over all rows are there: a rank that loses its peers in the middle of a
    step still holds the state after a whole number of steps.

    Attributes:
        at: how far the run is.
        guard: what losses and gradient norms are usual.
        checkpoint_due: a checkpoint is to be written.
        validation_due: the model is to be validated.
        synchronized: the last step at which all ranks were at the same step.
        usual: how long steps and checkpoints usually take.
        expert_counts: routed tokens per expert of the last step, one tensor per MoE layer.
        recent: metrics records of the last steps.
        news: what the metrics are to say before the next step.
        balance: whether the experts are used.
        asked_to_stop: this process was told to stop; kept when ranks regroup.
    """

    at: Position = field(default_factory=Position)
    guard: LossSpikeGuard = field(default_factory=LossSpikeGuard)
    checkpoint_due: bool = False
    validation_due: bool = False
    synchronized: int | None = None
    usual: SlowStepWatch = field(default_factory=SlowStepWatch)
    expert_counts: list[Tensor] = field(default_factory=list)
    recent: list[dict[str, Any]] = field(default_factory=list)
    news: list[str] = field(default_factory=list)
    balance: ExpertBalance = field(default_factory=ExpertBalance)
    asked_to_stop: bool = False

    def __post_init__(self) -> None:
        self.synchronized = self.at.step if self.synchronized is None else self.synchronized

    @property
    def written(self) -> int:
        """The step up to which the metrics are surely on disk."""
        return min([self.at.step, *(record["step"] - 1 for record in self.recent)])
