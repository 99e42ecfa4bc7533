"""Causal softmax attention over heads: which implementation runs where.

In bf16 on a CPU, torch's fused kernel loses to plain batched matrix products over blocks of queries (8.8 against
33.8 ms forward and backward for 32 heads of 512 x 48 on two cores), as long as the probabilities fit in memory:

    queries     keys 0 ──────────▶
    block 0     ◣                     only what lies on or below the diagonal is computed;
    block 1     ■ ◣                   the probabilities of each block are kept for backward
    block 2     ■ ■ ◣
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from motley.model.products import wide

BLOCK = 128  # queries a block
LONGEST_BLOCKED = 2048  # tokens; beyond it, kept probabilities would outweigh everything else in memory


def causal_mask(documents: Tensor) -> Tensor:
    """May query i see key j? j <= i and the same document. documents [batch, seq] → bool [batch, 1, seq, seq]."""
    seq = documents.shape[1]
    earlier = torch.ones(seq, seq, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & earlier)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None, visible: Tensor | None) -> Tensor:
    """softmax(q k^T * scale) v, each query seeing only what it may.

    Args:
        q: [batch, heads, seq, qk_head_dim].
        k: [batch, heads, held, qk_head_dim].
        v: [batch, heads, held, v_head_dim].
        scale: factor of the scores.
        documents: [batch, seq] or None; attention stays within equal numbers.
        visible: bool [batch, 1, seq, held] for decoding; None means causal, held == seq.

    Returns [batch, heads, seq, v_head_dim].
    """
    narrow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and wide(q) is q
    if visible is None and narrow and q.shape[2] <= LONGEST_BLOCKED:
        return _BlockedAttention.apply(q, k, v, scale, documents)  # pyright: ignore[reportReturnType]
    if visible is None and documents is not None:
        visible = causal_mask(documents)
    value = v.shape[-1]
    if value < q.shape[-1]:  # torch's fused kernels want equal widths; zeros change nothing and cost less
        v = F.pad(v, (0, q.shape[-1] - value))
    out = F.scaled_dot_product_attention(
        wide(q), wide(k), wide(v), attn_mask=visible, is_causal=visible is None, scale=scale
    )
    return out[..., :value].to(q.dtype)


def _block_mask(start: int, end: int, documents: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor:
    """Mask to add to the scores of queries start … end against keys 0 … end: 0 or -inf, [rows or 1, block, end]."""
    mask = torch.zeros(end - start, end, dtype=dtype)
    mask[:, start:] = torch.full((end - start, end - start), -torch.inf, dtype=dtype).triu(1)
    if documents is None:
        return mask
    other = documents[:, start:end, None] != documents[:, None, :end]
    return mask.masked_fill(other, -torch.inf).repeat_interleave(heads, dim=0)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, heads, seq, _ = q.shape
        q, k, v = (q * scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = torch.empty(batch * heads, seq, v.shape[-1], dtype=v.dtype)
        kept: list[Tensor] = []
        for start in range(0, seq, BLOCK):
            end = min(start + BLOCK, seq)
            scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))
            if documents is None:
                scores[:, :, start:] += _block_mask(start, end, None, heads, q.dtype)[:, start:]
            else:
                scores += _block_mask(start, end, documents, heads, q.dtype)
            probabilities = torch.softmax(scores, dim=-1)
            out[:, start:end] = torch.bmm(probabilities, v[:, :end])
            kept.append(probabilities)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return out.unflatten(0, (batch, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *kept = ctx.saved_tensors
        heads = grad.shape[:2]
        grad = grad.flatten(0, 1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        start = 0
        for probabilities in kept:
            end = start + probabilities.shape[1]
            here = grad[:, start:end]
            grad_v[:, :end] += torch.bmm(probabilities.transpose(1, 2), here)
            upstream = torch.bmm(here, v[:, :end].transpose(1, 2))
            scores = torch._softmax_backward_data(upstream, probabilities, -1, probabilities.dtype)  # pyright: ignore[reportPrivateImportUsage]
            grad_q[:, start:end] = torch.bmm(scores, k[:, :end])
            grad_k[:, :end] += torch.bmm(scores.transpose(1, 2), q[:, start:end])
            start = end
        grad_q *= ctx.scale
        return *(g.unflatten(0, heads) for g in (grad_q, grad_k, grad_v)), None, None
