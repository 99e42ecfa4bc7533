"""Loss on held-out rows, in nats per token and in bits per byte (comparable across tokenizers)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from motley.data.stream import TokenStream
from motley.model import Transformer
from motley.train.loss import summed_cross_entropy
from motley.train.step import attended_documents, batch_rows

ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class Reading:
    """Loss on held-out rows, and over how much it was measured."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


SummedLoss = Callable[[TokenStream, int], float]
"""(stream, rows) → nats summed over the first rows of the stream in its own order."""


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


def loss_of(model: Transformer, confined: bool) -> SummedLoss:
    """The summed loss of one whole model; `confined`: attention stays within documents."""

    @torch.no_grad()
    def summed_loss(stream: TokenStream, rows: int) -> float:
        model.eval()
        nats = 0.0
        for start in range(0, rows, ROWS_AT_A_TIME):
            batch = batch_rows(stream.rows(start, min(ROWS_AT_A_TIME, rows - start)), slice(None), model.device)
            hidden = model.hidden(batch.input_ids, attended_documents(batch, confined), mtp=False)
            nats += summed_cross_entropy(
                hidden.main.flatten(0, 1), model.lm_head.weight, batch.targets.flatten()
            ).item()
        model.train()
        return nats

    return summed_loss
