"""Positions and documents of the tokens of one call: an argument of every block."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Where:
    """Shared by all layers.

    positions [batch, seq]; cos, sin [batch or 1, seq, 1, rope/2].
    documents: [batch, seq] or None, within which attention stays.
    routed: bool [batch, seq] or None, the tokens that routers count; None: all.
    held: with a cache, positions of the longest row including these tokens; known without waiting for the device.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    documents: Tensor | None = None
    routed: Tensor | None = None
    held: int = 0
