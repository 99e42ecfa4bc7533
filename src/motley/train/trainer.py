"""The training loop of every stage, whatever carries out its steps.

    read rows ──▶ gradient (exact) ──▶ loss-spike guard ──▶ clip, optimizer, router bias ──▶ finish the step
                                             │ skip the step: say so, go on (fp16 overflowed: lower the loss scale)
                                             └── every so often: checkpoint          ... and validate behind it

An update can break the weights, and only the next gradient shows it. So a checkpoint is written between the next
gradient and its update: what is on disk was seen to give a finite loss and gradient.

The rows of a step follow from its number, so resuming needs no more than the step. Checkpoints and validations happen
where all ranks are at the same step: always, but for DiLoCo's islands between two outer steps.
"""

import dataclasses
import gc
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from motley.data.stream import TokenStream
from motley.data.tokenizer import Tokenizer
from motley.errors import CommunicationError, InputError
from motley.train.checkpoint import checkpoints, prune, save_checkpoint, save_model
from motley.train.config import TrainingConfig
from motley.train.run_state import Position, RunState
from motley.train.step import StepLosses
from motley.train.step_log import StepLog
from motley.train.strategy import Strategy
from motley.train.validation import validate


@dataclass(frozen=True)
class Inputs:
    """What a run learns from.

    Attributes:
        train, valid: rows of the two splits.
        tokenizer: of the model.
        title: of the progress bar.
    """

    train: TokenStream
    valid: TokenStream
    tokenizer: Tokenizer
    title: str

    @classmethod
    def of(cls, data: Path, config: TrainingConfig, tokenizer: Tokenizer, title: str) -> "Inputs":
        """Those of a prepared folder."""
        rows = TokenStream(data, "train", config.seq_len, config.seed)
        return cls(rows, TokenStream(data, "valid", config.seq_len, shuffle=False), tokenizer, title)


def train(strategy: Strategy, state: RunState, inputs: Inputs) -> Position:
    """Train to the last step in the run folder config.out, from where `state` is. Every rank calls this.

    Raises InputError when the run cannot go on (the loss stays broken, a full disk), KeyboardInterrupt after Ctrl-C or
    SIGTERM once a checkpoint is written, and CommunicationError when other ranks exited.
    """
    config, at = strategy.config, state.at
    token_bytes = inputs.tokenizer.token_bytes()
    strategy.model.train()
    with stop_requests(state), without_long_collections(), StepLog(strategy, state, inputs.title) as log:
        while at.step < config.steps or state.checkpoint_due:
            if state.validation_due:
                _validate(strategy, state, inputs.valid, token_bytes, log)
            train_step(strategy, state, inputs, log)
    strategy.model.eval()
    save_model(config.out / "model", strategy, inputs.tokenizer)
    return at


def train_step(strategy: Strategy, state: RunState, inputs: Inputs, log: StepLog) -> None:
    """One step: gradient, verdict, update; a checkpoint in between where one is due."""
    config, at = strategy.config, state.at
    last, before = at.step == config.steps, Snapshot.of(strategy, state)
    stop = strategy.stopping(state.asked_to_stop)
    log.clock.begin()
    while True:
        with named_lack_of_memory(strategy):
            losses, norm = strategy.gradient(strategy.read(inputs.train, at.step))
        overflow = strategy.scaler.follow(losses.culprits)
        if overflow is None or not (last or stop):
            break  # otherwise this gradient has to prove the weights: once more, with a lower loss scale
    guard = dataclasses.replace(state.guard)
    skipped = overflow or guard.verdict(losses.main, norm, is_finite(losses, norm))
    if skipped and not overflow:
        skipped += strategy.scaler.hopeless(losses.culprits)
    with log.clock.paused():
        if last or stop or state.checkpoint_due:
            # Behind the last step nothing is learned: there a single odd batch says nothing against the weights.
            proven = skipped is None or (last and is_finite(losses, norm) and guard.skipped_in_a_row == 1)
            _checkpoint(strategy, state, before, inputs.tokenizer, log, proven, skipped, stop)
    if last:
        return
    if skipped is None:
        strategy.update(losses, norm, config.learning_rate_at(at.step))
    end = strategy.finish_step(at.step, losses, skipped is None, log.clock.seconds)
    state.guard, state.expert_counts = guard, losses.expert_counts
    step, at.step, at.tokens = at.step, end.step, at.tokens + end.tokens
    if end.synchronized:
        _mark_due(state, config)
    log.stepped(step, losses, norm, skipped, end)
    if guard.exhausted:
        raise _stuck(config.out, at.step, f"{skipped}, {guard.skipped_in_a_row} steps in a row")


def is_finite(losses: StepLosses, norm: float) -> bool:
    return losses.finite and math.isfinite(norm)


# ------------------------------------------------------------------------------------------- what is attached


