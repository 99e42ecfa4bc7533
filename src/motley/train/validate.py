"""Loss on held-out rows, in nats per token and in bits per byte (comparable across tokenizers)."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from motley.data.stream import TokenStream
from motley.model import Transformer
from motley.train.loss import summed_cross_entropy

ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class Reading:
    """Loss on held-out rows, and over how much it was measured."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


@torch.no_grad()
def validate(model: Transformer, stream: TokenStream, rows: int, token_bytes: np.ndarray, confined: bool) -> Reading:
    """Loss over the first `rows` rows of `stream` in its own order.

    token_bytes: bytes each token of the vocabulary stands for; control tokens count none.
    """
    model.eval()
    nats, tokens, size = 0.0, 0, 0
    rows = min(rows, stream.rows_per_epoch)
    for start in range(0, rows, ROWS_AT_A_TIME):
        batch = stream.rows(start, min(ROWS_AT_A_TIME, rows - start))
        alone = confined or bool((batch.documents < 0).any())
        hidden = model.hidden(
            batch.input_ids.to(model.device), batch.documents.to(model.device) if alone else None, mtp=False
        )
        targets = batch.targets.flatten()
        nats += summed_cross_entropy(hidden.main.flatten(0, 1), model.lm_head.weight, targets.to(model.device)).item()
        counted = targets[targets >= 0].numpy()
        tokens += len(counted)
        size += int(token_bytes[counted].sum())
    model.train()
    return Reading(nats / max(1, tokens), nats / math.log(2) / max(1, size), tokens, size)
