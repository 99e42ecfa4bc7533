"""Loss on held-out rows, in nats per token and in bits per byte (comparable across tokenizers)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from motley.data.stream import Batch, TokenStream
from motley.model import Transformer
from motley.train.step import Counts, LossWeights, Tally, attended_documents, batch_rows, predicted_loss

ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class Reading:
    """Loss on held-out rows, and over how much it was measured."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


SummedLoss = Callable[[TokenStream, int], float]
"""(stream, rows) → nats summed over the first rows of the stream, in its own order."""


def validate(summed_loss: SummedLoss, stream: TokenStream, rows: int, token_bytes: np.ndarray) -> Reading:
    """Loss over the first `rows` rows of `stream`.

    token_bytes: bytes each token of the vocabulary stands for; control tokens count none.
    """
    tokens, size = 0, 0
    rows = min(rows, stream.rows_per_epoch)
    for start in range(0, rows, ROWS_AT_A_TIME):
        targets = stream.rows(start, min(ROWS_AT_A_TIME, rows - start)).targets.flatten()
        counted = targets[targets >= 0].numpy()
        tokens += len(counted)
        size += int(token_bytes[counted].sum())
    nats = summed_loss(stream, rows)
    return Reading(nats / max(1, tokens), nats / math.log(2) / max(1, size), tokens, size)


@torch.no_grad()
def summed_nats(
    model: Transformer, stream: TokenStream, rows: int, confined: bool, micro_batch: int = ROWS_AT_A_TIME
) -> float:
    """Loss of a whole model in nats, summed over the first `rows` rows of `stream`.

    confined: attention stays within documents. micro_batch: rows computed at a time.
    """
    training = model.training
    model.eval()
    nats = 0.0
    for start in range(0, rows, micro_batch):
        batch = batch_rows(stream.rows(start, min(micro_batch, rows - start)), slice(None), model.device)
        nats += batch_nats(model, model.final_hidden(batch.input_ids, attended_documents(batch, confined)), batch)
    model.train(training)
    return nats


def batch_nats(
    model: Transformer, final_hidden: Tensor, batch: Batch, predicted_loss: Callable[..., Tensor] = predicted_loss
) -> float:
    """Loss in nats, summed over all targets of a batch.

    Args:
        model: has the head.
        final_hidden: [batch, seq, hidden], what `Transformer.final_hidden` makes of the rows.
        batch: the rows, on the model's device.
        predicted_loss: with the arguments of `step.predicted_loss`; another one may have to fetch the head first.
    """
    tally = Tally.empty(model.device)
    predicted_loss(model, final_hidden, [], batch, Counts(1, (), 1), LossWeights(0.0, 0.0), tally)
    return float(tally.main)
