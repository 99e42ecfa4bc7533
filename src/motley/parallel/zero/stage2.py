"""What workers exchange while they compute: gradients to their owners (ZeRO 2), and weights from them (ZeRO 3).

All workers take part in the same number of turns, one micro-batch of each in a turn; the rows of a lane are spread
evenly over them. What travels in a turn is a list that is the same for all, so one who has no rows plays it without
computing:

    ZeRO 2   forward, backward: norm ·  block 1 ·  block 0 ·  embedding ·        ·  its gradient goes to the owners
    ZeRO 3   ↓ embedding  ↓ block 0  ↓ block 1  ↓ norm  ↓ head ·                 ↓  its weights come from the owners
             ↓ norm ·  ↓ block 1 ·  ↓ block 0 ·  ↓ embedding ·

A unit is what travels at once: the embedding, a block, a norm, the head, an MTP module. With ZeRO 3 its weights visit
for its forward pass, leave, and visit again for its backward pass, which computes the unit once more from its input.
The head's gradient is made with its loss already (`motley.train.loss`), so it is visited once.

Messages carry true values: who has a loss scale divides by it what it sends and what it adds to its own sums.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from motley.model import Transformer
from motley.model.moe import Routing
from motley.parallel.zero.flat_buffers import FlatBuffers, all_finite
from motley.parallel.zero.partition import ParameterShard, unit_of
from motley.train.step import predicted_loss

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Unit:
    """Parameters that travel at once, and their parts, in order."""

    module: str
    parts: tuple[ParameterShard, ...]

    @property
    def numbers(self) -> int:
        return sum(part.numbers for part in self.parts)

    def runs(self) -> Iterator[tuple[list[ParameterShard], slice]]:
        """Neighbours with the same owner, and where they lie in the unit."""
        start = 0
        for _, run in groupby(self.parts, lambda part: part.owner):
            parts = list(run)
            numbers = sum(part.numbers for part in parts)
            yield parts, slice(start, start + numbers)
            start += numbers

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of each."""
        for name, group in groupby(self.parts, lambda part: part.name):
            parts = list(group)
            yield name, (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def units_of(parts: Sequence[ParameterShard]) -> dict[str, Unit]:
    """All units of a model by the module they are, in the order of its parameters."""
    return {name: Unit(name, tuple(group)) for name, group in groupby(parts, lambda part: unit_of(part.name))}


Step = tuple[Literal["gather", "send"], Unit]


class Zero2:
    """ZeRO 2: each worker's gradient of a unit goes to the owners as soon as a backward pass has made it.

    Args:
        model: the whole model of this worker.
        shards: what it keeps.
        watched: take note where a gradient is not finite; only loss scales ask for it.

    Attributes:
        scale: this worker's loss scale in the step, a power of two.
        finite: whether all that it made of the step's gradient was, if `watched`; what others sent does not count.
    """

    def __init__(self, model: Transformer, shards: FlatBuffers, watched: bool) -> None:
        self.shards, self._watched = shards, watched
        self.scale, self.finite = 1.0, True
        self.units = units_of(shards.trained)
        self.parameters = dict(model.named_parameters())
        blocks = [unit for name, unit in self.units.items() if name.startswith("model.layers.")]
        self.trunk = [self.units[EMBEDDING], *blocks, self.units["model.norm"]]
        self.mtp = [unit for name, unit in self.units.items() if name.startswith("mtp.")]
        self.head = self.units.get(HEAD, self.units[EMBEDDING])  # tied: the same unit
        self.todo: deque[Step] = deque()
        self._connect(model)

    def begin_step(self, scale: float) -> None:
        self.scale, self.finite = scale, True

    def begin(self, backward: bool) -> None:
        """A turn; `backward`: it teaches, otherwise it only measures."""
        self.todo.extend(self._plan(backward))

    @torch.no_grad()
    def finish(self) -> None:
        """Do what is left of the turn: everything, for a worker that had no rows."""
        while self.todo:
            self._do(*self.todo.popleft())

    def predicted_loss(self, model: Transformer, main: Tensor, further: Sequence[Tensor], *rest: Any) -> Tensor:
        """`motley.train.step.predicted_loss`, with the head at hand."""
        return predicted_loss(model, main, further, *rest, scale=self.scale)

    def _plan(self, backward: bool) -> list[Step]:
        head = [self.head] if self.head.module == HEAD else []
        order = [*head, *reversed(self.mtp), *reversed(self.trunk)]
        return [("send", unit) for unit in order] if backward else []

    def _connect(self, model: Transformer) -> None:
        for unit in self.units.values():
            for parameter in self._of(unit):
                parameter.register_post_accumulate_grad_hook(self._arrived)

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        """A gradient is made: send what is complete, in the order of all."""
        while self.todo and all(p.grad is not None for p in self._of(self.todo[0][1])):
            self._do(*self.todo.popleft())

    def _do(self, action: Literal["gather", "send"], unit: Unit) -> None:
        """What this worker does for the others at a step of the list, and for itself where it computes."""
        self._send(unit)

    def _of(self, unit: Unit) -> list[nn.Parameter]:
        return [self.parameters[name] for name, _ in unit.parameters()]

    def _send(self, unit: Unit) -> None:
        """Add this worker's gradient of a unit (nothing, where it made none) to the owners', and forget it."""
        flat = self._flat_gradient(unit)
        if flat is not None and self._watched:
            self.finite = self.finite and all_finite([flat])
        if flat is not None and self.scale != 1:
            flat.mul_(1 / self.scale)  # in place: nobody else needs it any more
        for parameter in self._of(unit):
            parameter.grad = None
        for run, place in unit.runs():
            owner, holders = run[0].owner, run[0].holders
            if owner == self.shards.comm.rank:
                sent = self.shards.gradients.span(run)
                self.shards.buckets.settle(sent)
                if flat is not None:
                    sent += flat[place]
            elif flat is not None:
                sent = flat[place]
            else:
                sent = self.shards.gradients.flat.new_zeros(place.stop - place.start)
            self.shards.buckets.sum(sent, holders, owner)

    def _flat_gradient(self, unit: Unit) -> Tensor | None:
        parameters = self._of(unit)
        if all(parameter.grad is None for parameter in parameters):
            return None
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return grads[0].reshape(-1) if len(grads) == 1 else torch.cat([grad.reshape(-1) for grad in grads])


class Zero3(Zero2):
    """ZeRO 3: besides, weights are here only while a unit computes."""

    def predicted_loss(self, model: Transformer, main: Tensor, further: Sequence[Tensor], *rest: Any) -> Tensor:
        def loss(main: Tensor, *further: Tensor) -> Tensor:
            return predicted_loss(model, main, further, *rest, scale=self.scale)

        if torch.is_grad_enabled():
            return _Ending.apply(self, loss, main, *further)  # pyright: ignore[reportReturnType]
        with self.visit(self.head):
            return loss(main, *further)

    @contextmanager
    def visit(self, unit: Unit) -> Iterator[None]:
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

    def _plan(self, backward: bool) -> list[Step]:
        if not backward:
            return [("gather", unit) for unit in (*self.trunk, self.head)]
        passes = list(self.trunk)
        for module in self.mtp:
            passes += [self.trunk[0], module]  # each depth embeds the tokens further on
        steps: list[Step] = [("gather", unit) for unit in (*passes, self.head)]
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
        with self.visit(unit):
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
    def forward(ctx, visits: Zero3, unit: Unit, run: Callable[..., Any], anchor: Tensor, *inputs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        ctx.visits, ctx.unit, ctx.run = visits, unit, run
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        with visits.visit(unit):
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
        with ctx.visits.visit(ctx.unit):
            with torch.enable_grad():
                outputs = _tensors(ctx.run(*inputs))
            pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
            del outputs, pairs
            ctx.visits.give(ctx.unit)
        return None, None, None, None, *(value.grad if isinstance(value, Tensor) else None for value in inputs)


class _Ending(torch.autograd.Function):
    """The loss: its backward pass, times the loss scale, is done with its forward pass, while the head is here."""

    @staticmethod
    def forward(ctx, visits: Zero3, loss: Callable[..., Tensor], *states: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        own = [state.detach().requires_grad_() for state in states]
        with visits.visit(visits.head):
            with torch.enable_grad():
                total = loss(*own)
            total.backward(torch.full_like(total, visits.scale))
            visits.give(visits.head)
        ctx.scale = visits.scale
        ctx.save_for_backward(*(state.grad for state in own))
        return total.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        # `grad` is scaled already, and fp16 could not even hold some scales.
        return None, None, *(saved * (grad / ctx.scale).to(saved.dtype) for saved in ctx.saved_tensors)
