"""The state of a run between two steps: what resuming needs besides model and optimizer."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from motley.train.expert_balance import ExpertBalance
from motley.train.loss_spike import LossSpikeGuard
from motley.train.slow_step import SlowStepWatch


@dataclass
class Position:
    """How far a run has come; part of every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float = 1e30  # JSON knows no infinity
    best_bits_per_byte: float = 1e30


@dataclass
class RunState:
    """A step updates it at once, after all of its collectives: if other ranks exit during a step, this one still holds
    the state after a whole number of steps.

    Attributes:
        at: how far the run has come.
        guard: recent losses and gradient norms.
        checkpoint_due: a checkpoint is to be written.
        validation_due: the model is to be validated.
        synchronized: the last step at which all ranks were at the same step.
        usual: recent durations of steps and checkpoints.
        expert_counts: routed tokens per expert of the last step, one tensor per MoE layer.
        recent: metrics records of the last steps.
        news: events to write to the metrics before the next step.
        balance: watches how evenly experts are used.
        asked_to_stop: this process received a stop signal; kept when ranks regroup.
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
        """The last step whose metrics are certainly on disk."""
        return min([self.at.step, *(record["step"] - 1 for record in self.recent)])
