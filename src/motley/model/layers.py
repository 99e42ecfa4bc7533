"""The three layers everything else is made of: Linear, RMSNorm and the gated MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from motley.model import native
from motley.model.fp8 import fp8_product
from motley.model.native_mlp import native_mlp
from motley.model.products import add_gradient, product, wide

WORTH_PACKING = 64
"""Rows from which on a dense MLP's kernel is faster than the plain path: it rearranges all weights first."""


class Linear(nn.Linear):
    """A linear map that computes in the dtype of its input; the weight itself stays in its own (fp32 in training).

    `later`, if set, receives what is left to do for the weight's gradient after each backward pass (zero-bubble
    pipelines do it when there is time); None: everything at once. `fp8`, if set, rounds the operands of its products in
    training (`fp8.py`).
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.later: list[Callable[[], None]] | None = None
        self.fp8 = False

    def forward(self, input: Tensor) -> Tensor:
        if self.fp8 and self.training:
            y = fp8_product(input.flatten(0, -2), self.weight, later=self.later).unflatten(0, input.shape[:-1])
            return y if self.bias is None else y + self.bias.to(y.dtype)
        if self.later is not None and self.bias is None and torch.is_grad_enabled():
            return _LaterLinear.apply(input, self.weight, self.later)  # pyright: ignore[reportReturnType]
        bias = None if self.bias is None else wide(self.bias.to(input.dtype))
        return F.linear(wide(input), wide(self.weight.to(input.dtype)), bias).to(input.dtype)


def _plain(linear: Linear) -> bool:
    """Whether it is no more than a product with an fp32 weight whose gradient is made at once."""
    rounded, later = linear.fp8 and linear.training, linear.later is not None and torch.is_grad_enabled()
    weight = linear.weight
    return not (rounded or later) and linear.bias is None and weight.dtype == torch.float32 and weight.is_contiguous()


class _LaterLinear(torch.autograd.Function):
    """A linear map whose backward pass makes the gradient of its input and leaves the weight's for later."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, later: list[Callable[[], None]]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        ctx.weight, ctx.later = weight, later
        return product(x, weight.to(x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,), weight = ctx.saved_tensors, ctx.weight
        ctx.later.append(lambda: add_gradient(weight, product(grad.flatten(0, -2).t(), x.flatten(0, -2))))
        return product(grad, weight.to(grad.dtype)), None, None


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / rms(x) * weight with everything in fp32, in the words of the paper (Zhang and Sennrich 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The same with few passes over memory: on a CPU, five times faster than autograd's chain of small operations."""

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
    """The same in one pass over each row."""

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
        maps = (self.gate_proj, self.up_proj, self.down_proj)
        enough = x.numel() >= WORTH_PACKING * x.shape[-1]
        if enough and all(map(_plain, maps)) and native.fits(x, *self.down_proj.weight.shape):
            return native_mlp(x, *(linear.weight for linear in maps))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
