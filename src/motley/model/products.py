"""Matrix products in the dtype of their operands, and where the gradient of a weight goes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """What a product is computed from: fp16 on a CPU goes through fp32, as its sums do inside a GPU.

    PyTorch's own fp16 products for CPUs take fifty times as long as bf16's.
    """
    return x.float() if x.dtype == torch.float16 and x.device.type == "cpu" else x


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in their dtype."""
    return (wide(left) @ wide(right)).to(left.dtype)


def grouped_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Products of runs that end at `ends`, in their dtype: of left's rows with one matrix of `right` each, or, where
    both are matrices, of left's columns with right's rows: one matrix each."""
    return F.grouped_mm(wide(left), wide(right), offs=ends).to(left.dtype)


def add_gradient(weight: Tensor, gradient: Tensor) -> None:
    """Accumulate into weight.grad as autograd would."""
    gradient = gradient.to(weight.dtype)
    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
