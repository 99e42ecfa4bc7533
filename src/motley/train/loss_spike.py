"""Skip optimizer steps whose loss or gradient norm jumped far above the recent median, or is not finite."""

import statistics
from dataclasses import dataclass, field

WINDOW = 50  # recent steps that say what is normal
LOSS_SPIKE, GRADIENT_SPIKE = 1.5, 10.0  # times the recent median
LEAST_SPIKE = 1.0  # nats above it: once a model knows its data, a loss near zero doubles without any harm
PATIENCE = 10  # harmful steps in a row before the run stops


@dataclass
class LossSpikeGuard:
    """Looks at each step's loss and gradient norm; part of the training state, so that resuming judges alike."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0

    def verdict(self, loss: float, grad_norm: float, finite: bool) -> str | None:
        """None: take the step. Otherwise why it must be skipped, in words."""
        reason = self._reason(loss, grad_norm, finite)
        if reason is None:
            self.losses = [*self.losses, loss][-WINDOW:]
            self.norms = [*self.norms, grad_norm][-WINDOW:]
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
        return reason

    def _reason(self, loss: float, grad_norm: float, finite: bool) -> str | None:
        if not finite or not grad_norm < float("inf"):
            return f"loss {loss:g} or gradient norm {grad_norm:g} is not finite"
        if len(self.losses) < WINDOW:
            return None
        usual, usual_norm = statistics.median(self.losses), statistics.median(self.norms)
        if loss > max(LOSS_SPIKE * usual, usual + LEAST_SPIKE) and grad_norm > GRADIENT_SPIKE * usual_norm:
            return f"loss {loss:.3g} and gradient norm {grad_norm:.3g} jumped (usual: {usual:.3g}, {usual_norm:.3g})"
        return None

    @property
    def exhausted(self) -> bool:
        return self.skipped_in_a_row >= PATIENCE
