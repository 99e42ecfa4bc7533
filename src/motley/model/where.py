"""Where the tokens of one call stand: what every block is told beside the activations."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Where:
    """The same for all layers.

    positions [batch, seq]; cos, sin [batch or 1, seq, 1, rope/2]; documents [batch, seq] or None.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    documents: Tensor | None = None
