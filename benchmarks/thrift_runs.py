"""Runs of the race: one loop for both sides, and what its clock covers.

    trained(...)   one step of a small twin ─► begin the clock ─► count, draw weights ─► compile ─► steps ─► stop
                   loads libraries                                the clock stands still ─┘          └─ and while loss
                                                                                                        is measured

A schedule has to know when it ends, and here only the clock knows. So it is followed by the share of the time that is
gone, counted from the end of the first step: every run decays to its end exactly.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from safetensors.torch import load_file
from thrift_sides import Learner, Llama, Ordinary, Ours, Recipe, plain_paths

from motley.data.stream import TokenStream
from motley.files import whole_file
from motley.model.checkpoint import write_tensors
from motley.train.expert_balance import ByLength
from motley.train.ngram_targets import COUNTED_TOKENS, NgramTargets, counts_of

HELD_OUT_ROWS = 128
MARKS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the time at which the loss is measured
SAVED_EVERY = 60.0  # seconds between two checkpoints of a run that has them


class Clock:
    """Seconds since it was made, without the pauses."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        self.paused = self.cpu_paused = 0.0

    def read(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.began - self.paused

    def cpu_seconds(self) -> float:
        """What the process computed, on all its threads: on a quiet machine about its threads times `read`."""
        return time.process_time() - self.cpu_began - self.cpu_paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        wall, cpu = self.read(), self.cpu_seconds()
        yield
        self.paused += self.read() - wall
        self.cpu_paused += self.cpu_seconds() - cpu


class TokenClock(Clock):
    """Time as tokens tell it, at a rate that was measured on the quiet machine: for runs on a busy one.

    Seconds that no token takes, those of counting say, are not seen.
    """

    def __init__(self, device: torch.device, tokens_per_second: float) -> None:
        super().__init__(device)
        self.tokens_per_second, self.tokens = tokens_per_second, 0

    def read(self) -> float:
        return self.tokens / self.tokens_per_second


def built(recipe: Recipe, device: torch.device, seed: int, rows: TokenStream) -> Learner:
    """The network with new weights, and what its recipe counts in the text of `rows`."""
    hints = (
        NgramTargets(counts_of(rows, recipe.shape.vocab_size, device), recipe.ngram_weight)
        if recipe.ngram_weight
        else None
    )
    if isinstance(recipe.shape, Llama):
        return Ordinary(recipe, recipe.shape, device, seed, hints)
    return Ours(recipe, recipe.shape, device, seed, hints)


def load_libraries(recipe: Recipe, rows: TokenStream, device: torch.device) -> None:
    """Let the process import and load what the recipe will use: one step of the same network, thrown away.

    Without counts and not compiled: counting is part of a run, and a network is compiled by itself (`warm_up`).
    """
    twin = built(replace(recipe, compiled=False, ngram_weight=0.0), device, 0, rows)
    twin.step(rows.rows(0, 1), 0.0)


def warm_up(learner: Learner, recipe: Recipe, rows: TokenStream) -> None:
    """Compile: one gradient of each kind of batch that the recipe has, not used. No weight changes."""
    sizes = {(recipe.rows(gone), recipe.length(gone)) for gone in (step / 100 for step in range(101))}
    for count, length in sorted(sizes):
        learner.gradient(rows.rows(0, count).cut(length))
    learner.optimizer.zero_grad()


def pace(recipe: Recipe, rows: TokenStream, device: torch.device, steps: int) -> dict[str, float]:
    """Seconds of warming up, and the median of `steps` steps after one that is not counted."""
    forget_compiled()
    load_libraries(recipe, rows, device)
    learner, count, clock = built(recipe, device, 0, rows), recipe.rows(0.0), Clock(device)
    warm_up(learner, recipe, rows)
    warm, read, cpu = clock.read(), [], 0.0
    for step in range(1 + steps):
        learner.step(rows.rows(step * count, count), recipe.rate(0.0))
        read.append(clock.read())
        cpu = cpu or clock.cpu_seconds()
    return {
        "warm_up_seconds": warm,
        "step_seconds": statistics.median(after - before for before, after in pairwise(read)),
        "step_cpu_seconds": (clock.cpu_seconds() - cpu) / steps,
    }


def forget_compiled() -> None:
    """Let nothing be left of what an earlier run compiled."""
    torch.compiler.reset()
    torch._inductor.config.force_disable_caches = True  # those on disk


def counted(rows: TokenStream, held_out: TokenStream, vocab_size: int, held_out_rows: int) -> dict[str, float]:
    """The counts that ours learns from, as a model of their own: {"loss", nats per token of held-out rows; "seconds" of
    counting; "tokens" counted}."""
    device = torch.device("cpu")
    clock = Clock(device)
    counts = counts_of(rows, vocab_size, device)
    seconds, nats, seen = clock.read(), 0.0, 0
    for first in range(0, min(held_out_rows, held_out.rows_per_epoch), 8):
        batch = held_out.rows(first, min(8, held_out_rows - first))
        targets = batch.targets.flatten()
        here = (targets >= 0).nonzero().squeeze(1)
        expected = counts.expected(batch.input_ids)[here].dense()
        nats -= float(expected.gather(1, targets[here, None]).log().sum(dtype=torch.float64))
        seen += len(here)
    return {"loss": nats / seen, "seconds": seconds, "tokens": len(rows.text(COUNTED_TOKENS))}


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        position: rows read.
        steps: taken.
        first_step: seconds at the end of the first.
        curve: (seconds, tokens, held-out loss in nats per token).
    """

    position: int = 0
    steps: int = 0
    first_step: float = 0.0
    curve: list[tuple[float, int, float]] = field(default_factory=list)


def save_progress(file: Path, learner: Learner, progress: Progress) -> None:
    """All that a run needs to go on, in one file."""
    tensors = {f"model.{name}": tensor for name, tensor in learner.model.state_dict().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in learner.optimizer.state_tensors().items()}
    tensors["progress"] = torch.tensor([progress.position, progress.steps, progress.first_step], dtype=torch.float64)
    tensors["curve"] = torch.tensor(progress.curve, dtype=torch.float64).reshape(-1, 3)
    with whole_file(file) as unfinished:
        write_tensors(tensors, unfinished)


def load_progress(file: Path, learner: Learner) -> Progress:
    """The inverse of `save_progress`."""
    tensors = load_file(file)
    position, steps, first_step = tensors.pop("progress").tolist()
    curve = [(seconds, int(tokens), loss) for seconds, tokens, loss in tensors.pop("curve").tolist()]
    parts = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, own = name.split(".", 1)
        parts[part][own] = tensor
    learner.model.load_state_dict(parts["model"])
    learner.optimizer.load_state_tensors(parts["optimizer"].items())
    return Progress(int(position), int(steps), first_step, curve)


def trained(
    recipe: Recipe,
    rows: TokenStream,
    held_out: TokenStream,
    device: torch.device,
    seed: int,
    seconds: float,
    held_out_rows: int = HELD_OUT_ROWS,
    marks: tuple[float, ...] = MARKS,
    tokens_per_second: float | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train for `seconds` of the clock, and what came of it.

    The curve holds (seconds, tokens, held-out loss in nats per token) at `marks`, shares of the time, and at the end.

    tokens_per_second: let tokens tell the time, at this rate.
    checkpoint: only then: a file from which a run that was broken off goes on.
    """
    assert checkpoint is None or tokens_per_second, "a run that goes on later has no clock but its tokens"
    forget_compiled()
    load_libraries(recipe, rows, device)
    looked_at = min(held_out_rows, held_out.rows_per_epoch)
    counted = int((held_out.rows(0, looked_at).targets >= 0).sum())
    clock = TokenClock(device, tokens_per_second) if tokens_per_second else Clock(device)
    with plain_paths() if recipe.plain else nullcontext():
        learner = built(recipe, device, seed, rows)
        with clock.pause():
            warm_up(learner, recipe, rows)
        found = load_progress(checkpoint, learner) if checkpoint and checkpoint.is_file() else Progress()
        gone, now, loss, saved = 0.0, 0.0, 0.0, time.monotonic()
        if isinstance(clock, TokenClock):
            clock.tokens = found.position * rows.seq_len
            now = clock.read()
            gone = min(1.0, max(0.0, (now - found.first_step) / (seconds - found.first_step)))
        left = [mark for mark in marks if now < mark * seconds]
        while found.steps == 0 or now < seconds:
            count = recipe.rows(gone)
            loss = learner.step(rows.rows(found.position, count).cut(recipe.length(gone)), recipe.rate(gone))
            found.position, found.steps = found.position + count, found.steps + 1
            if isinstance(clock, TokenClock):
                clock.tokens = found.position * rows.seq_len
            now = clock.read()
            found.first_step = found.first_step or now
            gone = min(1.0, (now - found.first_step) / max(seconds - found.first_step, 1e-9))
            if isinstance(learner, Ours) and gone > 0:
                learner.bias_speed = ByLength.of(max(1, round(found.steps / gone)))
            over = now >= seconds
            if over or (left and now >= left[0] * seconds):
                left = [mark for mark in left if now < mark * seconds]
                with clock.pause():
                    measured = learner.held_out(held_out, looked_at) / counted
                found.curve.append((now, found.position * rows.seq_len, measured))
            if checkpoint and (over or time.monotonic() - saved > SAVED_EVERY):
                save_progress(checkpoint, learner, found)
                saved = time.monotonic()
    return {
        "loss": found.curve[-1][2], "seconds": now, "first_step_seconds": found.first_step, "steps": found.steps,
        "tokens": found.position * rows.seq_len, "cpu_seconds": clock.cpu_seconds(), "training_loss": loss,
        "parameters": learner.parameters(), "curve": found.curve,
    }  # fmt: skip
