"""A state is gathered and handed out in pieces, through the hosts' memory: no device ever holds it a second time."""

import dataclasses
import random
from dataclasses import dataclass, field

import pytest
import torch
from layouts import WIDE, layout, settings
from live_bytes import LiveBytes
from spawned_ranks import on_ranks
from tiny_models import FEW, Rows

from motley.model import Transformer, experts
from motley.parallel import p2p as parcels
from motley.parallel.communicator import Communicator
from motley.parallel.full_state import gather, scatter
from motley.parallel.rank import Ranks

PARCEL = 1 << 14
SMALL = 100_000  # bytes: names of parts, which workers tell each other


def random_tensors(seed: int) -> list[torch.Tensor]:
    chance = random.Random(seed)
    shapes = [[chance.randint(0, 9) for _ in range(chance.randint(0, 3))] for _ in range(chance.randint(0, 12))]
    dtypes = [chance.choice([torch.float32, torch.bfloat16]) for _ in shapes]
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(torch.Size(shape), generator=generator) for shape in shapes)
    return [tensor.to(dtype) for tensor, dtype in zip(made, dtypes, strict=True)]


@dataclass(frozen=True)
class Counting(Communicator):
    """Notes how many numbers each message has that it receives."""

    sizes: list[int] = field(default_factory=list)

    def receive(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        self.sizes.append(len(tensor))
        return super().receive(tensor, source)


def pass_on(comm: Communicator) -> None:
    for seed in range(30):
        parcels.PARCEL_NUMBERS = 1 + seed % 7 * 20
        tensors = random_tensors(seed)
        if comm.leads:
            parcels.send(tensors, comm, 1)
            continue
        counting = Counting(comm.rank, comm.size)
        arrivals = parcels.Arrivals(counting, 0, [tensor.shape for tensor in tensors])
        found = [arrivals.fill(torch.empty(tensor.shape)) for tensor in tensors]
        assert all(one.equal(other.float()) for one, other in zip(found, tensors, strict=True)), seed
        assert max(counting.sizes, default=0) <= parcels.PARCEL_NUMBERS
        assert sum(counting.sizes) == sum(tensor.numel() for tensor in tensors)


def test_numbers_arrive_bit_for_bit_in_messages_of_bounded_size():
    on_ranks(2, pass_on)


def peaks(comm: Communicator, cases: list[tuple[int, str]]) -> list[tuple[int, ...]]:
    """(most bytes made while a state is gathered, while it is handed out again, of the state, made by the latter to
    stay, of the largest part) of each case."""
    experts.PAD, parcels.PARCEL_NUMBERS, found = FEW, PARCEL // 4, []
    for zero, optimizer in cases:
        ranks = Ranks(WIDE, settings(optimizer=optimizer), layout(zero), comm)
        whole = Transformer(WIDE)
        whole.initialize(0)
        ranks.take_state((dict(whole.state_dict()), {}) if comm.leads else None)
        losses, norm = ranks.gradient(ranks.read(Rows(), 0))  # type: ignore[arg-type]
        ranks.update(losses, norm, 0.01)
        # What is put on this device cannot be read again: nothing of a state may lie there on its way.
        elsewhere = dataclasses.replace(comm, device=torch.device("meta"))
        with LiveBytes() as gathering:
            state = gather(ranks.model, ranks.buffers, ranks.optimizer, elsewhere)
        with LiveBytes() as handing_out:
            scatter(state, ranks.model, ranks.buffers, ranks.optimizer, elsewhere)
        size = sum(tensor.nbytes for kind in state or () for tensor in kind.values())
        states = ranks.optimizer.state_tensors()
        stays = sum(tensor.nbytes for name, tensor in states.items() if not name.endswith(":momentum"))
        largest = max(4 * part.numbers for part in ranks.buffers.all_parts)
        found.append((gathering.peak, handing_out.peak, size, stays, largest))
    return found


@pytest.mark.slow(15)
def test_no_share_of_the_state_is_held_twice_while_it_is_gathered_or_handed_out():
    cases = [(1, "muon"), (3, "adamw")]
    for rank, answers in enumerate(on_ranks(3, peaks, cases)):
        for case, (gathering, handing_out, state, stays, largest) in zip(cases, answers, strict=True):
            assert gathering <= state + PARCEL + SMALL, (rank, case)
            assert handing_out <= stays + largest + PARCEL + SMALL, (rank, case)
