"""One exact training step: the gradient does not depend on how the batch was cut.

    loss = sum of token losses / all valid tokens of the step
         + mtp_weight / D * sum over depths of (their token losses / all tokens they predict)
         + balance_weight * sum over MoE layers of (sum over sequences of balance * tokens) / all tokens

Each micro-batch adds its share of every sum, already divided by the whole step's counts, so accumulating gradients
over any split of the rows gives the same sum. Router loads are counted over the whole step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from motley.data.stream import Batch
from motley.model import Transformer
from motley.train.loss import summed_cross_entropy


@dataclass(frozen=True)
class LossWeights:
    """Weights of what is added to the main loss (V3 report, 4.2)."""

    mtp: float = 0.3
    balance: float = 1e-4


@dataclass
class StepLosses:
    """Losses of a whole step in nats per token, and what the routers did."""

    main: float
    mtp: float
    balance: float
    expert_counts: list[Tensor]
    tokens: int

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


def accumulate(model: Transformer, batch: Batch, micro_batch: int, weights: LossWeights, confined: bool) -> StepLosses:
    """Add the gradient of the whole step's loss to the parameters' .grad.

    Args:
        model: what is trained.
        batch: all rows of the step.
        weights: of the parts of the loss.
        micro_batch: rows computed at a time (memory); does not change the result.
        confined: attention stays within documents.
    """
    device = model.device
    depths = range(1, len(model.mtp) + 1) if weights.mtp else range(0)
    further = [mtp_targets(batch.targets, batch.documents, depth) for depth in depths]
    tokens = int((batch.targets >= 0).sum())
    further_tokens = [max(1, int((target >= 0).sum())) for target in further]
    held = max(1, int((batch.documents >= 0).sum()))
    main = torch.zeros((), device=device)
    mtp, balance = torch.zeros_like(main), torch.zeros_like(main)
    counts: list[Tensor] = []
    for start in range(0, len(batch.input_ids), micro_batch):
        rows = slice(start, start + micro_batch)
        padded = bool((batch.documents[rows] < 0).any())
        documents = batch.documents[rows].to(device) if confined or padded else None
        hidden = model.hidden(batch.input_ids[rows].to(device), documents, mtp=bool(depths))
        head = model.lm_head.weight
        part = summed_cross_entropy(hidden.main.flatten(0, 1), head, batch.targets[rows].flatten().to(device))
        part = part / max(1, tokens)
        total = part
        main += part.detach()
        for state, target, predicted in zip(hidden.further, further, further_tokens, strict=True):
            part = summed_cross_entropy(state.flatten(0, 1), head, target[rows].flatten().to(device)) / predicted
            part = part / len(further)
            total = total + weights.mtp * part
            mtp += part.detach()
        for layer, routing in enumerate(hidden.routings):
            part = routing.balance / held
            total = total + weights.balance * part
            balance += part.detach() / len(hidden.routings)
            if layer == len(counts):
                counts.append(routing.counts)
            else:
                counts[layer] = counts[layer] + routing.counts
        total.backward()
    return StepLosses(main.item(), mtp.item(), balance.item(), counts, tokens)
