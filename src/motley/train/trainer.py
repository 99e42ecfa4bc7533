"""The training loop both stages share.

rows at step * batch_rows ──▶ accumulate (exact gradient) ──▶ guard ──▶ clip ──▶ optimizer ──▶ router bias
         ▲                                                      │ skip: say so, go on (fp16 overflowed: with a
         │                                                      │ lower loss scale)
         └── position is just the step: resuming needs no more ─┘      every so often: validate, checkpoint

An update can break the weights, and only the next gradient shows it. So a checkpoint is written between the next
gradient and its update: what is on disk was seen to give a finite loss and gradient.

Islands go through this loop each at its own pace and agree on things only between rounds: there they stop, validate and
save. A run of one crew is always between rounds.
"""

import dataclasses
import gc
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motley.data.stream import TokenStream
from motley.data.tokenizer import Tokenizer
from motley.errors import CrewError, InputError
from motley.parallel.consistency import COMPARE_EVERY
from motley.parallel.diloco.diloco import Island, Meeting
from motley.parallel.telemetry.comm_bound import Exchange
from motley.parallel.telemetry.dashboard import crew_table
from motley.parallel.telemetry.step_stats import everyones_spans, introduction, is_drawn, memory_bytes, rounded
from motley.progress import Progress, note
from motley.train.checkpoint import checkpoints, prune, restore, save_checkpoint, save_model
from motley.train.config import TrainingConfig
from motley.train.expert_balance import Balance, imbalance
from motley.train.loss_spike import Guard
from motley.train.lr_schedule import factor
from motley.train.metrics import MetricsWriter, Recent, Silence, records_of
from motley.train.slow_step import Pace
from motley.train.step import StepLosses
from motley.train.validation import validate


