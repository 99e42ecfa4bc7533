"""Linear, RMSNorm and the gated MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from motley.model import native
from motley.model.fp8 import fp8_product
from motley.model.native_mlp import native_mlp
from motley.model.products import wide

WORTH_PACKING = 64
"""Rows from which on the kernel of a dense MLP is faster than the plain path: it first packs all weights."""


class Linear(nn.Linear):
    """A linear map that computes in the dtype of its input; the weight itself stays in its own (fp32 in training).

    `fp8`, if set, rounds the operands of its products in training (`fp8.py`).
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.fp8 = False

    def forward(self, input: Tensor) -> Tensor:
        if self.fp8 and self.training:
            y = fp8_product(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])
            return y if self.bias is None else y + self.bias.to(y.dtype)
        bias = None if self.bias is None else wide(self.bias.to(input.dtype))
        return F.linear(wide(input), wide(self.weight.to(input.dtype)), bias).to(input.dtype)


def _plain(linear: Linear) -> bool:
    """Whether it is no more than a product with an fp32 weight."""
    rounded, weight = linear.fp8 and linear.training, linear.weight
    return not rounded and linear.bias is None and weight.dtype == torch.float32 and weight.is_contiguous()


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / rms(x) * weight with everything in fp32, in the words of the paper (Zhang and Sennrich 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """`rms_norm_reference` with few passes over memory: on a CPU, five times faster than autograd's many operations."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        statistics = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistics)
        inverse = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, inverse)
        return (x.to(statistics) * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        unit, wide = x.to(inverse.dtype) * inverse, grad.to(inverse.dtype)
        grad_weight = (wide * unit).flatten(0, -2).sum(0)
        wide = wide * weight
        along = (wide * unit).mean(-1, keepdim=True)
        return wide.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype), grad_weight.to(weight.dtype), None


class _NativeRMSNorm(torch.autograd.Function):
    """`rms_norm_reference` by the kernel, in one pass over each row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        y = torch.empty(x.shape, dtype=x.dtype)
        inverse = torch.empty(rows, dtype=torch.float32)
        native.call("norm_forward", x.dtype, rows, size, x, x.stride(-2), weight, eps, y, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(grad), torch.empty_like(weight)
        parts = torch.empty((rows + 63) // 64, size, dtype=torch.float32)
        native.call(
            "norm_backward", x.dtype, rows, size, x, x.stride(-2), weight, inverse, grad, grad_x, grad_weight, parts
        )
        return grad_x, grad_weight, None


def _evenly_spaced(x: Tensor) -> bool:
    """Whether x [..., size] is rows of numbers side by side, the rows equally far apart."""
    spacing = x.stride(-2) if x.dim() > 1 else 0
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if stride != spacing:
            return False
        spacing *= size
    return x.dim() > 1 and x.stride(-1) == 1


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight, statistics in fp32 (in fp64 where x is)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)
        if native.fits(x, x.shape[-1]) and self.weight.dtype == torch.float32 and _evenly_spaced(x):
            return _NativeRMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]
        return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]


class MLP(nn.Module):
    """Gated MLP (SwiGLU): down(silu(gate(x)) * up(x)); also the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.uses_kernel(x):
            return native_mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def uses_kernel(self, x: Tensor) -> bool:
        """Whether one kernel computes all three products of x [..., hidden]."""
        enough = x.numel() >= WORTH_PACKING * x.shape[-1]
        plain = all(_plain(linear) for linear in (self.gate_proj, self.up_proj, self.down_proj))
        return enough and plain and native.fits(x, *self.down_proj.weight.shape)
