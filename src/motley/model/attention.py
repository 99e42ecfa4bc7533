"""Multi-head latent attention (DeepSeek-V2 report, 2.1; V3 report, 2.1.1).

Keys and values of all heads are expanded from one small latent c; position enters through a rotated part q^R of each
query and one rotated key k^R shared by the heads:

    c = norm(W_DKV x)        k^R = rope(W_KR x)           what the cache holds
    k = [W_UK c ; k^R]       v = W_UV c                   expanded form: training, prefill
    q = [q^C ; rope(q^R)]    score = q · k * scale

Absorbed form, for decoding (no key or value is ever expanded; one shared key of width rank + rope):

    score = (W_UK^T q^C) · c + q^R · k^R        out = W_UV (sum of attention * c)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motley.model import native
from motley.model.cache import LatentState
from motley.model.config import ModelConfig
from motley.model.layers import Linear, RMSNorm
from motley.model.native_attention import native_attention
from motley.model.products import wide
from motley.model.rotary import rotate, softmax_scale
from motley.model.softmax_attention import attend
from motley.model.where import Where

ABSORB_UP_TO = 8  # new tokens; beyond it, expanding the cache once costs less than the wider products of each query


class LatentAttention(nn.Module):
    """MLA with (q_lora_rank) or without compressed queries. Parameter names are the published ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.heads, self.nope, self.rope = heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.rank, self.value = config.kv_lora_rank, config.v_head_dim
        self.scale = softmax_scale(config)
        self.compressed = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)  # the published code leaves eps at 1e-6 here
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, self.rank + self.rope, bias)
        self.kv_a_layernorm = RMSNorm(self.rank, 1e-6)
        self.kv_b_proj = Linear(self.rank, heads * (self.nope + self.value))
        self.o_proj = Linear(heads * self.value, hidden, bias)

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LatentState:
        return LatentState(batch, capacity, self.rank, self.rope, dtype, device)

    def forward(self, x: Tensor, where: Where, state: LatentState | None = None) -> Tensor:
        """x [batch, seq, hidden] → [batch, seq, hidden]; with `state`, attends to what it holds as well."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compressed else self.q_proj(x)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope), dim=-1)
        latent = self.kv_a_layernorm(latent)
        if state is None and native.fits(x, self.nope, self.rope, self.value) and len(where.cos) == 1:
            shape = (self.heads, self.nope, self.rope, self.value)
            return self.o_proj(native_attention(q, self.kv_b_proj(latent), k_rope, where, shape, self.scale))
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split((self.nope, self.rope), dim=-1)
        q_rope = rotate(q_rope, where.cos, where.sin)
        k_rope = rotate(k_rope[:, :, None], where.cos, where.sin)  # [batch, seq, 1, rope]
        if state is None:
            return self.o_proj(self._expanded(q_nope, q_rope, latent, k_rope, documents=where.documents).flatten(2))
        state.append(where.positions, latent, k_rope[:, :, 0])
        held = where.held
        latent, k_rope = state.latent[:, :held].to(x.dtype), state.rope_key[:, :held, None].to(x.dtype)
        visible = torch.arange(held, device=x.device) <= where.positions[:, :, None]  # [batch, seq, held]
        form = self._absorbed if x.shape[1] <= ABSORB_UP_TO else self._expanded
        return self.o_proj(form(q_nope, q_rope, latent, k_rope, visible[:, None]).flatten(2))

    def _expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        visible: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Each head with keys and values of its own; returns [batch, seq, heads, value]."""
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split((self.nope, self.value), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.heads, -1)), dim=-1).transpose(1, 2)
        return attend(q, k, v.transpose(1, 2), self.scale, documents, visible).transpose(1, 2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, visible: Tensor) -> Tensor:
        """All heads against the latent itself; returns [batch, seq, heads, value]."""
        dtype = latent.dtype
        q_nope, q_rope, latent, k_rope = map(wide, (q_nope, q_rope, latent, k_rope))
        up = wide(self.kv_b_proj.weight.to(dtype)).view(self.heads, self.nope + self.value, self.rank)
        q_latent = torch.einsum("bshn,hnr->bshr", q_nope, up[:, : self.nope])
        q = torch.cat((q_latent, q_rope), dim=-1).transpose(1, 2)
        k = torch.cat((latent, k_rope[:, :, 0]), dim=-1)[:, None].expand(-1, self.heads, -1, -1)
        v = latent[:, None].expand(-1, self.heads, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale)
        return torch.einsum("bhsr,hvr->bshv", mixed, up[:, self.nope :]).to(dtype)