@dataclass
class Position:
    """How far a run is: everything besides model and optimizer that going on exactly needs."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float = 1e30  # JSON knows no infinity
    best_bits_per_byte: float = 1e30


@dataclass
class Course:
    """Where a run stands between two steps: with model and optimizer all that going on needs.

    A step changes it in one go, once the sums over all rows are there, so that a worker which loses the others holds
    the state after a whole number of steps.

    Attributes:
        at: how far it is.
        guard: what is usual.
        due: a checkpoint is to be written.
        unseen: the model is to be validated.
        pace: how long things usually take.
        load: routed tokens per expert of the last step, one tensor per MoE layer.
        recent: records of the last steps.
        news: what the metrics are to say before the next step.
        exchange: whether messages take most of the steps.
        balance: whether the experts are used.
        asked: this worker was asked to stop; kept from one crew to the next.
    """

    at: Position = field(default_factory=Position)
    guard: Guard = field(default_factory=Guard)
    due: bool = False
    unseen: bool = False
    pace: Pace = field(default_factory=Pace)
    load: list[Tensor] = field(default_factory=list)
    recent: list[dict[str, Any]] = field(default_factory=list)
    news: list[str] = field(default_factory=list)
    exchange: Exchange = field(default_factory=Exchange)
    balance: Balance = field(default_factory=Balance)
    asked: bool = False

    @property
    def written(self) -> int:
        """The step up to which the metrics are surely on disk."""
        return min([self.at.step, *(record["step"] - 1 for record in self.recent)])


def begin(island: Island) -> Course:
    """Where the newest checkpoint of the run left off, or the beginning; every worker calls this."""
    if (known := restore(island.settings.out, island)) is None:
        return Course()
    island.worker.scales.restore(known[1]["scales"])
    at = Position(**known[0]["position"])
    recent = records_of(island.settings.out, at.step) if island.settings.live else []
    balance = Balance(**known[1].get("balance", {}))  # checkpoints from before there was one
    return Course(at, Guard(**known[1]["guard"]), recent=recent, balance=balance)


@contextmanager
def short_pauses() -> Iterator[None]:
    """Python's collector does not look again and again at the hundred thousands of objects that a run begins with.

    Each time it does is a tenth of a second, at other moments in every worker, in which all others wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def train(
    island: Island, course: Course, train_rows: TokenStream, valid_rows: TokenStream, tokenizer: Tokenizer, title: str
) -> Position:
    """Train for settings.steps steps in the run folder settings.out, going on from where `course` is.

    Every worker calls this; worker 0 of all writes the folder and talks to people.

    Raises InputError when the run cannot go on (loss stays broken, a checkpoint of something else, full disk),
    KeyboardInterrupt after Ctrl-C or SIGTERM, once a checkpoint is written, and CrewError when workers are lost.
    """
    worker, world, crew, config = island.worker, island.world, island.worker.crew, island.settings
    run = config.out
    at = course.at
    token_bytes = tokenizer.token_bytes()

    step_tokens = config.batch_rows * config.seq_len
    met = dataclasses.replace(at)  # where the round began
    pace, told_of_torchrun = course.pace, False
    worker.model.train()
    with (
        MetricsWriter(run, course.written) if world.leads else Silence() as file,
        Progress(title, config.steps * step_tokens, "tokens", done=at.step * step_tokens, shown=world.leads) as bar,
        stop_requests(course) as asked,
        short_pauses(),
    ):
        metrics = Recent(file, course.recent)
        if (forgotten := world.share(file.forgotten)) > at.step:
            course.news.append(
                f"steps {at.step + 1} to {forgotten} are computed again, from the state after step {at.step}"
            )
        if course.news:
            metrics.write("event", **_where(at), message="; ".join(course.news))
            course.news = []
        if not world.alone:
            rows = len(island.round.rows_of(island.number))
            about = introduction(world, worker.place, rows, config.plan is not None, island.number)
            metrics.write("crew", **_where(at), **about)
            bar.beneath(lambda: crew_table(about, island.timing))
        began = time.perf_counter()
        while at.step < config.steps or course.due:
            remarks: list[str | None] = []
            if course.unseen:
                held_out = _validate(island, valid_rows, at, token_bytes, metrics, course.load)
                remarks.append(pace.remark("validation", time.perf_counter() - began))
                course.unseen = False
                if at.step == config.steps and not math.isfinite(held_out):
                    raise _stuck(run, at.step, f"held-out loss {held_out:g} is not finite")
                began = time.perf_counter()
            own_facts = {
                "guard": asdict(course.guard), "scales": asdict(worker.scales), "balance": asdict(course.balance),
            }  # fmt: skip
            facts = {"step": at.step, "position": asdict(at)}
            stop = island.between_rounds and world.stopping(asked.is_set())
            started, rows = time.perf_counter(), island.rows
            ended = at.step == config.steps
            while True:
                try:
                    losses, norm = worker.gradient(train_rows, at.step, rows)
                except torch.OutOfMemoryError as error:
                    raise InputError(_too_little_memory(island)) from error
                overflow = worker.scales.follow(losses.culprits)
                if overflow is None or not (ended or stop):
                    break  # otherwise this gradient has to prove the weights: once more, with a lower loss scale
            finite = losses.finite and math.isfinite(norm)
            guard = dataclasses.replace(course.guard)
            reason = overflow or guard.verdict(losses.main, norm, finite)
            if reason and not overflow:
                reason += worker.scales.hopeless(losses.culprits)
            # Behind the last step nothing is learned: there a single odd batch says nothing against the weights.
            proven = reason is None or (ended and finite and guard.skipped_in_a_row == 1)
            paused = time.perf_counter()
            settling = island.between_rounds and (ended or course.due or stop)
            if settling:
                proven = island.everywhere(proven)
            if ended and not proven:
                raise _stuck(run, at.step, reason or "another island's loss or gradient is broken")
            if settling and proven and at.step:
                worker.compare_copies(at.step)  # a checkpoint holds one of them
                metrics.flush()  # what stands in a checkpoint's past must never be missing from the metrics
                save_checkpoint(run, island, facts, own_facts, tokenizer)
                prune(run, island, config.keep_last, at.best_step)
                course.due = False
                remarks.append(pace.remark("checkpoint", time.perf_counter() - paused))
            if ended:
                break
            if stop:
                there = "from there" if proven else "from its newest checkpoint, before the steps that were skipped"
                raise KeyboardInterrupt(f"stopped after step {at.step}; the same command goes on {there}")
            paused = time.perf_counter() - paused
            if reason is None:
                worker.update(losses, norm, _learning_rate(config, at.step))
            lost = None
            try:
                compared = _passes(at.step, at.step + 1, COMPARE_EVERY)
                worker.share_again(at.step + 1 if compared else None)
            except CrewError as error:  # the step is learned: it is counted and written down before all part
                lost = error
            elapsed = time.perf_counter() - started - paused
            took = time.perf_counter() - began - paused
            meeting = island.moved(losses.tokens, reason is None, elapsed)
            course.guard, course.load = guard, losses.expert_counts
            before, at.step = at.step, island.step
            at.tokens = met.tokens + meeting.tokens if meeting else at.tokens + losses.tokens
            now = time.perf_counter()
            at.seconds += now - began
            began = now
            where = _where(at)
            rate = len(rows) * config.seq_len / elapsed
            learning_rate = _learning_rate(config, before)
            numbers = _numbers(losses, norm, learning_rate, rate, crew.device)
            if (length := config.length(before)) < config.seq_len:
                numbers["sequence_length"] = length
            uneven = [imbalance(counts) for counts in losses.expert_counts]
            if uneven:
                numbers["imbalance"] = [round(value, 3) for value in uneven]
            if crew.alone and worker.scales.workers:
                numbers["loss_scale"] = worker.scales.values[0]
            metrics.write("train", **where, **numbers)
            if reason:
                metrics.write("event", **where, message=f"step skipped: {reason}")
            if island.between_rounds:
                last = at.step == config.steps
                course.unseen = last or _passes(met.step, at.step, config.valid_every)
                course.due = course.due or last or _passes(met.step, at.step, config.checkpoint_every)
                met = dataclasses.replace(at)
            if lost is not None:
                raise lost
            if not crew.alone:
                _write_step(metrics, where, island)
            complaints = worker.budgets.exceeded(worker.timing.memory) if worker.budgets else []
            if not crew.alone and island.count == 1:
                complaints += course.exchange.complaint(worker.timing, config)
            for message in complaints:
                metrics.write("event", **where, message=message)
                if crew.leads:
                    note(message)
            remarks += course.balance.complaint(uneven, worker.config, config.steps, config.bias_speed)
            remarks.append(pace.remark("step", took, "worker", () if crew.alone else worker.timing.own_seconds))
            if meeting:
                _write_round(metrics, where, island, meeting)
                busy = [ledger.busy_seconds for ledger in meeting.ledgers]
                remarks.append(pace.remark("round", meeting.seconds, "island", busy))
            if world.orphaned and not told_of_torchrun:
                told_of_torchrun = True
                remarks.append("torchrun is gone: the workers go on, but nobody would start them again")
            for message in filter(None, remarks):
                metrics.write("event", **where, message=message)
                if world.leads:
                    note(message)
            if guard.exhausted:
                raise _stuck(run, at.step, f"{reason}, {guard.skipped_in_a_row} steps in a row")
            shown = {"busiest expert": f"{max(uneven) / len(losses.expert_counts[0]):.0%}"} if uneven else {}
            bar.advance((at.step - before) * step_tokens, loss=losses.main, **shown)
    worker.model.eval()
    save_model(run / "model", island, tokenizer)
    return at


