"""The training loop both stages share.

rows at step * batch_rows ──▶ accumulate (exact gradient) ──▶ guard ──▶ clip ──▶ optimizer ──▶ router bias
         ▲                                                      │ skip: say so, go on
         └── position is just the step: resuming needs no more ─┘      every so often: validate, checkpoint

An update can break the weights, and only the next gradient shows it. So a checkpoint is written between the next
gradient and its update: what is on disk was seen to give a finite loss and gradient.
"""

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
from motley.errors import InputError
from motley.progress import Progress
from motley.train.config import TrainingConfig
from motley.train.guard import Guard
from motley.train.live import crew_table
from motley.train.metrics import MetricsWriter, Silence
from motley.train.schedule import factor
from motley.train.state import checkpoints, prune, restore, save_checkpoint, save_model
from motley.train.step import StepLosses
from motley.train.timing import everyones_spans, introduction, is_drawn, memory_bytes
from motley.train.validate import validate
from motley.train.worker import Worker


@dataclass
class Position:
    """How far a run is: everything besides model and optimizer that going on exactly needs."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float = 1e30  # JSON knows no infinity
    best_bits_per_byte: float = 1e30


def train(
    worker: Worker, train_rows: TokenStream, valid_rows: TokenStream, tokenizer: Tokenizer, title: str
) -> Position:
    """Train for settings.steps steps in the run folder settings.out, going on from its newest checkpoint.

    Every worker of a crew calls this; worker 0 writes the folder and talks to people.

    Raises InputError when the run cannot go on (loss stays broken, a checkpoint of something else, full disk) and
    KeyboardInterrupt after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    config, crew = worker.settings, worker.crew
    run = config.out
    at, guard = Position(), Guard()
    if (facts := restore(run, worker)) is not None:
        at, guard = Position(**facts["position"]), Guard(**facts["guard"])
    token_bytes = tokenizer.token_bytes()

    step_tokens = config.batch_rows * config.seq_len
    due = False  # a checkpoint is
    worker.model.train()
    with (
        MetricsWriter(run, at.step) if crew.leads else Silence() as metrics,
        Progress(title, config.steps * step_tokens, "tokens", done=at.step * step_tokens, shown=crew.leads) as bar,
        stop_requests() as asked,
    ):
        if not crew.alone:
            about = introduction(crew, worker.layout, config.plan is not None, config.batch_rows)
            metrics.write("crew", step=at.step, tokens=at.tokens, seconds=at.seconds, **about)
            bar.beneath(lambda: crew_table(about["names"], worker.timing))
        while at.step < config.steps or due:
            facts = {"step": at.step, "position": asdict(at), "guard": asdict(guard)}
            started = time.perf_counter()
            stop = bool(crew.sum(crew.outgoing(torch.tensor(int(asked.is_set())))))
            try:
                losses, norm = worker.gradient(train_rows, at.step)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{worker.model.device} has too little memory for --micro-batch {config.micro_batch} rows of "
                    f"{config.seq_len} tokens; lower it (the result stays the same), or add --recompute"
                ) from error
            finite = losses.finite and math.isfinite(norm)
            reason = guard.verdict(losses.main, norm, finite)
            ended = at.step == config.steps
            # Behind the last step nothing is learned: there a single odd batch says nothing against the weights.
            proven = reason is None or (ended and finite and guard.skipped_in_a_row == 1)
            if ended and not proven:
                raise _stuck(run, at.step, reason)
            if proven and at.step and (due or stop):
                metrics.flush()  # what stands in a checkpoint's past must never be missing from the metrics
                save_checkpoint(run, worker, facts, tokenizer)
                if crew.leads:
                    prune(run, config.keep_last, at.best_step)
                due = False
            if ended:
                break
            if stop:
                there = "from there" if proven else "from its newest checkpoint, before the steps that were skipped"
                raise KeyboardInterrupt(f"stopped after step {at.step}; the same command goes on {there}")
            if reason is None:
                worker.update(losses, norm, _learning_rate(config, at.step))
            worker.share_again()
            at.step, at.tokens = at.step + 1, at.tokens + losses.tokens
            elapsed = time.perf_counter() - started
            at.seconds += elapsed
            where: dict[str, Any] = {"step": at.step, "tokens": at.tokens, "seconds": at.seconds}
            metrics.write(
                "train", **where, **_numbers(losses, norm, config, at.step, step_tokens / elapsed, crew.device)
            )
            if not crew.alone:
                metrics.write("workers", **where, **worker.timing.numbers())
                if is_drawn(at.step, config.steps):
                    spans = everyones_spans(crew, worker.timing.step_seconds)
                    metrics.write("timeline", **where, step_seconds=worker.timing.step_seconds, spans=spans)
            if reason:
                metrics.write("event", **where, message=f"step skipped: {reason}")
            if guard.exhausted:
                raise _stuck(run, at.step, f"{reason}, {guard.skipped_in_a_row} steps in a row")
            last = at.step == config.steps
            if last or at.step % config.valid_every == 0:
                held_out = _validate(worker, valid_rows, at, token_bytes, metrics, losses)
                if last and not math.isfinite(held_out):
                    raise _stuck(run, at.step, f"held-out loss {held_out:g} is not finite")
            due = due or last or at.step % config.checkpoint_every == 0
            bar.advance(step_tokens, loss=losses.main)
    worker.model.eval()
    save_model(run / "model", worker, tokenizer)
    return at


def _learning_rate(config: TrainingConfig, step: int) -> float:
    return config.learning_rate * factor(
        step, config.steps, config.schedule, config.warmup_steps, config.decay_share, config.final_share
    )


def _stuck(run: Path, step: int, reason: str | None) -> InputError:
    good = checkpoints(run)
    state, model = (str(good[-1]), f"--model {good[-1]}, ") if good else ("the untrained model", "")
    return InputError(
        f"training stopped at step {step}: {reason}; the last good state is {state}; to go on from it, give the "
        f"command {model}a lower --learning-rate and another --out"
    )


def _numbers(
    losses: StepLosses, norm: float, config: TrainingConfig, step: int, rate: float, device: torch.device
) -> dict[str, Any]:
    return {
        "loss": losses.main, "mtp_loss": losses.mtp, "balance_loss": losses.balance,
        "learning_rate": _learning_rate(config, step - 1), "grad_norm": norm, "tokens_per_second": rate,
        "memory_bytes": memory_bytes(device),
    }  # fmt: skip


def _validate(
    worker: Worker, valid_rows: TokenStream, at: Position, token_bytes: Any, metrics: MetricsWriter | Silence,
    losses: StepLosses,
) -> float:  # fmt: skip
    """Measure and write down; returns the held-out loss in nats per token."""
    started = time.perf_counter()
    read = validate(worker.held_out_loss, valid_rows, worker.settings.valid_rows, token_bytes)
    at.seconds += time.perf_counter() - started
    where: dict[str, Any] = {"step": at.step, "tokens": at.tokens, "seconds": at.seconds}
    metrics.write("valid", **where, loss=read.nats_per_token, bits_per_byte=read.bits_per_byte)
    load = [(counts / counts.sum().clamp(min=1)).tolist() for counts in losses.expert_counts]
    metrics.write("experts", **where, load=load)
    if read.nats_per_token < at.best_loss:
        at.best_loss, at.best_bits_per_byte, at.best_step = read.nats_per_token, read.bits_per_byte, at.step
    return read.nats_per_token


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that the step in hand ends and is saved; a second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may catch signals
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt("stopped at once; the newest checkpoint is whole")
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
