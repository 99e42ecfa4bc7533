"""The cache for decoding a batch of rows that may differ in length.

    row 0   ■ ■ ■ ■ ■ □ □        ■ held      lengths = [5, 3]
    row 1   ■ ■ ■ □ □ □ □        □ free      capacity = 7

New tokens of row b go to positions lengths[b], lengths[b] + 1, … Columns that were only padding are overwritten by
what comes next, since a position beyond a row's length is never attended to.

The model owns the lengths; each layer owns a state of its own kind, made by its attention. Another kind of attention
brings another state and leaves the rest as it is.
"""

from typing import Protocol

import torch
from torch import Tensor


class LayerState(Protocol):
    """The cache of one layer."""

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        ...

    @property
    def bytes_per_token(self) -> int: ...


class LatentState:
    """MLA keeps the normalised latent and the rotated shared key (V2 report, 2.1), nothing per head."""

    def __init__(
        self, batch: int, capacity: int, rank: int, rope: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.latent = torch.zeros(batch, capacity, rank, dtype=dtype, device=device)
        self.rope_key = torch.zeros(batch, capacity, rope, dtype=dtype, device=device)

    def append(self, positions: Tensor, latent: Tensor, rope_key: Tensor) -> None:
        """Write latent [batch, seq, rank] and rope_key [batch, seq, rope] at positions [batch, seq]."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.latent[rows, positions] = latent.to(self.latent.dtype)
        self.rope_key[rows, positions] = rope_key.to(self.rope_key.dtype)

    def select(self, rows: Tensor) -> None:
        self.latent, self.rope_key = self.latent[rows], self.rope_key[rows]

    @property
    def bytes_per_token(self) -> int:
        return (self.latent.shape[-1] + self.rope_key.shape[-1]) * self.latent.element_size()


class Cache:
    """Lengths of the rows and the state of every layer; made by `Transformer.new_cache`."""

    def __init__(self, layers: list[LayerState], batch: int, capacity: int, device: torch.device) -> None:
        self.layers = layers
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0  # bound on lengths that is known without waiting for the device

    def positions(self, seq: int) -> Tensor:
        """Positions of the next `seq` tokens of each row: [batch, seq]. Raises ValueError if they do not fit."""
        if self.longest + seq > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row; {self.longest} + {seq} do not fit")
        return self.lengths[:, None] + torch.arange(seq, device=self.lengths.device)

    def advance(self, seq: int, counts: Tensor | None) -> None:
        """Count the new tokens: `counts` [batch] of `seq` columns were real in each row (all, when None)."""
        self.lengths = self.lengths + (seq if counts is None else counts)
        self.longest = self.longest + seq if counts is None else int(self.lengths.max())

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch (`rows` [kept], int64)."""
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) if rows.numel() else 0
        for layer in self.layers:
            layer.select(rows)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one more token costs: 70,272 for DeepSeek-V3 in bf16."""
        return sum(layer.bytes_per_token for layer in self.layers)
