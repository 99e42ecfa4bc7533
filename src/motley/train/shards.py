"""Who holds which part of the model, and how gradients and updates reach everyone who needs them.

    part       a parameter, or some experts of a stack, or some rows of a vocabulary table
    holders    the workers that compute with it: one of every lane (of every group of lanes that share experts)
    owner      the holder that keeps its optimizer state (ZeRO 1), in proportion to the workers' memory

    gradient   ZeRO 0: holders all-reduce        ZeRO 1: holders reduce to the owner
    update     every holder by itself            the owner, which then broadcasts the new weights

Muon needs whole matrices, so parts are never finer than a matrix; the split follows the shares as well as that allows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from motley.model import ModelConfig, Transformer
from motley.train.crew import Crew
from motley.train.layout import Layout, Team

TABLE_PARTS = 16  # a vocabulary table is cut into so many parts: AdamW updates number by number
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of the first dimension of parameter `name`."""

    name: str
    start: int
    stop: int
    numbers: int
    holders: tuple[int, ...]
    owner: int
    whole: bool

    @property
    def label(self) -> str:
        """Its name among optimizer states; ends with the parameter's."""
        return self.name if self.whole else f"{self.start}:{self.stop}|{self.name}"


def parts_of(config: ModelConfig, layout: Layout) -> list[Part]:
    """All parts of the model in the order of its parameters, the same on every worker."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}
    found: list[tuple[str, int, int, int, tuple[int, ...], bool]] = []
    for name, shape in shapes.items():
        bounds = _bounds(name, shape[0], layout)
        row = math.prod(shape[1:])
        for start, stop in pairwise(bounds):
            holders = tuple(sorted(_holders(name, start, config, layout)))
            found.append((name, start, stop, (stop - start) * row, holders, len(bounds) == 2))
    owners = _owners([(holders, numbers) for _, _, _, numbers, holders, _ in found], layout)
    return [
        Part(name, start, stop, numbers, holders, owner, whole)
        for (name, start, stop, numbers, holders, whole), owner in zip(found, owners, strict=True)
    ]


def _bounds(name: str, rows: int, layout: Layout) -> list[int]:
    """Where a parameter's first dimension is cut."""
    sharded = layout.zero and layout.workers > 1
    if ".mlp.experts." in name:
        if sharded:
            return list(range(rows + 1))
        spread = {0, rows}
        for team in layout.teams:
            spread |= {team.expert_range(lane, rows).start for lane in range(team.expert_lanes)}
        return sorted(spread)
    if name in TABLES and sharded:
        count = min(TABLE_PARTS, rows)
        return [rows * part // count for part in range(count + 1)]
    return [0, rows]


def _holders(name: str, row: int, config: ModelConfig, layout: Layout) -> Iterator[int]:
    for team in layout.teams:
        for stage in _stages(name, config, team):
            for lane, ranks in enumerate(team.lanes):
                if ".mlp.experts." not in name or row in team.expert_range(lane, config.n_routed_experts or 0):
                    yield ranks[stage]


def _stages(name: str, config: ModelConfig, team: Team) -> set[int]:
    """Stages of a team that compute with a parameter."""
    last = team.stages - 1
    if name == "model.embed_tokens.weight":
        return {0, last} if config.num_nextn_predict_layers or config.tie_word_embeddings else {0}
    if name.startswith("model.layers."):
        return {team.stage_of(int(name.split(".")[2]))}
    return {last}


def _owners(parts: Sequence[tuple[tuple[int, ...], int]], layout: Layout) -> list[int]:
    """One holder for each part: of what a group of workers holds, each takes the next run up to its share."""
    whole: dict[tuple[int, ...], int] = {}
    for holders, numbers in parts:
        whole[holders] = whole.get(holders, 0) + numbers
    memory = layout.memory or (1.0,) * layout.workers
    done = dict.fromkeys(whole, 0)
    owners = []
    for holders, numbers in parts:
        shares = [memory[rank] for rank in holders]
        middle = (done[holders] + numbers / 2) / whole[holders] * sum(shares)
        done[holders] += numbers
        place = 0
        while place < len(holders) - 1 and middle >= sum(shares[: place + 1]):
            place += 1
        owners.append(holders[place])
    return owners


class Shards:
    """This worker's parts of the model: their gradients, their owners, what it updates itself.

    Args:
        model: holds this worker's stage; stacks of experts hold its experts only.
        config: of the whole model.
        first_expert: number of the first expert that the stacks hold.
        trained: whether the loss depends on a parameter; the others keep no gradient and stay as they are.
    """

    def __init__(
        self,
        model: Transformer,
        config: ModelConfig,
        layout: Layout,
        crew: Crew,
        first_expert: int,
        trained: Callable[[str], bool],
    ) -> None:
        self.crew, self.zero = crew, layout.zero
        self.all_parts = parts_of(config, layout)
        self.names = {part.name for part in self.all_parts}
        crew.form({part.holders for part in self.all_parts})
        self.parameters = dict(model.named_parameters())
        self.trained = trained
        self.parts = [part for part in self.all_parts if crew.rank in part.holders]
        self._first_expert = first_expert
        self._views = {part.label: self._view(part) for part in self.parts}
        self._flat = torch.empty(0)
        if not crew.alone:
            self._flat = torch.zeros(sum(p.numel() for p in self.parameters.values()), device=model.device)
        self._runs = self._make_runs()

    @property
    def kept(self) -> list[Part]:
        """The parts whose optimizer state lies here."""
        return [part for part in self.parts if not self.zero or part.owner == self.crew.rank]

    def view(self, part: Part) -> nn.Parameter:
        """The weights of a part that this worker holds."""
        return self._views[part.label]

    def clear(self) -> None:
        """Forget the last step's gradient."""
        if self.crew.alone:
            for parameter in self.parameters.values():
                parameter.grad = None
            return
        self._flat.zero_()
        offset = 0
        for name, parameter in self.parameters.items():
            if self.trained(name):
                parameter.grad = self._flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        for part in self.parts:
            if (whole := self.parameters[part.name].grad) is not None:
                self._views[part.label].grad = whole if part.whole else whole[self._rows(part)]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply this worker's own gradient."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradient of each part over its holders; with ZeRO only the owner knows the sum afterwards."""

        def start(flat: Tensor, holders: tuple[int, ...], owner: int) -> dist.Work | None:
            group = self.crew.group(holders)
            if self.zero:
                return dist.reduce(flat, dst=owner, group=group, async_op=True)
            return dist.all_reduce(flat, group=group, async_op=True)

        self._exchange("summing gradients", self._gradient, start)

    @torch.no_grad()
    def norm(self) -> float:
        """Length of the whole gradient, the same on every worker; each part counts once, at its owner."""
        owned = [self._views[part.label].grad for part in self.parts if part.owner == self.crew.rank]
        lengths = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in owned if grad is not None]
        total = torch.stack(lengths).cpu().double().square().sum() if lengths else torch.zeros((), dtype=torch.float64)
        return math.sqrt(float(self.crew.sum(self.crew.outgoing(total))))

    @torch.no_grad()
    def clip(self, largest: float, norm: float) -> None:
        """Shorten a gradient of length `norm` to `largest`."""
        if norm > largest:
            self.scale(largest / (norm + 1e-6))

    @torch.no_grad()
    def spread(self) -> None:
        """After the owners' update: new weights for all holders."""
        if self.zero:
            self._exchange(
                "spreading weights",
                lambda part: self._views[part.label].data,
                lambda flat, holders, owner: dist.broadcast(
                    flat, src=owner, group=self.crew.group(holders), async_op=True
                ),
            )

    def _exchange(
        self,
        doing: str,
        tensor_of: Callable[[Part], Tensor],
        start: Callable[[Tensor, tuple[int, ...], int], dist.Work | None],
    ) -> None:
        """One message for each run of parts with the same holders (and owner); all under way at once."""
        started: list[tuple[dist.Work | None, Tensor, list[Tensor]]] = []

        def all_messages() -> None:
            for (holders, owner), parts in self._runs:
                tensors = [tensor_of(part) for part in parts]
                flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
                started.append((start(flat, holders, owner), flat, tensors))
            for work, flat, tensors in started:
                if work is not None:
                    work.wait()
                for tensor, new in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                    tensor.copy_(new.view_as(tensor))

        if self._runs:
            self.crew.talk(doing, all_messages)

    def _make_runs(self) -> list[tuple[tuple[tuple[int, ...], int], list[Part]]]:
        """Parts that others hold too, by holders and, with ZeRO, owner; in an order that all workers share."""
        runs: dict[tuple[tuple[int, ...], int], list[Part]] = {}
        for part in self.parts:
            if len(part.holders) > 1 and self.trained(part.name):
                runs.setdefault((part.holders, part.owner if self.zero else -1), []).append(part)
        return sorted(runs.items())

    def _gradient(self, part: Part) -> Tensor:
        gradient = self._views[part.label].grad
        assert gradient is not None
        return gradient

    def _rows(self, part: Part) -> slice:
        first = self._first_expert if ".mlp.experts." in part.name else 0
        return slice(part.start - first, part.stop - first)

    def _view(self, part: Part) -> nn.Parameter:
        whole = self.parameters[part.name]
        rows = self._rows(part)
        if part.whole and rows == slice(0, len(whole)):
            return whole
        return nn.Parameter(whole.data[rows])
