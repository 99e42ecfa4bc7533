"""One layer: attention, then experts (or a dense MLP), each with its norm before and its residual around.

Another architecture adds a class with the same `forward` and `new_state` and a line in `make_block`; embedding,
experts, head, checkpoint and cache do not depend on the kind of attention.
"""

import torch
from torch import Tensor, nn

from motley.model.attention import LatentAttention
from motley.model.cache import LatentState
from motley.model.config import ModelConfig
from motley.model.layers import MLP, RMSNorm
from motley.model.moe import MoE, Routing
from motley.model.where import Where


class Block(nn.Module):
    """Pre-norm transformer layer number `layer` of the V2/V3 architecture; parameter names are the published ones."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe_layer(layer) else MLP(config.hidden_size, config.intermediate_size)

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LatentState:
        """An empty cache of this layer for `batch` rows of at most `capacity` tokens."""
        return self.self_attn.new_state(batch, capacity, dtype, device)

    def forward(self, x: Tensor, where: Where, state: LatentState | None = None) -> tuple[Tensor, Routing | None]:
        """x [batch, seq, hidden] → the same shape, and what the router did (None in a dense layer).

        `state` is what `new_state` made.
        """
        x = x + self.self_attn(self.input_layernorm(x), where, state)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(normed, where.routed)
            return x + y, routing
        return x + self.mlp(normed), None


def make_block(config: ModelConfig, layer: int) -> Block:
    """Layer number `layer` of the architecture that `config` names; MTP's layers count on from num_hidden_layers."""
    return Block(config, layer)