def _too_little_memory(island: Island) -> str:
    config, worker = island.settings, island.worker
    rows = worker.lane.place.team.micro_batch
    said = f"{worker.model.device} has too little memory for --micro-batch {rows} rows of {config.seq_len} tokens"
    if config.plan is not None:
        return f"{said}; say in the fleet file how much it really has (memory:) and make the plan again"
    return f"{said}; lower it (the result stays the same), or add --recompute"


def _where(at: Position) -> dict[str, Any]:
    return {"step": at.step, "tokens": at.tokens, "seconds": at.seconds}


def _passes(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies behind `before` and not behind `now`."""
    return before // every < now // every


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
    losses: StepLosses, norm: float, learning_rate: float, rate: float, device: torch.device
) -> dict[str, Any]:
    return {
        "loss": losses.main, "mtp_loss": losses.mtp, "balance_loss": losses.balance,
        "learning_rate": learning_rate, "grad_norm": norm, "tokens_per_second": rate,
        "memory_bytes": memory_bytes(device),
    }  # fmt: skip


def _validate(
    island: Island, valid_rows: TokenStream, at: Position, token_bytes: Any, metrics: Recent, load: list[Tensor]
) -> float:
    """Measure and write down; returns the held-out loss in nats per token."""
    started = time.perf_counter()
    read = validate(island.held_out_loss, valid_rows, island.settings.valid_rows, token_bytes)
    at.seconds += time.perf_counter() - started
    metrics.write("valid", **_where(at), loss=read.nats_per_token, bits_per_byte=read.bits_per_byte)
    shares = [(counts / counts.sum().clamp(min=1)).tolist() for counts in load]
    metrics.write("experts", **_where(at), load=shares)
    if read.nats_per_token < at.best_loss:
        at.best_loss, at.best_bits_per_byte, at.best_step = read.nats_per_token, read.bits_per_byte, at.step
    return read.nats_per_token


def _write_step(metrics: Recent, where: dict[str, Any], island: Island) -> None:
    """What the workers of a crew did; of an island, whose rounds say that, only when they did what in a few steps."""
    worker, one_crew = island.worker, island.count == 1
    if one_crew:
        metrics.write("workers", **where, **worker.timing.numbers(), loss_scales=worker.scales.values)
    if is_drawn(where["step"], island.settings.steps):
        spans, seconds = everyones_spans(worker.crew, worker.timing.step_seconds), worker.timing.step_seconds
        whose = {} if one_crew else {"island": island.number}
        metrics.write("timeline", **where, **whose, step_seconds=seconds, spans=spans)


def _write_round(metrics: Recent, where: dict[str, Any], island: Island, meeting: Meeting) -> None:
    """What the workers of all islands did."""
    timing = meeting.timing
    metrics.write("workers", **where, round=meeting.number, **timing.numbers(), loss_scales=meeting.loss_scales)
    rounds = math.ceil(island.settings.steps / island.every)
    if is_drawn(math.ceil(where["step"] / island.every), rounds):
        spans = [rounded(row) for row in meeting.spans]
        metrics.write("timeline", **where, round=meeting.number, step_seconds=timing.step_seconds, spans=spans)
    metrics.write("islands", **where, **meeting.numbers())


@contextmanager
def stop_requests(course: Course) -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that the step in hand ends and is saved; a second one stops at once.

    What was asked stays with the course: a crew may end for another reason before it is done. When others are lost,
    SIGTERM goes on to ask, so that it ends nobody who is about to say so.
    """
    stop = threading.Event()
    if course.asked:
        stop.set()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may catch signals
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt("stopped at once; the newest checkpoint is whole")
        stop.set()
        course.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except CrewError:  # torchrun ends those who are left, within a moment: they still have to say what happened
        before.pop(signal.SIGTERM)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
