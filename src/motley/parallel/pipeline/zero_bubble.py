"""Zero-bubble pipelines: a backward pass that computes gradients of inputs and queues those of weights.

    backward pass of a module     dx = dy W       at once: the stage before waits for it
                                  dW = dy^T x     queued; the schedule's action W computes it (`runner.order`)

The model is plain: `defer_weight_gradients` replaces the forward pass of its linear maps and experts from outside. Only
passes that autograd records are replaced; evaluation runs the model as it is.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from motley.model import fp8
from motley.model.experts import Experts
from motley.model.layers import MLP, Linear
from motley.model.products import add_gradient, grouped_product, product

Queue = list[Callable[[], None]]
"""Each entry adds the gradient of one weight to its .grad."""


def defer_weight_gradients(model: nn.Module) -> Queue:
    """Let backward passes of `model` leave the gradients of its linear maps and experts to the queue returned.

    The head is left alone: the loss computes its gradient with its values.
    """
    queue: Queue = []
    for module in model.modules():
        if module is getattr(model, "lm_head", None):
            continue
        if isinstance(module, Linear):
            module.forward = partial(_linear, module, module.forward, queue)
        elif isinstance(module, Experts):
            module.grouped = partial(_grouped, module, module.grouped, queue)
        if isinstance(module, MLP | Experts):  # its kernel computes all gradients in one go
            module.uses_kernel = partial(_uses_kernel, module.uses_kernel)
    return queue


def _uses_kernel(plain: Callable[[Tensor], bool], x: Tensor) -> bool:
    return not torch.is_grad_enabled() and plain(x)


def _linear(module: Linear, plain: Callable[[Tensor], Tensor], queue: Queue, input: Tensor) -> Tensor:
    """`Linear.forward`."""
    if not torch.is_grad_enabled():
        return plain(input)
    if module.fp8 and module.training:
        y = _apply(_Fp8Product, input.flatten(0, -2), module.weight, None, queue).unflatten(0, input.shape[:-1])
        return y if module.bias is None else y + module.bias.to(y.dtype)
    return plain(input) if module.bias is not None else _apply(_Product, input, module.weight, None, queue)


def _grouped(
    module: Experts,
    plain: Callable[[Tensor, Tensor, Tensor], Tensor],
    queue: Queue,
    rows: Tensor,
    weight: Tensor,
    ends: Tensor,
) -> Tensor:
    """`Experts.grouped`."""
    if not torch.is_grad_enabled():
        return plain(rows, weight, ends)
    return _apply(_Fp8Product if module.fp8 and module.training else _Product, rows, weight, ends, queue)


def _apply(function: type[Function], rows: Tensor, weight: Tensor, ends: Tensor | None, queue: Queue) -> Tensor:
    return function.apply(rows, weight, ends, queue)  # pyright: ignore[reportReturnType]


class _Product(Function):
    """Rows times a weight, transposed; with `ends`, runs of rows times one matrix each of a stack."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor | None, queue: Queue) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(rows, ends)
        ctx.weight, ctx.queue = weight, queue
        matrix = weight.to(rows.dtype).mT
        return product(rows, matrix) if ends is None else grouped_product(rows, matrix, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (rows, ends), weight = ctx.saved_tensors, ctx.weight
        if ends is None:
            ctx.queue.append(lambda: add_gradient(weight, product(grad.flatten(0, -2).t(), rows.flatten(0, -2))))
            return product(grad, weight.to(grad.dtype)), None, None, None
        grad = grad.contiguous()
        ctx.queue.append(lambda: add_gradient(weight, grouped_product(grad.t(), rows, ends)))
        return grouped_product(grad, weight.to(grad.dtype), ends), None, None, None


class _Fp8Product(Function):
    """`fp8.fp8_product`."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor | None, queue: Queue) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, operands = fp8.forward_product(rows, weight, ends)
        ctx.save_for_backward(*operands, ends)
        ctx.weight, ctx.queue = weight, queue
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (*operands, ends), weight = ctx.saved_tensors, ctx.weight
        ctx.queue.append(lambda: add_gradient(weight, fp8.gradient_of_weight(grad, operands, ends)))
        return fp8.gradient_of_rows(grad, operands, ends), None, None, None
