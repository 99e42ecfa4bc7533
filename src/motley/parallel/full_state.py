"""Gather the whole training state on one rank, and scatter it again: checkpoints are independent of layout.

    shards of all ranks ──▶ rank 0: every tensor whole, under its own name ──▶ one checkpoint, as a single process
    shards of all ranks ◀── rank 0                                           ◀── writes it; any layout goes on from it

Only rank 0 needs the disk; the others get what they hold by message. Rank 0 holds the whole state for a moment, in
its host's memory. Devices hold what they held before and at most one shard besides: a share goes from where it lies to
the host in parcels, and from there to where it is kept shard by shard.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from motley.model import Transformer
from motley.parallel import p2p as parcels
from motley.parallel.communicator import Communicator
from motley.parallel.zero.flat_buffers import FlatBuffers
from motley.parallel.zero.partition import ParameterShard
from motley.train.optimizer import Optimizer

State = dict[str, Tensor]
KINDS = ("momentum", "step", "exp_avg", "exp_avg_sq")  # of optimizer state
TIED = "lm_head.weight"  # where it is the embedding, it is no parameter of its own


def gather(
    model: Transformer,
    shards: FlatBuffers,
    optimizer: Optimizer,
    comm: Communicator,
    names: Collection[str] | None = None,
) -> tuple[State, State] | None:
    """(weights and buffers, optimizer state) of the whole model at rank 0, in its host's memory; None elsewhere.

    names: of the only weights and buffers that are wanted, without optimizer state; None: everything.
    """
    mine = _own_state(shards, optimizer, names)
    headers = comm.all_values([(part.label, kind) for part, kind, _ in mine])
    held = _buffers(model)
    buffers = comm.all_values({name: buffer.cpu() for name, buffer in held if names is None or name in names})
    if not comm.leads:
        parcels.send([tensor for _, _, tensor in mine], comm, 0)
        return None
    whole = _room(shards.all_parts, {piece for header in headers for piece in header})
    for part, kind, tensor in mine:
        _piece(part, kind, whole).copy_(tensor)
    by_label = {part.label: part for part in shards.all_parts}
    for rank, header in enumerate(headers[1:], 1):
        rooms = [_piece(by_label[label], kind, whole) for label, kind in header]
        arrivals = parcels.Arrivals(comm, rank, [room.shape for room in rooms])
        for room in rooms:
            arrivals.fill(room)
    weights, states = whole
    for found in buffers:
        weights |= found
    return weights, states


def scatter(
    state: tuple[State, State] | None,
    model: Transformer,
    shards: FlatBuffers,
    optimizer: Optimizer,
    comm: Communicator,
    names: Collection[str] | None = None,
    keep: float = 0.0,
) -> None:
    """Put the state that rank 0 has (None elsewhere) into every rank's model and optimizer.

    An empty optimizer state leaves the optimizers as they are. Raises KeyError for state of another optimizer.

    names: of the only weights to set; None: all.
    keep: share that weights and buffers keep of what they were.
    """
    state = state or ({}, {})
    weights, states = state
    held = dict(_buffers(model))
    parameters = shards.names | {TIED}
    for name, buffer in comm.share({name: weights[name] for name in weights if name not in parameters}).items():
        if name in held:
            _move(held[name], buffer, keep)
    known = set(comm.share(sorted(states)))
    kept = set(shards.kept)
    here = [part for part in shards.here if names is None or part.name in names]
    rows = comm.all_values([(part.label, part in kept) for part in here])
    by_label = {part.label: part for part in shards.all_parts}
    wanted = [_pieces([(by_label[label], keeps) for label, keeps in row], known) for row in rows]
    mine = wanted[comm.rank]
    if comm.leads:
        for rank, pieces in enumerate(wanted[1:], 1):
            parcels.send([_piece(part, kind, state) for part, kind in pieces], comm, rank)
        arrived = (_piece(part, kind, state) for part, kind in mine)
    else:
        shapes = [() if kind == "step" else part.shape for part, kind in mine]
        arrivals = parcels.Arrivals(comm, 0, shapes)
        arrived = (arrivals.fill(torch.empty(shape)) for shape in shapes)
    for part, new in zip(here, arrived, strict=False):  # weights come first
        _move(shards.view(part).data, new, keep)
    if known:
        names_of_states = (f"{part.label}:{kind}" for part, kind in mine[len(here) :])
        optimizer.load_state_tensors(zip(names_of_states, arrived, strict=True))


def _move(tensor: Tensor, new: Tensor, keep: float) -> None:
    """Make `tensor` the new one, but for a share `keep`. What it was may be no number yet where nothing is kept."""
    if keep:
        tensor.lerp_(new.to(tensor), 1 - keep)
    else:
        tensor.copy_(new)


def _own_state(
    shards: FlatBuffers, optimizer: Optimizer, names: Collection[str] | None = None
) -> list[tuple[ParameterShard, str, Tensor]]:
    """(shard, kind, tensor) of the shards that this rank owns; of `names` only weights."""
    states = optimizer.state_tensors() if names is None else {}
    found = []
    for part in shards.here:
        if part.owner == shards.comm.rank and (names is None or part.name in names):
            found.append((part, "weight", shards.view(part).data))
            for kind in KINDS:
                if (tensor := states.get(f"{part.label}:{kind}")) is not None:
                    found.append((part, kind, tensor))
    return found


def _room(parts: Iterable[ParameterShard], sent: Collection[tuple[str, str]]) -> tuple[State, State]:
    """Memory of the host for whole (weights, optimizer state), of which pieces (label, kind) are `sent`."""
    rows = {part.name: part.stop for part in parts}  # of its last shard
    weights: State = {}
    states: State = {}
    for part in parts:
        for kind in ("weight", *KINDS):
            state, name = (weights, part.name) if kind == "weight" else (states, f"{part.name}:{kind}")
            comes = (part.label, kind) in sent
            if comes and part.start == 0:
                state[name] = torch.empty(() if kind == "step" else (rows[part.name], *part.shape[1:]))
            assert comes == (name in state), f"only some parts of {name} were sent"
    return weights, states


def _pieces(parts: list[tuple[ParameterShard, bool]], known: set[str]) -> list[tuple[ParameterShard, str]]:
    """(shard, kind) of all that a rank gets, in the order of the messages: weights, then the states of what it keeps.

    shards: that it holds, and whether it keeps their optimizer state.
    known: names of the optimizer state that there is.
    """
    states = [(part, kind) for part, keeps in parts if keeps for kind in KINDS if f"{part.name}:{kind}" in known]
    return [*((part, "weight") for part, _ in parts), *states]


def _piece(part: ParameterShard, kind: str, state: tuple[State, State]) -> Tensor:
    """A shard of whole tensors, where it lies."""
    weights, states = state
    tensor = weights[part.name] if kind == "weight" else states[f"{part.name}:{kind}"]
    return tensor if kind == "step" else tensor[part.start : part.stop]


def _buffers(model: Transformer) -> list[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds: the routers' biases."""
    names = set(model.state_dict())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in names]
