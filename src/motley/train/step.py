"""One exact training step: the gradient does not depend on how the batch was cut.

    loss = sum of token losses / all valid tokens of the step        (with n-gram soft targets, if there are any)
         + mtp_weight / D * sum over depths of (their token losses / all tokens they predict)
         + balance_weight * sum over MoE layers of (sum over sequences of balance * tokens) / all tokens

Each micro-batch adds its share of every sum, already divided by the whole step's counts, so accumulating gradients
over any split of the rows gives the same sum. Router loads are counted over the whole step. Routers of MTP modules
count only positions that have a token so much further; their balance is divided by all tokens too, so that its weight
means the same in every layer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from motley.data.stream import Batch
from motley.model import Transformer
from motley.model.moe import Routing
from motley.train.loss import blended_cross_entropy, summed_cross_entropy
from motley.train.ngram_targets import NgramTargets


@dataclass(frozen=True)
class LossWeights:
    """Weights of what is added to the main loss (V3 report, 4.2), and what it is blended with."""

    mtp: float = 0.3
    balance: float = 1e-4
    ngrams: NgramTargets | None = None


@dataclass
class StepLosses:
    """Losses of a whole step in nats per token, and what the routers did.

    `main` is of the tokens that came, whatever else was learned.
    """

    main: float
    mtp: float
    balance: float
    expert_counts: list[Tensor]
    tokens: int
    culprits: list[int] = field(default_factory=list)
    """Ranks where numbers that are not finite came from."""

    @property
    def finite(self) -> bool:
        return all(value == value and abs(value) != float("inf") for value in (self.main, self.mtp, self.balance))


def mtp_targets(targets: Tensor, documents: Tensor, depth: int) -> Tensor:
    """Targets of MTP depth k: position i predicts token i + k + 1, within its document. All [batch, seq]."""
    seq = targets.shape[1]
    shifted = torch.full_like(targets, -100)
    if depth < seq:
        same = documents[:, depth:] == documents[:, :-depth]
        shifted[:, :-depth] = torch.where(same, targets[:, depth:], -100)
    return shifted


@dataclass(frozen=True)
class Counts:
    """By what the sums of a step are divided: counted over the whole step, whoever computes it.

    Attributes:
        tokens: with a target.
        further: with a target at each MTP depth.
        held: that are not padding.
    """

    tokens: int
    further: tuple[int, ...]
    held: int

    @classmethod
    def of(cls, batch: Batch, depths: int) -> "Counts":
        further = [mtp_targets(batch.targets, batch.documents, depth) for depth in range(1, depths + 1)]
        counted = [int((targets >= 0).sum()) for targets in (batch.targets, *further, batch.documents)]
        return cls(counted[0], tuple(counted[1:-1]), counted[-1])

    def added_up(self, add: Callable[[Tensor], Tensor]) -> "Counts":
        """These counts summed over all who count rows of their own."""
        tokens, *further, held = add(torch.tensor([self.tokens, *self.further, self.held])).tolist()
        return Counts(tokens, tuple(further), held)


@dataclass
class Tally:
    """Losses so far, each divided by the step's counts already, and router loads per MoE layer (int64 [experts])."""

    main: Tensor
    mtp: Tensor
    balance: Tensor
    expert_counts: list[Tensor]

    @classmethod
    def empty(cls, device: torch.device) -> "Tally":
        main, mtp, balance = torch.zeros(3, device=device).unbind()
        return cls(main.clone(), mtp.clone(), balance.clone(), [])

    def add_routings(self, routings: Sequence[Routing], counts: Counts, weight: float, layers: int) -> Tensor | float:
        """Count what routers did with a micro-batch; returns what their balance adds to the loss.

        `layers`: MoE layers of the whole model, over which the reported balance loss is averaged.
        """
        total: Tensor | float = 0.0
        for layer, routing in enumerate(routings):
            part = routing.balance / max(1, counts.held)
            total = total + weight * part
            self.balance += part.detach() / layers
            if layer == len(self.expert_counts):
                self.expert_counts.append(routing.counts)
            else:
                self.expert_counts[layer] = self.expert_counts[layer] + routing.counts
        return total


