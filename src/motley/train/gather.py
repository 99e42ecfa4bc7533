"""The whole training state at one worker, and back: a checkpoint knows nothing of the layout that wrote it.

    parts of all workers ──▶ worker 0: every tensor whole, under its own name ──▶ one checkpoint, as a single process
    parts of all workers ◀── worker 0                                        ◀── writes it; any layout goes on from it

Only worker 0 needs the disk; the others get what they hold by message. Worker 0 holds the whole state for a moment.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from motley.model import Transformer
from motley.train.crew import Crew
from motley.train.optimizer import Optimizer
from motley.train.parts import Part
from motley.train.shards import Shards

State = dict[str, Tensor]
KINDS = ("momentum", "exp_avg", "exp_avg_sq", "step")  # of optimizer state
TIED = "lm_head.weight"  # where it is the embedding, it is no parameter of its own


def gather(
    model: Transformer, shards: Shards, optimizer: Optimizer, crew: Crew, names: Collection[str] | None = None
) -> tuple[State, State] | None:
    """(weights and buffers, optimizer state) of the whole model at worker 0, on the CPU; None elsewhere.

    names: of the only weights and buffers that are wanted, without optimizer state; None: everything.
    """
    mine = _own_state(shards, optimizer, names)
    headers = crew.all_values([(name, tuple(tensor.shape)) for name, tensor in mine])
    held = _buffers(model)
    buffers = crew.all_values({name: buffer.cpu() for name, buffer in held if names is None or name in names})
    if not crew.leads:
        if mine:
            crew.send(_flat(tensor for _, tensor in mine), 0)
        return None
    pieces: dict[str, Tensor] = {}
    for rank, header in enumerate(headers):
        flat = _flat(tensor for _, tensor in mine) if rank == 0 else _room(header, crew)
        if rank and header:
            crew.receive(flat, rank)
        sizes = [torch.Size(shape).numel() for _, shape in header]
        for (name, shape), values in zip(header, flat.cpu().split(sizes), strict=True):
            pieces[name] = values.view(shape)
    weights = _joined(shards.all_parts, pieces, "weight")
    for held in buffers:
        weights |= held
    kinds = sorted({name.rsplit(":", 1)[1] for name in pieces} - {"weight"})
    states: State = {}
    for kind in kinds:
        for name, tensor in _joined(shards.all_parts, pieces, kind).items():
            states[f"{name}:{kind}"] = tensor
    return weights, states


def scatter(
    state: tuple[State, State] | None,
    model: Transformer,
    shards: Shards,
    optimizer: Optimizer,
    crew: Crew,
    names: Collection[str] | None = None,
    keep: float = 0.0,
) -> None:
    """Put the state that worker 0 has (None elsewhere) into every worker's model and optimizer.

    An empty optimizer state leaves the optimizers as they are. Raises KeyError for state of another optimizer.

    names: of the only weights to set; None: all.
    keep: share that weights and buffers keep of what they were.
    """
    weights, states = state or ({}, {})
    held = dict(_buffers(model))
    parameters = shards.names | {TIED}
    for name, buffer in crew.share({name: weights[name] for name in weights if name not in parameters}).items():
        if name in held:
            _move(held[name], buffer.to(held[name].device), keep)
    known = set(crew.share(sorted(states)))
    kept = set(shards.kept)
    here = [part for part in shards.here if names is None or part.name in names]
    rows = crew.all_values([(part.label, part in kept) for part in here])
    by_label = {part.label: part for part in shards.all_parts}
    mine = torch.empty(0)
    for rank, wanted in enumerate(rows):
        pieces = [(by_label[label], kind) for label, keeps in wanted for kind in _kinds(by_label[label], keeps, known)]
        if crew.leads:
            flat = _flat(_piece(part, kind, weights, states) for part, kind in pieces).to(crew.device)
            if rank == 0:
                mine = flat
            elif len(flat):
                crew.send(flat, rank)
        elif rank == crew.rank:
            mine = torch.empty(sum(_size(part, kind) for part, kind in pieces), device=crew.device)
            if len(mine):
                crew.receive(mine, 0)
        if rank == crew.rank:
            _put(pieces, mine, shards, optimizer, bool(known), keep)


def _put(
    pieces: list[tuple[Part, str]], flat: Tensor, shards: Shards, optimizer: Optimizer, states: bool, keep: float
) -> None:
    loaded: State = {}
    for (part, kind), values in zip(pieces, flat.split([_size(part, kind) for part, kind in pieces]), strict=True):
        if kind == "weight":
            view = shards.view(part)
            _move(view.data, values.view_as(view), keep)
        else:
            loaded[f"{part.label}:{kind}"] = values.view_as(shards.view(part)) if kind != "step" else values[0]
    if states:
        optimizer.load_state_tensors(loaded)


def _move(tensor: Tensor, new: Tensor, keep: float) -> None:
    """Make `tensor` the new one, but for a share `keep`. What it was may be no number yet where nothing is kept."""
    if keep:
        tensor.lerp_(new, 1 - keep)
    else:
        tensor.copy_(new)


def _own_state(shards: Shards, optimizer: Optimizer, names: Collection[str] | None = None) -> list[tuple[str, Tensor]]:
    """(label and kind, tensor) of the parts that this worker owns; of `names` only weights."""
    states = optimizer.state_tensors() if names is None else {}
    found = []
    for part in shards.here:
        if part.owner == shards.crew.rank and (names is None or part.name in names):
            found.append((f"{part.label}:weight", shards.view(part).data))
            for kind in KINDS:
                if (tensor := states.get(f"{part.label}:{kind}")) is not None:
                    found.append((f"{part.label}:{kind}", tensor))
    return found


def _joined(parts: Iterable[Part], pieces: dict[str, Tensor], kind: str) -> State:
    """Whole tensors by parameter name."""
    rows: dict[str, list[Tensor]] = {}
    for part in parts:
        if (piece := pieces.get(f"{part.label}:{kind}")) is not None:
            rows.setdefault(part.name, []).append(piece)
    return {name: tensors[0] if tensors[0].dim() == 0 else torch.cat(tensors) for name, tensors in rows.items()}


def _kinds(part: Part, keeps: bool, known: set[str]) -> list[str]:
    kinds = [kind for kind in KINDS if f"{part.name}:{kind}" in known]
    return ["weight", *(kinds if keeps else [])]


def _size(part: Part, kind: str) -> int:
    return 1 if kind == "step" else part.numbers


def _piece(part: Part, kind: str, weights: State, states: State) -> Tensor:
    tensor = weights[part.name] if kind == "weight" else states[f"{part.name}:{kind}"]
    return tensor if kind == "step" else tensor[part.start : part.stop]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    flat = [tensor.detach().reshape(-1).float() for tensor in tensors]
    return torch.cat(flat) if flat else torch.empty(0)


def _room(header: list[tuple[str, tuple[int, ...]]], crew: Crew) -> Tensor:
    return torch.empty(sum(torch.Size(shape).numel() for _, shape in header), device=crew.device)


def _buffers(model: Transformer) -> list[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds: the routers' biases."""
    names = set(model.state_dict())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in names]
