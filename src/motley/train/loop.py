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

    step_tokens = config.batch_rows * config.seq_len
    due = False  # a checkpoint is
    model.train()
    with (
        MetricsWriter(run, at.step) as metrics,
        Progress(title, config.steps * step_tokens, "tokens", done=at.step * step_tokens) as bar,
        stop_requests() as stop,
    ):
        while at.step < config.steps or due:
            facts = {"step": at.step, "position": asdict(at), "guard": asdict(guard)}
            started = time.perf_counter()
            try:
                losses, norm = _gradient(model, optimizer, train_rows, config, at.step)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{model.device} has too little memory for --micro-batch {config.micro_batch} rows of "
                    f"{config.seq_len} tokens; lower it (the result stays the same), or add --recompute"
                ) from error
            finite = losses.finite and math.isfinite(norm)
            reason = guard.verdict(losses.main, norm, finite)
            ended = at.step == config.steps
            # Behind the last step nothing is learned: there a single odd batch says nothing against the weights.
            proven = reason is None or (ended and finite and guard.skipped_in_a_row == 1)
            if ended and not proven:
                raise _stuck(run, at.step, reason)
            if proven and at.step and (due or stop.is_set()):
                metrics.flush()  # what stands in a checkpoint's past must never be missing from the metrics
                save_checkpoint(run, model, optimizer, facts, tokenizer)
                prune(run, config.keep_last, at.best_step)
                due = False
            if ended:
                break
            if stop.is_set():
                there = "from there" if proven else "from its newest checkpoint, before the steps that were skipped"
                raise KeyboardInterrupt(f"stopped after step {at.step}; the same command goes on {there}")
            if reason is None:
                _update(model, optimizer, losses, config, at.step)
            at.step, at.tokens = at.step + 1, at.tokens + losses.tokens
            elapsed = time.perf_counter() - started
            at.seconds += elapsed
            where: dict[str, Any] = {"step": at.step, "tokens": at.tokens, "seconds": at.seconds}
            metrics.write(
                "train", **where, **_numbers(losses, norm, config, at.step, step_tokens / elapsed, model.device)
            )
            if reason:
                metrics.write("event", **where, message=f"step skipped: {reason}")
            if guard.exhausted:
                raise _stuck(run, at.step, f"{reason}, {guard.skipped_in_a_row} steps in a row")
            last = at.step == config.steps
            if last or at.step % config.valid_every == 0:
                held_out = _validate(model, valid_rows, config, at, token_bytes, metrics, losses)
                if last and not math.isfinite(held_out):
                    raise _stuck(run, at.step, f"held-out loss {held_out:g} is not finite")
            due = due or last or at.step % config.checkpoint_every == 0
            bar.advance(step_tokens, loss=losses.main)
    model.eval()
    with whole_folder(run / "model") as folder:
        write_weights(model, folder)
        save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    return at


def _gradient(
    model: Transformer, optimizer: Optimizer, rows: TokenStream, config: TrainingConfig, step: int
) -> tuple[StepLosses, float]:
    """Losses of a step, and the norm of its gradient, which is left clipped in the parameters' .grad."""
    optimizer.zero_grad()
    batch = rows.rows(step * config.batch_rows, config.batch_rows)
    weights = LossWeights(config.mtp_weight, config.balance_weight)
    losses = accumulate(model, batch, config.micro_batch, weights, config.confine_to_document)
    return losses, float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))


def _update(
    model: Transformer, optimizer: Optimizer, losses: StepLosses, config: TrainingConfig, step: int
) -> None:  # fmt: skip
    scale = factor(step, config.steps, config.schedule, config.warmup_steps, config.decay_share, config.final_share)
    optimizer.step(config.learning_rate * scale)
    for gate, counts in zip(model.gates(), losses.expert_counts, strict=False):
        gate.rebalance(counts, config.bias_speed)


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
    scale = factor(step - 1, config.steps, config.schedule, config.warmup_steps, config.decay_share, config.final_share)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    return {
        "loss": losses.main, "mtp_loss": losses.mtp, "balance_loss": losses.balance,
        "learning_rate": config.learning_rate * scale, "grad_norm": norm, "tokens_per_second": rate,
        "memory_bytes": memory,
    }  # fmt: skip


def _validate(
    model: Transformer, valid_rows: TokenStream, config: TrainingConfig, at: Position, token_bytes: Any,
    metrics: MetricsWriter, losses: StepLosses,
) -> float:  # fmt: skip
    """Measure and write down; returns the held-out loss in nats per token."""
    started = time.perf_counter()
    read = validate(model, valid_rows, config.valid_rows, token_bytes, config.confine_to_document)
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
