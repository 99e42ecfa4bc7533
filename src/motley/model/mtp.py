"""Multi-token prediction (V3 report, 2.2): module k looks one token further than the one before it.

    h^k_i = block( W [ norm(Emb(t_{i+k})) ; norm(h^{k-1}_i) ] )      predicts t_{i+k+1} through the shared head

The embedding comes first and h^0 is the main model's output after its final norm: the layout of the published weights.
"""

import torch
from torch import Tensor, nn

from motley.model.block import make_block
from motley.model.config import ModelConfig
from motley.model.layers import Linear, RMSNorm
from motley.model.moe import Routing
from motley.model.where import Where


def has_further(input_ids: Tensor, documents: Tensor | None, depth: int) -> Tensor:
    """bool [batch, seq]: whether the token `depth` further stands in the row, in the same document, and is no padding.

    documents [batch, seq] or None: the whole row is one.
    """
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    if documents is None:
        found[:, : max(0, input_ids.shape[1] - depth)] = True
    elif depth < input_ids.shape[1]:
        found[:, :-depth] = (documents[:, depth:] == documents[:, :-depth]) & (documents[:, depth:] >= 0)
    return found


class MTPModule(nn.Module):
    """One further depth of prediction; embedding and head are the main model's."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = make_block(config, config.num_hidden_layers + depth)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embedded: Tensor, hidden: Tensor, where: Where) -> tuple[Tensor, Routing | None]:
        """embedded (of the tokens one further) and hidden, both [batch, seq, hidden] → normed h^k, same shape."""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        x, routing = self.block(x, where)
        return self.norm(x), routing
