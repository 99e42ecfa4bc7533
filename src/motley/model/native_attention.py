"""The attention kernel as a function with a gradient: rotation, heads, mask and softmax of the expanded form in one.

Equal to `rotate` and `attend` after `LatentAttention._expanded`'s reshaping, for sequences of any length: probabilities
are never kept, backward computes them again from the logarithms of their sums.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from motley.model import native
from motley.model.where import Where

Shape = tuple[int, int, int, int]


def native_attention(q: Tensor, kv: Tensor, k_rope: Tensor, where: Where, shape: Shape, scale: float) -> Tensor:
    """Causal attention of queries and keys in fp32 or bf16 that are not rotated yet → [batch, seq, heads * value].

    Args:
        q: [batch, seq, heads * (nope + rope)].
        kv: [batch, seq, heads * (nope + value)].
        k_rope: [batch, seq, rope], the part of the keys that all heads share; rows may lie apart.
        where: cos and sin for all rows alike; attention stays within its documents.
        shape: (heads, nope, rope, value).
        scale: factor of the scores.
    """
    return _Attention.apply(q, kv, k_rope, where.cos, where.sin, where.documents, shape, scale)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        q: Tensor,
        kv: Tensor,
        k_rope: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Tensor | None,
        shape: Shape,
        scale: float,
    ) -> Tensor:
        (batch, seq), (heads, *_, value) = q.shape[:2], shape
        q, kv = q.contiguous(), kv.contiguous()
        if k_rope.stride(2) != 1 or k_rope.stride(0) != seq * k_rope.stride(1):
            k_rope = k_rope.contiguous()
        cos, sin = cos.to(q.dtype).contiguous(), sin.to(q.dtype).contiguous()
        documents = None if documents is None else documents.long().contiguous()
        out = q.new_empty(batch, seq, heads * value)
        logs = torch.empty(batch, heads, seq, dtype=torch.float32)
        ctx.sizes = (batch, seq, *shape, k_rope.stride(1), scale)
        native.call("attention_forward", q.dtype, *ctx.sizes, q, kv, k_rope, cos, sin, documents, out, logs)
        ctx.save_for_backward(q, kv, k_rope, cos, sin, documents, out, logs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, seq, heads, _, rope, *_ = ctx.sizes
        saved = ctx.saved_tensors  # read once: with recomputation each reading would compute them again
        q, kv, k_rope, *_ = saved
        grads = torch.empty_like(q), torch.empty_like(kv), k_rope.new_empty(k_rope.shape)
        by_head = torch.empty(batch, heads, seq, rope, dtype=torch.float32)
        native.call("attention_backward", q.dtype, *ctx.sizes, *saved, grad.contiguous(), *grads, by_head)
        return *grads, None, None, None, None, None
