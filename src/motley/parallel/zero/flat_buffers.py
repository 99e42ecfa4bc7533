"""The shards of the model that one rank keeps, and how gradients and updates reach the ranks that need them.

    gradient   ZeRO 0: holders all-reduce        from 1 on: holders reduce to the owner (from 2 on during the passes)
    update     every holder by itself            the owner, which then broadcasts the new weights (3: when needed)

What a rank keeps lies side by side in one tensor for weights and one for gradients. A run of neighbouring shards with
the same holders and owner travels from there as it is.
"""

import math
from collections.abc import Callable, Iterable
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn

from motley.model import ModelConfig, Transformer
from motley.parallel.buckets import Buckets
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Layout
from motley.parallel.zero.partition import ParameterShard, kept, shards_of
from motley.train.optimizer import OptimizerName
from motley.train.step import all_finite, clip_factor, squared_length


class FlatBuffer:
    """Memory for shards, side by side in the order given."""

    def __init__(self, parts: list[ParameterShard], device: torch.device) -> None:
        self.parts = parts
        ends = list(accumulate((part.numbers for part in parts), initial=0))
        self.flat = torch.zeros(ends[-1], device=device)
        self._start = {part.label: start for part, start in zip(parts, ends[:-1], strict=True)}

    def __contains__(self, part: ParameterShard) -> bool:
        return part.label in self._start

    def span(self, parts: list[ParameterShard]) -> Tensor:
        """Neighbouring shards as one flat tensor."""
        start = self._start[parts[0].label]
        return self.flat[start : start + sum(part.numbers for part in parts)]

    def of(self, part: ParameterShard) -> Tensor:
        return self.span([part]).view(part.shape)


def runs_of(parts: Iterable[ParameterShard], rank: int, by_owner: bool) -> list[list[ParameterShard]]:
    """Neighbours that `rank` shares with the same others, and with `by_owner` for the same owner.

    Neighbours among all shards: then they are neighbours at each of their holders.
    """
    runs = groupby(parts, lambda part: (part.holders, part.owner if by_owner else None))
    return [list(run) for (holders, _), run in runs if rank in holders and len(holders) > 1]


class FlatBuffers:
    """This rank's parameter shards: their weights and gradients, and what it updates itself.

    Args:
        model: this rank's stage as `build_stage` makes it, which gets its memory here.
        config: of the whole model.
        layout: who holds what.
        comm: all ranks.
        trained: whether the loss depends on a parameter; the others keep no gradient and stay as they are.
        optimizer: that updates them.

    Attributes:
        here: shards whose weights this rank keeps.
        kept: shards whose optimizer state it keeps.
        trained: of all shards, those that the loss depends on.
    """

    def __init__(
        self,
        model: Transformer,
        config: ModelConfig,
        layout: Layout,
        comm: Communicator,
        trained: Callable[[str], bool],
        optimizer: OptimizerName,
    ) -> None:
        self.comm, self.zero = comm, layout.zero
        self.all_parts = shards_of(config, layout, optimizer)
        self.names = {part.name for part in self.all_parts}
        comm.form({part.holders for part in self.all_parts})
        self.trained = [part for part in self.all_parts if trained(part.name)]
        in_order = self.trained + [part for part in self.all_parts if not trained(part.name)]
        self.kept = kept(in_order, "optimizer", self.zero, comm.rank)
        self.here = kept(in_order, "weights", self.zero, comm.rank)
        self.buckets = Buckets(comm)
        self._shared = runs_of(self.trained, comm.rank, by_owner=self.zero > 0)
        self.weights = FlatBuffer(self.here, comm.device)
        self.gradients = FlatBuffer(kept(self.trained, "gradients", self.zero, comm.rank), comm.device)
        self._views = {part.label: nn.Parameter(self.weights.of(part)) for part in self.here}
        self._furnish(model)

    def view(self, part: ParameterShard) -> nn.Parameter:
        """The weights of a shard that this rank keeps."""
        return self._views[part.label]

    def clear(self) -> None:
        """Forget the last step's gradient."""
        self.gradients.flat.zero_()

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply the gradient that this rank keeps."""
        self.gradients.flat.mul_(factor)

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether all of the gradient that this rank keeps is."""
        return all_finite([self.gradients.flat])

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradient of each shard over its holders; with ZeRO only the owner knows the sum afterwards."""
        for run in self._shared if self.zero < 2 else []:  # from 2 on it is under way already
            owner = run[0].owner if self.zero else None
            self.buckets.sum(self.gradients.span(run), run[0].holders, owner)
        self.buckets.finish()

    @torch.no_grad()
    def norm(self) -> float:
        """Length of the whole gradient, the same on every rank; each shard counts once, at its owner."""
        owned = [self.view(part).grad for part in self.trained if part.owner == self.comm.rank]
        total = squared_length([grad for grad in owned if grad is not None])
        return math.sqrt(float(self.comm.sum(self.comm.outgoing(total))))

    @torch.no_grad()
    def clip(self, largest: float, norm: float) -> None:
        """Shorten a gradient of length `norm` to `largest`."""
        if norm > largest:
            self.scale(clip_factor(largest, norm))

    @torch.no_grad()
    def broadcast_weights(self) -> None:
        """After the owners' update: new weights for all holders."""
        if self.zero in (1, 2):
            for run in self._shared:
                self.buckets.spread(self.weights.span(run), run[0].holders, run[0].owner)
            self.buckets.finish()

    def _furnish(self, model: Transformer) -> None:
        """Point the model's parameters, and the views of their shards, at the flat buffers."""
        for part in self.here:
            if part in self.gradients:
                self._views[part.label].grad = self.gradients.of(part)
        own: dict[str, list[ParameterShard]] = {}
        for part in self.here:
            own.setdefault(part.name, []).append(part)
        made: dict[int, nn.Parameter] = {}
        for name, shape in list(model.named_parameters()):
            if self.zero == 3:  # its weights come when they are needed
                made[id(shape)] = nn.Parameter(torch.empty(0, device=self.comm.device))
                continue
            made[id(shape)] = there = nn.Parameter(self.weights.span(own[name]).view(shape.shape))
            if self.zero < 2 and own[name][0] in self.gradients:
                there.grad = self.gradients.span(own[name]).view(shape.shape)
        for module in model.modules():
            for name, shape in list(module.named_parameters(recurse=False)):
                setattr(module, name, made[id(shape)])
