"""Logging of a training run: metrics records, the progress bar, and remarks in the terminal.

The trainer calls it at fixed points of a step; nothing here changes what is learned.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from motley.progress import Progress, note
from motley.train.allocator import memory_bytes
from motley.train.expert_balance import imbalance
from motley.train.metrics import MetricsWriter, RecentRecords, Silence
from motley.train.run_state import Position, RunState
from motley.train.step import StepLosses
from motley.train.strategy import StepEnd, Strategy
from motley.train.validation import Reading


class StepClock:
    """Measures the current step; writing a checkpoint does not count."""

    def __init__(self) -> None:
        self.ended = time.perf_counter()  # the previous step, or the validation after it
        self.begin()

    def begin(self) -> None:
        self._began, self._paused = time.perf_counter(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def seconds(self) -> float:
        """Seconds of the step so far."""
        return time.perf_counter() - self._began - self._paused

    def since_last(self) -> float:
        """Seconds since the last step ended, without pauses."""
        return time.perf_counter() - self.ended - self._paused

    def turn(self) -> float:
        """End the step; returns all seconds since the last one ended."""
        before, self.ended = self.ended, time.perf_counter()
        return self.ended - before


class StepLog:
    """Writes metrics, progress bar and remarks of one run; a context manager.

    Args:
        strategy: that carries out the steps.
        state: of the run.
        title: of the progress bar.
    """

    def __init__(self, strategy: Strategy, state: RunState, title: str) -> None:
        self.strategy, self.state, self.config = strategy, state, strategy.config
        self.clock = StepClock()
        self._title, self._stack = title, ExitStack()
        self._step_tokens = self.config.batch_rows * self.config.seq_len

    def __enter__(self) -> "StepLog":
        strategy, state, at, config = self.strategy, self.state, self.state.at, self.config
        file = self._stack.enter_context(MetricsWriter(config.out, state.written) if strategy.leads else Silence())
        self.bar = self._stack.enter_context(
            Progress(
                self._title, config.steps * self._step_tokens, "tokens", done=at.step * self._step_tokens,
                shown=strategy.leads,
            )
        )  # fmt: skip
        self.metrics = RecentRecords(file, state.recent)
        forgotten = strategy.led(lambda: file.forgotten)
        if forgotten > at.step:
            repeated = f"steps {at.step + 1} to {forgotten}"
            state.news.append(f"{repeated} are computed again, from the state after step {at.step}")
        if state.news:
            self.metrics.write("event", **position(at), message="; ".join(state.news))
            state.news = []
        if (about := strategy.introduction()) is not None:
            self.metrics.write("ranks", **position(at), **about)
            self.bar.beneath(lambda: strategy.dashboard(about))
        self.clock = StepClock()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def say(self, *remarks: str | None) -> None:
        """Write remarks to the terminal and to the metrics."""
        for message in filter(None, remarks):
            self.metrics.write("event", **position(self.state.at), message=message)
            if self.strategy.leads:
                note(message)

    def validated(self, reading: Reading, seconds: float) -> None:
        at = self.state.at
        self.metrics.write("valid", **position(at), loss=reading.nats_per_token, bits_per_byte=reading.bits_per_byte)
        shares = [(counts / counts.sum().clamp(min=1)).tolist() for counts in self.state.expert_counts]
        self.metrics.write("experts", **position(at), load=shares)
        self.say(self.state.usual.remark("validation", seconds))
        self.clock.turn()

    def checkpointed(self, seconds: float) -> None:
        self.say(self.state.usual.remark("checkpoint", seconds))

    def stepped(self, before: int, losses: StepLosses, norm: float, skipped: str | None, end: StepEnd) -> None:
        """Log a finished step."""
        state, config, at, strategy = self.state, self.config, self.state.at, self.strategy
        elapsed, took = self.clock.seconds(), self.clock.since_last()
        at.seconds += self.clock.turn()
        uneven = [imbalance(counts) for counts in losses.expert_counts]
        self.metrics.write(
            "train", **position(at), loss=losses.main, mtp_loss=losses.mtp, balance_loss=losses.balance,
            learning_rate=config.learning_rate_at(before), grad_norm=norm,
            tokens_per_second=end.rows * config.seq_len / elapsed,
            memory_bytes=memory_bytes(strategy.model.device),
            **({"sequence_length": config.length(before)} if config.length(before) < config.seq_len else {}),
            **({"imbalance": [round(value, 3) for value in uneven]} if uneven else {}), **end.numbers,
        )  # fmt: skip
        if skipped:
            self.metrics.write("event", **position(at), message=f"step skipped: {skipped}")
        if end.lost is not None:
            raise end.lost
        for kind, values in end.records:
            self.metrics.write(kind, **position(at), **values)
        self.say(
            *end.remarks,
            *state.balance.complaint(uneven, strategy.shape, config.steps, config.bias_speed),
            state.usual.remark("step", took, "rank", end.busy),
        )
        if end.round_seconds is not None:
            self.say(state.usual.remark("round", end.round_seconds, "island", end.round_busy))
        shown = {"busiest expert": f"{max(uneven) / len(losses.expert_counts[0]):.0%}"} if uneven else {}
        self.bar.advance((at.step - before) * self._step_tokens, loss=losses.main, **shown)


def position(at: Position) -> dict[str, Any]:
    """Where in the run a record belongs."""
    return {"step": at.step, "tokens": at.tokens, "seconds": at.seconds}
