"""The outer optimizer: what islands learned in a round, averaged, is one step of the model that they share.

    an island's change     shared model - its own                     (a gradient of sorts: DiLoCo, arXiv 2311.08105)
    the outer gradient     changes weighed by the tokens behind them
    the step               SGD with Nesterov momentum

The model is cut into fragments that travel one by one (Streaming DiLoCo, arXiv 2501.18512): layers dealt out in turn,
so that each holds some from every depth, and whatever else there is to the lightest. Each is a flat vector: parameters,
then the routers' biases, which are no weights but counters of load: they are averaged and nothing more.

All islands take the same step from the same numbers. Every operation here is one that rounds once, so that machines of
different make arrive at the same bits.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from motley.model import ModelConfig
from motley.parallel.zero.partition import unit_of


@dataclass(frozen=True)
class Fragment:
    """Tensors that travel together.

    Attributes:
        shapes: of the parameters, by name, in order.
        biases: of the routers' biases, which follow them.
    """

    shapes: Mapping[str, torch.Size]
    biases: Mapping[str, torch.Size]

    @property
    def parameters(self) -> int:
        """How many numbers are parameters."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def names(self) -> list[str]:
        return [*self.shapes, *self.biases]

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One fp32 vector of its tensors, in the host's memory, where islands meet."""
        return torch.cat([tensors[name].detach().reshape(-1).float() for name in self.names]).cpu()

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """The inverse of `flat`: views into the vector."""
        shapes = {**self.shapes, **self.biases}
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def fragments_of(
    config: ModelConfig, shapes: Mapping[str, torch.Size], biases: Mapping[str, torch.Size], count: int
) -> list[Fragment]:
    """Parameters and routers' biases (by name) in `count` fragments; the same on every island."""
    units: dict[str, list[str]] = {}
    for name in (*shapes, *biases):
        units.setdefault(unit_of(name), []).append(name)
    weights = {unit: sum(shapes[name].numel() for name in names if name in shapes) for unit, names in units.items()}
    held: list[list[str]] = [[] for _ in range(count)]
    layers = [f"model.layers.{layer}" for layer in range(config.num_hidden_layers)]
    for place, unit in enumerate(unit for unit in layers if unit in units):
        held[place % count].append(unit)
    for unit in sorted((unit for unit in units if unit not in layers), key=lambda unit: -weights[unit]):
        min(held, key=lambda own: sum(weights[one] for one in own)).append(unit)
    fragments = []
    for own in held:
        names = [name for unit in own for name in units[unit]]
        parameters = {name: shapes[name] for name in names if name in shapes}
        fragments.append(Fragment(parameters, {name: biases[name] for name in names if name in biases}))
    return [fragment for fragment in fragments if fragment.parameters]


class OuterOptimizer:
    """The model that islands share, and the optimizer that moves it.

    Attributes:
        fragments: of the model.
        weights: of each fragment, flat.
        momentum: of each fragment's parameters, flat.
    """

    def __init__(
        self, fragments: Sequence[Fragment], tensors: Mapping[str, Tensor], learning_rate: float, momentum: float
    ) -> None:
        self.fragments = list(fragments)
        self.learning_rate, self.keeps = learning_rate, momentum
        self.weights = [fragment.flat(tensors) for fragment in fragments]
        self.momentum = [torch.zeros(fragment.parameters) for fragment in fragments]

    def step(self, number: int, changes: Sequence[Tensor], tokens: Sequence[float]) -> None:
        """Move fragment `number`.

        Args:
            number: of the fragment.
            changes: of each island: the shared fragment minus its own, flat.
            tokens: that each island learned from since it last sent this fragment.
        """
        gradient = torch.zeros_like(self.weights[number])
        for change, count in zip(changes, tokens, strict=True):
            gradient += change * (count / max(sum(tokens), 1.0))
        count = self.fragments[number].parameters
        weights, momentum, outer = self.weights[number], self.momentum[number], gradient[:count]
        momentum *= self.keeps
        momentum += outer
        outer += momentum * self.keeps
        weights[:count] -= outer * self.learning_rate
        weights[count:] -= gradient[count:]

    def tensors(self) -> dict[str, Tensor]:
        """The shared model's tensors by name: views, as long as nothing moves it."""
        return {
            name: tensor
            for fragment, flat in zip(self.fragments, self.weights, strict=True)
            for name, tensor in fragment.named(flat).items()
        }

    def digest(self, number: int) -> int:
        """A fingerprint of a fragment, exact as a float64."""
        flat = self.weights[number].contiguous().view(torch.uint8).numpy()
        return int.from_bytes(hashlib.sha256(flat.data).digest()[:6], "big")