def predicted_loss(
    model: Transformer,
    main: Tensor,
    further: Sequence[Tensor],
    batch: Batch,
    counts: Counts,
    weights: LossWeights,
    tally: Tally,
    scale: float = 1.0,
) -> Tensor:
    """What a micro-batch adds to the loss by its predictions.

    Args:
        model: has the head.
        main: as in `Hidden`.
        further: as in `Hidden`; empty leaves the MTP loss out.
        batch: the micro-batch, on the model's device.
        counts: of the whole step.
        weights: of its parts.
        tally: takes note of the parts.
        scale: what the loss will be multiplied by for its gradient.
    """
    head = model.lm_head.weight
    slope = 2.0 ** round(math.log2(scale / max(1, counts.tokens)))
    targets = batch.targets.flatten()
    if weights.ngrams is None:
        total = seen = summed_cross_entropy(main.flatten(0, 1), head, targets, slope)
    else:
        expected = weights.ngrams.counts.expected(batch.input_ids)
        total, seen = blended_cross_entropy(main.flatten(0, 1), head, targets, expected, weights.ngrams.share, slope)
    total = total / max(1, counts.tokens)
    tally.main += seen.detach() / max(1, counts.tokens)
    for depth, state in enumerate(further, start=1):
        targets = mtp_targets(batch.targets, batch.documents, depth).flatten()
        part = summed_cross_entropy(state.flatten(0, 1), head, targets, slope) / max(1, counts.further[depth - 1])
        part = part / len(further)
        total = total + weights.mtp * part
        tally.mtp += part.detach()
    return total


def accumulate(
    model: Transformer,
    batch: Batch,
    micro_batch: int,
    weights: LossWeights,
    confined: bool,
    scale: float = 1.0,
) -> StepLosses:
    """Add the gradient of a whole step's loss, times `scale`, to the parameters' .grad.

    Args:
        model: what is trained.
        batch: all rows of the step.
        micro_batch: rows computed at a time (memory); does not change the result.
        weights: of the parts of the loss.
        confined: attention stays within documents.
        scale: loss scale of fp16, a power of two.
    """
    depths = len(model.mtp) if weights.mtp else 0
    counts = Counts.of(batch, depths)
    tally = Tally.empty(model.device)
    for rows in micro_batches(batch, micro_batch):
        part = batch_rows(batch, rows, model.device)
        hidden = model.hidden(
            part.input_ids, attended_documents(part, confined), mtp=bool(depths), packed=part.documents
        )
        total = predicted_loss(model, hidden.main, hidden.further, part, counts, weights, tally, scale)
        total = total + tally.add_routings(hidden.routings, counts, weights.balance, max(1, len(hidden.routings)))
        torch.autograd.backward([total], [torch.full_like(total, scale)])
    expert_counts = [counted.cpu() for counted in tally.expert_counts]
    return StepLosses(tally.main.item(), tally.mtp.item(), tally.balance.item(), expert_counts, counts.tokens)


def is_trained(name: str, mtp: bool) -> bool:
    """Whether the loss depends on a parameter; `mtp`: it has a part that the MTP modules predict."""
    return mtp or not name.startswith("mtp.")


@torch.no_grad()
def gradient_norm(grads: Sequence[Tensor]) -> float:
    """Length of a whole gradient."""
    return math.sqrt(float(squared_length(grads)))


@torch.no_grad()
def squared_length(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares of a gradient, fp64."""
    lengths = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.stack(lengths).cpu().double().square().sum() if lengths else torch.zeros((), dtype=torch.float64)


@torch.no_grad()
def clip_gradient(parameters: Sequence[nn.Parameter], largest: float, norm: float) -> None:
    """Shorten a gradient of length `norm` to `largest`."""
    if norm > largest:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(clip_factor(largest, norm))


def clip_factor(largest: float, norm: float) -> float:
    """By which a gradient of length `norm` is multiplied."""
    return largest / (norm + 1e-6) if norm > largest else 1.0


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are, by the ends of each tensor's range: no memory of its size, one answer to wait for."""
    ends = [torch.stack(torch.aminmax(tensor)) for tensor in tensors if tensor.numel()]
    return not ends or bool(torch.stack(ends).isfinite().all())


def attended_documents(batch: Batch, confined: bool) -> Tensor | None:
    """What attention is told of documents: all of them, or only where there is padding, or nothing."""
    if confined:
        return batch.documents
    return batch.documents.clamp(max=0) if bool((batch.documents < 0).any()) else None


def micro_batches(batch: Batch, micro_batch: int) -> list[slice]:
    """The rows of a batch, so many at a time."""
    rows = len(batch.input_ids)
    return [slice(start, min(start + micro_batch, rows)) for start in range(0, rows, micro_batch)]


def batch_rows(batch: Batch, rows: slice, device: torch.device) -> Batch:
    """Some rows, on `device`."""
    return Batch(*(tensor[rows].to(device) for tensor in (batch.input_ids, batch.targets, batch.documents)))
