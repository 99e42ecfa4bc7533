"""What a worker keeps is what the layout says, and nothing besides it is ever whole."""

import dataclasses
from typing import Any

import pytest
from layouts import MEMORY, WIDE, layout, settings
from live_bytes import LiveBytes
from spawned_ranks import on_ranks
from tiny_models import FEW, Rows

from motley.model import Transformer, experts
from motley.parallel import buckets as buckets
from motley.parallel.communicator import Communicator
from motley.parallel.layout import IslandLayout, Layout
from motley.parallel.memory_fit import dealt
from motley.parallel.rank import Ranks
from motley.parallel.zero.partition import bytes_kept_once, held_bytes, shards_of, update_work


def keep(comm: Communicator, cases: list[tuple[int, str, float, str]]) -> list[Any]:
    """For each case, after a step: bytes of weights, gradients, optimizer state; the most that exchanging them adds."""
    experts.PAD, buckets.MESSAGE_BYTES = FEW, 1 << 16
    found = []
    for zero, optimizer, mtp, moments in cases:
        ranks = Ranks(WIDE, settings(optimizer=optimizer, mtp_weight=mtp, moments=moments), layout(zero), comm)
        whole = Transformer(WIDE)
        whole.initialize(0)
        ranks.take_state((dict(whole.state_dict()), {}) if comm.leads else None)
        losses, norm = ranks.gradient(ranks.read(Rows(), 0))  # type: ignore[arg-type]
        ranks.update(losses, norm, 0.01)
        with LiveBytes() as live:
            ranks.buffers.reduce()
            ranks.buffers.broadcast_weights()
        states = sum(tensor.nbytes for tensor in ranks.optimizer.state_tensors().values())
        kept = (ranks.buffers.weights.flat.nbytes, ranks.buffers.gradients.flat.nbytes, states)
        found.append((kept, live.peak))
    return found


@pytest.mark.slow(15)
def test_a_worker_keeps_what_the_layout_says_to_the_byte_and_exchanging_it_makes_no_second_copy():
    ways = (("muon", 0.3, "fp32"), ("adamw", 0.0, "fp32"), ("muon", 0.3, "bf16"), ("adamw", 0.3, "bf16"))
    cases = [(zero, *way) for zero in range(4) for way in (ways if zero in (0, 1) else ways[:2])]
    for rank, answers in enumerate(on_ranks(3, keep, cases)):
        for (zero, optimizer, mtp, moments), (kept, added) in zip(cases, answers, strict=True):
            said = held_bytes(WIDE, layout(zero), rank, optimizer, bool(mtp), moments)  # type: ignore[arg-type]
            assert kept == (said.weights, said.gradients, said.optimizer), (zero, optimizer, moments, rank)
            assert added == 0


def test_what_is_kept_once_follows_the_workers_memory():
    for zero, kind in ((1, "optimizer"), (2, "gradients"), (3, "weights")):
        held = [getattr(held_bytes(WIDE, layout(zero), rank, "adamw"), kind) for rank in range(3)]
        once = sum(held)
        for bytes_held, memory in zip(held, MEMORY, strict=True):
            assert bytes_held / once == pytest.approx(memory / sum(MEMORY), abs=0.02)
        assert once == pytest.approx(getattr(held_bytes(WIDE, layout(0), 0, "adamw"), kind), rel=1e-3)


def deal(zero: int, budgets: tuple[float, ...], speeds: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Layout:
    islands = [IslandLayout((0, 1, 2), dataclasses.replace(layout(zero), memory=(), rates=()))]
    return dealt(islands, WIDE, settings(), budgets, speeds)[0].layout


def work_of(layout: Layout) -> list[float]:
    """Share of the update that each worker does."""
    work = [0.0] * layout.workers
    for part in shards_of(WIDE, layout, "muon"):
        work[part.owner] += update_work(part, "muon")
    return [own / sum(work) for own in work]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_updates_are_dealt_by_speed_where_memory_is_plenty(zero: int) -> None:
    for speeds in ((1.0, 2.0, 4.0), (8.0, 1.0, 1.0), (1.0, 1.0, 1.0)):
        for share, speed in zip(work_of(deal(zero, (1e9,) * 3, speeds)), speeds, strict=True):
            assert share == pytest.approx(speed / sum(speeds), abs=0.04)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_slow_worker_with_memory_keeps_what_fast_ones_have_no_room_for(zero: int) -> None:
    held = held_bytes(WIDE, layout(zero), 0, "muon")
    anyway = (held.weights if zero < 3 else 0) + (held.gradients if zero < 2 else 0)
    needed = sum(bytes_kept_once(part, layout(zero), "muon") for part in shards_of(WIDE, layout(zero), "muon"))
    speeds, budgets = (1.0, 1.0, 10.0), (anyway + 4 * needed, anyway + 0.6 * needed, anyway + 0.4 * needed)
    found = deal(zero, budgets, speeds)
    for rank in range(3):
        assert held_bytes(WIDE, found, rank, "muon").total <= budgets[rank]
    slow, _, fast = work_of(found)
    assert slow > fast, "the slowest has the room"
    tight = deal(zero, (anyway + 0.5 * needed, anyway + 0.3 * needed, anyway + 0.2 * needed), speeds)
    kept = [held_bytes(WIDE, tight, rank, "muon").total - anyway for rank in range(3)]
    assert kept == pytest.approx([0.5 * needed, 0.3 * needed, 0.2 * needed], rel=0.15), "in proportion to memory"


def test_without_room_or_anything_kept_once_only_the_first_shares_are_dealt() -> None:
    whole = held_bytes(WIDE, layout(1), 0, "muon")
    needed = whole.weights + whole.gradients
    assert deal(1, (needed / 2,) * 3).memory == (), "nobody has any left"
    assert deal(0, (needed, 2 * needed, 4 * needed)).memory == (), "nothing is kept once"
    assert deal(0, (needed,) * 3, (1.0, 2.0, 5.0)).rates == (1.0, 2.0, 5.0)


def passing(comm: Communicator) -> list[int]:
    """The most bytes that the passes of a step make, activations included, at ZeRO 2 and 3."""
    experts.PAD, buckets.MESSAGE_BYTES = FEW, 1 << 16
    peaks = []
    for zero in (2, 3):
        ranks = Ranks(WIDE, settings(micro_batch=1), layout(zero), comm)
        whole = Transformer(WIDE)
        whole.initialize(0)
        ranks.take_state((dict(whole.state_dict()), {}) if comm.leads else None)
        with LiveBytes() as live:
            ranks.gradient(ranks.read(Rows(), 0))  # type: ignore[arg-type]
        peaks.append(live.peak)
    return peaks


@pytest.mark.slow(10)
def test_passes_never_hold_all_gradients_nor_all_weights_of_others():
    whole = held_bytes(WIDE, layout(0), 0, "muon").gradients
    for peaks in on_ranks(3, passing):
        assert max(peaks) < whole