@dataclass(frozen=True)
class Snapshot:
    """Numbers of a checkpoint as they are before a step: `shared` by all ranks, and this rank's `own`."""

    shared: dict[str, Any]
    own: dict[str, Any]

    @classmethod
    def of(cls, strategy: Strategy, state: RunState) -> "Snapshot":
        shared = {"step": state.at.step, "position": asdict(state.at)}
        return cls(
            shared,
            {"guard": asdict(state.guard), "scales": asdict(strategy.scaler), "balance": asdict(state.balance)},
        )


def _checkpoint(
    strategy: Strategy,
    state: RunState,
    facts: Snapshot,
    tokenizer: Tokenizer,
    log: StepLog,
    proven: bool,
    skipped: str | None,
    stop: bool,
) -> None:
    """Write a checkpoint of the state before this step, which its gradient has proven; end the run if it is to stop."""
    config, at, began = strategy.config, state.at, time.perf_counter()
    proven = strategy.agree(proven)
    if at.step == config.steps and not proven:
        raise _stuck(config.out, at.step, skipped or "another island's loss or gradient is broken")
    if proven and at.step:
        strategy.check_copies(at.step)  # a checkpoint holds one of them
        log.metrics.flush()  # what stands in a checkpoint's past must never be missing from the metrics
        save_checkpoint(config.out, strategy, facts.shared, facts.own, tokenizer)
        prune(config.out, strategy, config.keep_last, at.best_step)
        state.checkpoint_due = False
        log.checkpointed(time.perf_counter() - began)
    if stop and at.step < config.steps:
        there = "from there" if proven else "from its newest checkpoint, before the steps that were skipped"
        raise KeyboardInterrupt(f"stopped after step {at.step}; the same command goes on {there}")


def _validate(strategy: Strategy, state: RunState, rows: TokenStream, token_bytes: Any, log: StepLog) -> None:
    """Measure the held-out loss."""
    at, began = state.at, time.perf_counter()
    reading = validate(strategy.held_out_loss, rows, strategy.config.valid_rows, token_bytes)
    at.seconds += time.perf_counter() - began
    if reading.nats_per_token < at.best_loss:
        at.best_loss, at.best_bits_per_byte, at.best_step = reading.nats_per_token, reading.bits_per_byte, at.step
    state.validation_due = False
    log.validated(reading, time.perf_counter() - began)
    if at.step == strategy.config.steps and not math.isfinite(reading.nats_per_token):
        raise _stuck(strategy.config.out, at.step, f"held-out loss {reading.nats_per_token:g} is not finite")


def _mark_due(state: RunState, config: TrainingConfig) -> None:
    """Ask for a validation and a checkpoint where a multiple of their steps was passed, and at the end."""
    step, since = state.at.step, state.synchronized or 0
    last = step == config.steps
    state.validation_due = last or since // config.valid_every < step // config.valid_every
    state.checkpoint_due |= last or since // config.checkpoint_every < step // config.checkpoint_every
    state.synchronized = step


def _stuck(run: Path, step: int, reason: str | None) -> InputError:
    good = checkpoints(run)
    state, model = (str(good[-1]), f"--model {good[-1]}, ") if good else ("the untrained model", "")
    return InputError(
        f"training stopped at step {step}: {reason}; the last good state is {state}; to go on from it, give the "
        f"command {model}a lower --learning-rate and another --out"
    )


@contextmanager
def named_lack_of_memory(strategy: Strategy) -> Iterator[None]:
    """Inside, running out of device memory becomes an InputError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        config = strategy.config
        said = (
            f"{strategy.model.device} has too little memory for --micro-batch {strategy.micro_batch} rows of "
            f"{config.seq_len} tokens"
        )
        if config.plan is not None:
            said += "; say in the fleet file how much it really has (memory:) and make the plan again"
        else:
            said += "; lower it (the result stays the same), or add --recompute"
        raise InputError(said) from error


@contextmanager
def without_long_collections() -> Iterator[None]:
    """Keep Python's garbage collector from scanning the hundred thousands of objects that a run begins with.

    Each scan takes a tenth of a second, at another moment on every rank, and all others wait for it.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def stop_requests(state: RunState) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a stop, so that the step in hand ends and is saved; a second one stops at once.

    The request stays in `state`, as ranks may regroup before it is answered. When other ranks exited, SIGTERM goes on
    to ask, so that it ends no rank that is about to say why.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may catch signals
        return

    def ask(number: int, frame: Any) -> None:
        if state.asked_to_stop:
            raise KeyboardInterrupt("stopped at once; the newest checkpoint is whole")
        state.asked_to_stop = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (
        CommunicationError
    ):  # torchrun ends those that are left within a moment: they still have to say what happened
        before.pop(signal.SIGTERM)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
