"""How a step is carried out: by this process alone, or by many ranks together (motley.parallel).

    Trainer (trainer.py)    read → gradient → update → finish_step          the same for one process and for thousands
    Strategy                SingleProcess, here; Ranks, Diloco: motley.parallel, which wraps the same step

The trainer calls a strategy's methods in the same order on every rank. What a single process has nothing to do for is
an empty method of `SingleProcess`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import RenderableType

from motley.data.stream import Batch, TokenStream
from motley.fleet.device import ACTIVATIONS, Format
from motley.model import ModelConfig, Transformer
from motley.train.config import TrainingConfig
from motley.train.loss_scaler import LossScaler
from motley.train.ngram_targets import NgramCounts, NgramTargets
from motley.train.optimizer import Optimizer, State
from motley.train.step import LossWeights, StepLosses, accumulate, all_finite, clip_gradient, gradient_norm, is_trained
from motley.train.validation import summed_nats

Result = TypeVar("Result")


@dataclass
class TrainingState:
    """What a checkpoint holds of a model in training, gathered in the memory of the process that writes it.

    Attributes:
        weights: and buffers of the whole model, by name.
        optimizer: its state, by name (`Optimizer.state_tensors`).
        others: tensors of other files beside them, by file name.
        facts: numbers of the strategy's own, for training.json.
    """

    weights: State
    optimizer: State
    others: Mapping[str, State] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class StepEnd:
    """What is known once a step is done.

    Attributes:
        step: of the run that is reached.
        tokens: that this adds to those of the run.
        rows: of the batch that this rank's replicas took together.
        synchronized: whether all ranks are at the same step, so that checkpoints and validations are possible.
        numbers: more values for the step's record in the metrics.
        records: (kind, values) of more records.
        remarks: to be told to people.
        busy: seconds that each rank of the step did not wait; empty where nobody measured that.
        round_seconds: of a DiLoCo round that just ended.
        round_busy: seconds that each island of it was busy.
        lost: a rank failed after the step was taken; raised once the step is written down.
    """

    step: int
    tokens: int
    rows: int
    synchronized: bool = True
    numbers: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[tuple[str, Mapping[str, Any]]] = ()
    remarks: Sequence[str] = ()
    busy: Sequence[float] = ()
    round_seconds: float | None = None
    round_busy: Sequence[float] = ()
    lost: Exception | None = None


class Strategy(Protocol):
    """What differs between one process and many.

    Attributes:
        config: settings of the stage.
        shape: of the whole model.
        model: the part of it that this process computes with.
        scaler: loss scales, of fp16.
        leads: whether this process writes files and talks to people.
        count: islands of DiLoCo; 1 without.
    """

    config: TrainingConfig
    shape: ModelConfig
    model: Transformer
    scaler: LossScaler
    count: int

    @property
    def leads(self) -> bool: ...

    @property
    def micro_batch(self) -> int:
        """Rows that this process computes at a time."""
        ...

    # a step
    def read(self, stream: TokenStream, step: int) -> Batch:
        """This process's rows of a step."""
        ...

    def gradient(self, batch: Batch) -> tuple[StepLosses, float]:
        """(losses, gradient norm) of the whole step, the same on every rank; the gradient is kept for `update`."""
        ...

    def update(self, losses: StepLosses, norm: float, learning_rate: float) -> None:
        """Clip the gradient, step the optimizer, move the routers' biases."""
        ...

    def finish_step(self, step: int, losses: StepLosses, learned: bool, seconds: Callable[[], float]) -> StepEnd:
        """After a step, learned or skipped: exchange what has to be exchanged, tell where the run is.

        seconds: of the step until it is called, without checkpoints.
        """
        ...

    def held_out_loss(self, stream: TokenStream, rows: int) -> float:
        """Summed loss in nats over the first rows of a stream, the same on every rank."""
        ...

    # agreement between ranks
    def stopping(self, asked: bool) -> bool:
        """Whether the run stops before the next step; `asked`: this process was told to."""
        ...

    def agree(self, holds: bool) -> bool:
        """Whether something holds on all ranks."""
        ...

    def led(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on the process that leads, on all; an error there is raised on all."""
        ...

    def check_copies(self, step: int) -> None:
        """Raises InputError where ranks hold copies of weights that differ."""
        ...

    # state
    def state(self) -> TrainingState | None:
        """Of the whole model, at the process that writes checkpoints; None elsewhere."""
        ...

    def load(self, saved: TrainingState | None, facts: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        """Take over the state that the leading process read (None elsewhere); returns the facts that hold here.

        facts: of the checkpoint.
        folder: of the run.
        """
        ...

    def save_own(self, run: Path, step: int, facts: Mapping[str, Any]) -> None:
        """Write what this rank alone has to keep, beside the checkpoint of a step."""
        ...

    def prune_own(self, run: Path, kept: Callable[[], Sequence[str]]) -> None:
        """Delete what `save_own` wrote for checkpoints that are no longer `kept`."""
        ...

    # telemetry
    def introduction(self) -> dict[str, Any] | None:
        """Who takes part, for the metrics; None: nobody else."""
        ...

    def dashboard(self, about: Mapping[str, Any]) -> RenderableType:
        """What the ranks did last, to stand under the progress bar."""
        ...


class SingleProcess:
    """One process that holds the whole model.

    Args:
        model: with its weights, on the device it is trained on.
        config: settings of the stage.
        number_format: of its products over fp32 weights.
    """

    leads = True
    count = 1

    def __init__(self, model: Transformer, config: TrainingConfig, number_format: Format = "fp32") -> None:
        self.model, self.config, self.shape = model, config, model.config
        model.compute_dtype, model.recompute = ACTIVATIONS[number_format], config.recompute
        model.train_in_fp8(number_format == "fp8")
        self.scaler = LossScaler.of([number_format])
        self.weights = LossWeights(config.mtp_weight, config.balance_weight)
        self.micro_batch = config.micro_batch
        mtp = bool(config.mtp_weight)
        named = list(model.named_parameters())
        self.trained = [(name, parameter) for name, parameter in named if is_trained(name, mtp)]
        rest = [(name, parameter) for name, parameter in named if not is_trained(name, mtp)]
        self.optimizer = Optimizer(
            [*self.trained, *rest], config.optimizer, config.weight_decay, ACTIVATIONS[number_format],
            config.embedding_rate, config.moments,
        )  # fmt: skip

    def learn_ngrams(self, counts: NgramCounts) -> None:
        """Blend what usually follows two tokens into the targets of all steps."""
        self.weights = replace(self.weights, ngrams=NgramTargets(counts, self.config.ngram_share()))

    # ------------------------------------------------------------------------------------------------ a step

    def read(self, stream: TokenStream, step: int) -> Batch:
        rows = self.config.batch_rows
        return stream.rows(step * rows, rows).cut(self.config.length(step))

    def gradient(self, batch: Batch) -> tuple[StepLosses, float]:
        self.optimizer.zero_grad()
        scale = self.scaler.values[0]
        micro_batch = self.micro_batch * max(1, self.config.seq_len // batch.input_ids.shape[1])
        losses = accumulate(self.model, batch, micro_batch, self.weights, self.config.confine_to_document, scale)
        grads = [parameter.grad for _, parameter in self.trained if parameter.grad is not None]
        if not losses.finite or (self.scaler.ranks and not all_finite(grads)):
            losses.culprits = [0]
        if scale != 1:
            for grad in grads:
                grad.mul_(1 / scale)
        return losses, gradient_norm(grads)

    def update(self, losses: StepLosses, norm: float, learning_rate: float) -> None:
        clip_gradient([parameter for _, parameter in self.trained], self.config.clip, norm)
        self.optimizer.step(learning_rate)
        for gate, counts in zip(self.model.gates(), losses.expert_counts, strict=False):
            gate.rebalance(counts.to(self.model.device), self.config.bias_speed)

    def finish_step(self, step: int, losses: StepLosses, learned: bool, seconds: Callable[[], float]) -> StepEnd:
        numbers = {"loss_scale": self.scaler.values[0]} if self.scaler.ranks else {}
        return StepEnd(step + 1, losses.tokens, self.config.batch_rows, numbers=numbers)

    def held_out_loss(self, stream: TokenStream, rows: int) -> float:
        return summed_nats(self.model, stream, rows, self.config.confine_to_document, self.micro_batch)

    # --------------------------------------------------------------------------------- nobody to agree with

    def stopping(self, asked: bool) -> bool:
        return asked

    def agree(self, holds: bool) -> bool:
        return holds

    def led(self, work: Callable[[], Result]) -> Result:
        return work()

    def check_copies(self, step: int) -> None: ...

    # ------------------------------------------------------------------------------------------------- state

    def state(self) -> TrainingState:
        return TrainingState(dict(self.model.state_dict()), self.optimizer.state_tensors())

    @torch.no_grad()
    def load(self, saved: TrainingState | None, facts: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        assert saved is not None
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(saved.weights[name])
        if saved.optimizer:
            self.optimizer.load_state_tensors(saved.optimizer.items())
        return facts

    def save_own(self, run: Path, step: int, facts: Mapping[str, Any]) -> None: ...

    def prune_own(self, run: Path, kept: Callable[[], Sequence[str]]) -> None: ...

    # --------------------------------------------------------------------------------------------- telemetry

    def introduction(self) -> dict[str, Any] | None:
        return None

    def dashboard(self, about: Mapping[str, Any]) -> RenderableType:
        raise NotImplementedError("a single process introduces nobody")
