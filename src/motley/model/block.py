"""One layer: attention, then experts (or a dense MLP), each with its norm before and its residual around.

A further generation brings another block class with the same call; embedding, MoE, head, checkpoint and cache do not
depend on MLA.
"""

from torch import Tensor, nn

from motley.model.attention import LatentAttention, Where
from motley.model.cache import LatentState
from motley.model.config import ModelConfig
from motley.model.layers import MLP, RMSNorm
from motley.model.moe import MoE, Routing


class Block(nn.Module):
    """Pre-norm transformer layer number `layer` of the V2/V3 architecture."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe_layer(layer) else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, where: Where, state: LatentState | None = None) -> tuple[Tensor, Routing | None]:
        """x [batch, seq, hidden] → the same shape, and what the router did (None in a dense layer)."""
        x = x + self.self_attn(self.input_layernorm(x), where, state)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(normed, None if where.documents is None else where.documents >= 0)
            return x + y, routing
        return x + self.mlp(normed), None
