"""Rotary position embedding, interleaved as DeepSeek publishes it, with YaRN (V3 report, 2.1.1 and 4.3)."""

import math

import torch
from torch import Tensor

from motley.model.config import ModelConfig, Yarn


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN: 0.1 m ln(s) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Scale of the attention scores: qk_head_dim ** -0.5, times mscale squared under YaRN."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(dim: int, theta: float, yarn: Yarn | None) -> Tensor:
    """Radians per position for each of the dim/2 pairs, fp32 [dim/2]."""
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return plain

    def pair_that_turns(rotations: float) -> float:
        """Index of the pair that makes `rotations` full turns within the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / yarn.factor * stretched + plain * (1 - stretched)


class Rotary(torch.nn.Module):
    """Gives cos and sin of the angle of each position and pair."""

    inverse_frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        yarn = config.rope_scaling
        self.amplitude = 1.0
        if yarn:
            self.amplitude = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        self.register_buffer(
            "inverse_frequencies",
            inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, yarn),
            persistent=False,
        )

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [batch, seq] → cos, sin [batch, seq, 1, dim/2]; angles are computed in fp32."""
        angles = positions[..., None, None].float() * self.inverse_frequencies.float()
        return (angles.cos() * self.amplitude).to(dtype), (angles.sin() * self.amplitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of x [batch, seq, heads, dim] by its angle.

    Pairs lie side by side in the published weights, (x0, x1), (x2, x3), …; the result holds all first members and
    then all second members. Queries and keys are laid out alike, so their products do not see the difference.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
