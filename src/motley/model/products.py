"""Matrix products in the dtype of their operands, and where the gradient of a weight goes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from motley.model import native


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype to multiply in: fp32 where the CPU has no instructions for its own; a GPU sums in fp32 as well.

    PyTorch's own products of fp16 on CPUs take fifty times as long as bf16's, and those of bf16 on a CPU without such
    instructions some hundreds of times as long as fp32's. The result is rounded once, as theirs is.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float16, torch.bfloat16):
        return x
    return x if x.dtype == torch.bfloat16 and native.multiplies_bf16() else x.float()


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
