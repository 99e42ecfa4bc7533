"""ZeRO-3: besides, weights are gathered from their owners for a unit's forward pass and again for its backward pass.

    ↓ embedding  ↓ block 0  ↓ block 1  ↓ norm  ↓ head ·        ↓  all-gather of the unit's weights
    ↓ norm ·  ↓ block 1 ·  ↓ block 0 ·  ↓ embedding ·          ·  its gradient is reduced to the owners

Between the two passes a unit's weights are freed; its backward pass computes the unit once more from its input. The
head's gradient is made together with its loss (`motley.train.loss`), so the head is gathered once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from motley.model import Transformer
from motley.model.moe import Routing
from motley.parallel.zero.stage2 import Unit, Zero2
from motley.train.step import predicted_loss

ZeroStep = tuple[Literal["gather", "send"], Unit]


class Zero3(Zero2):
    """ZeRO 3: besides, weights are here only while a unit computes."""

    def predicted_loss(self, model: Transformer, main: Tensor, further: Sequence[Tensor], *rest: Any) -> Tensor:
        def loss(main: Tensor, *further: Tensor) -> Tensor:
            return predicted_loss(model, main, further, *rest, scale=self.scale)

        if torch.is_grad_enabled():
            return _Ending.apply(self, loss, main, *further)  # pyright: ignore[reportReturnType]
        with self.gathered(self.head):
            return loss(main, *further)

    @contextmanager
    def gathered(self, unit: Unit) -> Iterator[None]:
        """While inside, the unit's weights are here."""
        self._expect("gather", unit)
        flat = self._gather(unit)
        sizes = [math.prod(shape) for _, shape in unit.parameters()]
        for (name, shape), weight in zip(unit.parameters(), flat.split(sizes), strict=True):
            self.parameters[name].data = weight.view(shape)
        yield
        for parameter in self._of(unit):
            parameter.data = parameter.new_empty(0)

    def give(self, unit: Unit) -> None:
        """Send the gradient of a unit that was just made."""
        self._expect("send", unit)
        self._send(unit)

    def _plan(self, backward: bool) -> list[ZeroStep]:
        if not backward:
            return [("gather", unit) for unit in (*self.trunk, self.head)]
        passes = list(self.trunk)
        for module in self.mtp:
            passes += [self.trunk[0], module]  # each depth embeds the tokens further on
        steps: list[ZeroStep] = [("gather", unit) for unit in (*passes, self.head)]
        steps.append(("send", self.head))
        for unit in reversed(passes):
            steps.extend([("gather", unit), ("send", unit)])
        return steps

    def _connect(self, model: Transformer) -> None:
        model.recompute = False  # every unit is computed again as it is
        self._anchor = torch.zeros(
            (), device=self.shards.comm.device, requires_grad=True
        )  # so that the embedding, too, has a backward pass
        for unit in (*self.trunk, *self.mtp):
            module = model.get_submodule(unit.module)
            module.forward = partial(self._run, unit, module.forward)  # its name and place stay

    def _run(self, unit: Unit, forward: Callable[..., Any], *inputs: Any) -> Any:
        """A unit's forward pass, in place of its module's own."""
        if torch.is_grad_enabled():
            x, *routing = _Passing.apply(self, unit, forward, self._anchor, *inputs)  # pyright: ignore
            routed = Routing(*routing) if routing else None
            return x if unit in (self.trunk[0], self.trunk[-1]) else (x, routed)
        with self.gathered(unit):
            return forward(*inputs)

    def _expect(self, action: Literal["gather", "send"], unit: Unit) -> None:
        planned = self.todo.popleft()
        if planned != (action, unit):
            raise AssertionError(f"{action} {unit.module} where the turn has {planned[0]} {planned[1].module}")

    def _do(self, action: Literal["gather", "send"], unit: Unit) -> None:
        if action == "gather":
            self._gather(unit)
        else:
            self._send(unit)

    def _gather(self, unit: Unit) -> Tensor:
        """The unit's weights, whole and flat."""
        flat = self.shards.weights.flat.new_empty(unit.numbers)
        for run, place in unit.runs():
            if run[0].owner == self.shards.comm.rank:
                flat[place].copy_(self.shards.weights.span(run))
            self.shards.buckets.spread(flat[place], run[0].holders, run[0].owner)
        self.shards.buckets.finish()
        return flat


def _tensors(result: Any) -> tuple[Tensor, ...]:
    """What a module returned, as tensors only: its output, and what its router did."""
    if isinstance(result, Tensor):
        return (result,)
    x, routing = result
    return (x,) if routing is None else (x, routing.counts, routing.balance, routing.tokens)


class _Passing(torch.autograd.Function):
    """A unit on its way: nothing of its weights is kept for the backward pass."""

    @staticmethod
    def forward(ctx, zero: Zero3, unit: Unit, run: Callable[..., Any], anchor: Tensor, *inputs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        ctx.zero, ctx.unit, ctx.run = zero, unit, run
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        with zero.gathered(unit):
            return _tensors(run(*inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if other is None else other for other in ctx.others]
        inputs = [
            value.detach().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value
            for value in inputs
        ]
        with ctx.zero.gathered(ctx.unit):
            with torch.enable_grad():
                outputs = _tensors(ctx.run(*inputs))
            pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
            del outputs, pairs
            ctx.zero.give(ctx.unit)
        return None, None, None, None, *(value.grad if isinstance(value, Tensor) else None for value in inputs)


class _Ending(torch.autograd.Function):
    """The loss: its backward pass, times the loss scale, is done with its forward pass, while the head is here."""

    @staticmethod
    def forward(ctx, zero: Zero3, loss: Callable[..., Tensor], *states: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        own = [state.detach().requires_grad_() for state in states]
        with zero.gathered(zero.head):
            with torch.enable_grad():
                total = loss(*own)
            total.backward(torch.full_like(total, zero.scale))
            zero.give(zero.head)
        ctx.scale = zero.scale
        ctx.save_for_backward(*(state.grad for state in own))
        return total.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        # `grad` is scaled already, and fp16 could not even hold some scales.
        return None, None, *(saved * (grad / ctx.scale).to(saved.dtype) for saved in ctx.saved_tensors)
