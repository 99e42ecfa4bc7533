"""ZeRO-2: gradients are reduced to their owners while the backward pass still runs, unit by unit.

All ranks compute the same number of micro-batches, in step; the rows of a replica are divided evenly among them. The
messages of a micro-batch are a list that is the same for all, so a rank without rows takes part without computing:

    backward: norm ·  block 1 ·  block 0 ·  embedding ·        ·  its gradient is reduced to the owners

A unit is what travels at once: the embedding, a block, a norm, the head, an MTP module. Messages carry true values: a
rank with a loss scale divides by it what it sends and what it adds to its own sums.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from motley.model import Transformer
from motley.parallel.zero.flat_buffers import FlatBuffers
from motley.parallel.zero.partition import ParameterShard, unit_of
from motley.train.step import all_finite, predicted_loss

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Unit:
    """Parameters that travel at once, and their shards, in order."""

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
    """ZeRO 2: each rank's gradient of a unit goes to the owners as soon as a backward pass has made it.

    Args:
        model: the whole model of this rank.
        shards: what it keeps.
        watched: take note where a gradient is not finite; only loss scales ask for it.

    Attributes:
        scale: this rank's loss scale in the step, a power of two.
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
        """Begin a micro-batch; `backward`: with a backward pass, else only to evaluate."""
        self.todo.extend(self._plan(backward))

    @torch.no_grad()
    def finish(self) -> None:
        """Exchange what is left of the micro-batch: everything, for a rank that had no rows."""
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
        """What this rank does for the others at a step of the list, and for itself where it computes."""
        self._send(unit)

    def _of(self, unit: Unit) -> list[nn.Parameter]:
        return [self.parameters[name] for name, _ in unit.parameters()]

    def _send(self, unit: Unit) -> None:
        """Add this rank's gradient of a unit (nothing, where it made none) to the owners', and forget it."""
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
