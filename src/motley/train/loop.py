"""The training loop both stages share.

rows at step * batch_rows ──▶ accumulate (exact gradient) ──▶ guard ──▶ clip ──▶ optimizer ──▶ router bias
         ▲                                                      │ skip: say so, go on
         └── position is just the step: resuming needs no more ─┘      every so often: validate, checkpoint
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from motley.data.stream import TokenStream
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.files import whole_folder
from motley.model import Transformer
from motley.model.checkpoint import write_weights
from motley.progress import Progress
from motley.train.config import TrainingConfig
from motley.train.guard import Guard
from motley.train.metrics import MetricsWriter
from motley.train.optimizer import Optimizer
from motley.train.schedule import factor
from motley.train.state import checkpoints, prune, restore, save_checkpoint, save_tokenizer
from motley.train.step import LossWeights, StepLosses, accumulate
from motley.train.validate import validate


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
    model: Transformer, train_rows: TokenStream, valid_rows: TokenStream, tokenizer: Tokenizer, config: TrainingConfig,
    title: str,
) -> Position:  # fmt: skip
    """Train `model` for config.steps steps in the run folder config.out, going on from its newest checkpoint.

    Raises InputError when the run cannot go on (loss stays broken, a checkpoint of something else, full disk) and
    KeyboardInterrupt after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    run = config.out
    dtype = model.dtype if model.dtype == torch.bfloat16 else torch.float32
    optimizer = Optimizer(model.named_parameters(), config.optimizer, config.weight_decay, dtype)
    at, guard = Position(), Guard()
    if found := checkpoints(run):
        facts = restore(found[-1], model, optimizer)
        at, guard = Position(**facts["position"]), Guard(**facts["guard"])
    token_bytes = tokenizer.token_bytes()

    def checkpoint(metrics: MetricsWriter) -> None:
        facts = {"step": at.step, "position": asdict(at), "guard": asdict(guard)}
        metrics.flush()  # what stands in a checkpoint's past must never be missing from the metrics
        save_checkpoint(run, model, optimizer, facts, tokenizer)
        prune(run, config.keep_last, at.best_step)

    step_tokens = config.batch_rows * config.seq_len
    model.train()
    with (
        MetricsWriter(run, at.step) as metrics,
        Progress(title, config.steps * step_tokens, "tokens", done=at.step * step_tokens) as bar,
        stop_requests() as stop,
    ):
        while at.step < config.steps:
            started = time.perf_counter()
            try:
                losses, norm, reason = _step(model, optimizer, train_rows, guard, config, at.step)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{model.device} has too little memory for --micro-batch {config.micro_batch} rows of "
                    f"{config.seq_len} tokens; lower it (the result stays the same), or add --recompute"
                ) from error
            at.step, at.tokens = at.step + 1, at.tokens + losses.tokens
            elapsed = time.perf_counter() - started
            at.seconds += elapsed
            where: dict[str, Any] = {"step": at.step, "tokens": at.tokens, "seconds": at.seconds}
            metrics.write("train", **where, **_numbers(losses, norm, config, at.step, step_tokens / elapsed))
            if reason:
                metrics.write("event", **where, message=f"step skipped: {reason}")
            if guard.exhausted:
                raise InputError(
                    f"training stopped at step {at.step}: {reason}, {guard.skipped_in_a_row} steps in a row; the last "
                    f"good state is {checkpoints(run)[-1] if checkpoints(run) else 'the untrained model'}; "
                    "try a lower --learning-rate"
                )
            last = at.step == config.steps
            if last or at.step % config.valid_every == 0:
                _validate(model, valid_rows, config, at, token_bytes, metrics, losses)
            if last or stop.is_set() or at.step % config.checkpoint_every == 0:
                checkpoint(metrics)
            bar.advance(step_tokens, loss=losses.main)
            if stop.is_set() and not last:
                raise KeyboardInterrupt(f"stopped after step {at.step}; the same command goes on from there")
    model.eval()
    with whole_folder(run / "model") as folder:
        write_weights(model, folder)
        save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    return at


def _step(
    model: Transformer, optimizer: Optimizer, rows: TokenStream, guard: Guard, config: TrainingConfig, step: int
) -> tuple[StepLosses, float, str | None]:
    """One step; returns its losses, the gradient norm before clipping, and why it was skipped, if it was."""
    optimizer.zero_grad()
    batch = rows.rows(step * config.batch_rows, config.batch_rows)
    weights = LossWeights(config.mtp_weight, config.balance_weight)
    losses = accumulate(model, batch, config.micro_batch, weights, config.confine_to_document)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
    reason = guard.verdict(losses.main, norm, losses.finite)
    if reason is None:
        scale = factor(step, config.steps, config.schedule, config.warmup_steps, config.decay_share, config.final_share)
        optimizer.step(config.learning_rate * scale)
        for gate, counts in zip(model.gates(), losses.expert_counts, strict=False):
            gate.rebalance(counts, config.bias_speed)
    return losses, norm, reason


def _numbers(losses: StepLosses, norm: float, config: TrainingConfig, step: int, rate: float) -> dict[str, Any]:
    scale = factor(step - 1, config.steps, config.schedule, config.warmup_steps, config.decay_share, config.final_share)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return {
        "loss": losses.main, "mtp_loss": losses.mtp, "balance_loss": losses.balance,
        "learning_rate": config.learning_rate * scale, "grad_norm": norm, "tokens_per_second": rate,
        "memory_bytes": memory,
    }  # fmt: skip


def _validate(
    model: Transformer, valid_rows: TokenStream, config: TrainingConfig, at: Position, token_bytes: Any,
    metrics: MetricsWriter, losses: StepLosses,
) -> None:  # fmt: skip
    started = time.perf_counter()
    read = validate(model, valid_rows, config.valid_rows, token_bytes, config.confine_to_document)
    at.seconds += time.perf_counter() - started
    where: dict[str, Any] = {"step": at.step, "tokens": at.tokens, "seconds": at.seconds}
    metrics.write("valid", **where, loss=read.nats_per_token, bits_per_byte=read.bits_per_byte)
    load = [(counts / counts.sum().clamp(min=1)).tolist() for counts in losses.expert_counts]
    metrics.write("experts", **where, load=load)
    if read.nats_per_token < at.best_loss:
        at.best_loss, at.best_bits_per_byte, at.best_step = read.nats_per_token, read.bits_per_byte, at.step


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
