"""What a training run records while it runs: metrics.jsonl, and a copy for TensorBoard.

    kind        written                 values beside step, tokens, seconds
    train       every step              loss, mtp_loss, balance_loss (nats per token), learning_rate, grad_norm,
                                        tokens_per_second, memory_bytes; imbalance: per MoE layer, MTP's last, load of
                                        the busiest expert over the mean (1 is perfect balance; MaxVio is this minus 1)
                                        (with fp16 in a single process: loss_scale)
    valid       at each validation      loss, bits_per_byte
    experts     with it                 load: share of the routed tokens per expert, one list per MoE layer
    ranks       when ranks start        of each rank: names, islands (if there are several), groups, replicas, stages;
                                        with a plan predicted_step_seconds: of a step, or of the computing in a round
    step_stats  every step of several   rows of each replica, step_seconds; of each rank tokens_per_second (of its
                ranks, or every round   replica, waits excluded), share (of the rows), busy_seconds, wait_seconds by
                of several islands      kind, other_seconds, idle_share, memory_bytes, sent_bytes, received_bytes,
                (round: its number)     link_bytes_per_second, loss_scales
    timeline    some of these steps     step_seconds; spans of each rank: kind, micro-batch, ranks waited for, start,
                and rounds              end (parallel/telemetry/step_timer.py; of a round diloco/round_stats.py). With
                                        several islands, steps are those of the first (island)
    outer_step  at each outer step      round, its steps, round_seconds; of each island inner_steps, rows [first,
                                        count], island_tokens, learned (steps not skipped), busy_seconds,
                                        waited_seconds, bytes_sent
    event       when something happens  message

With several islands, `train` is about the first one, and between two outer steps `tokens` counts only its tokens.

metrics.jsonl is the record that counts: one JSON object a line, written at once. Earlier versions called some kinds and
fields otherwise (`OLD_KINDS`, `OLD_FIELDS`); such records are read and written under their present names.
"""

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from motley.errors import InputError
from motley.files import whole_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
KINDS = ("train", "valid", "experts", "ranks", "step_stats", "timeline", "outer_step", "event")
OLD_KINDS = {"crew": "ranks", "workers": "step_stats", "islands": "outer_step"}
OLD_FIELDS = {"ranks": {"teams": "groups", "lanes": "replicas"}}
"""By the present name of a kind: old name → present name of a field."""
RECENT_STEPS = 2  # ranks that lose contact are at most one step apart
POSITION = ("step", "tokens", "seconds")  # where in the run: not curves of their own


class MetricsWriter:
    """Appends records to `folder`/metrics.jsonl and to `folder`/tensorboard.

    A run that resumes from a checkpoint removes the records after that checkpoint, so that the file reads as if the run
    had never been interrupted.

    Args:
        folder: the stage's run folder; made if missing.
        resume_step: step of the checkpoint that the run resumes from; 0 starts the file anew.

    Attributes:
        forgotten: last step whose records were removed, or 0.

    Raises:
        InputError: a line of an existing file is broken, other than a half-written last one.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._folder, self._resume_step = Path(folder), resume_step
        self._folder.mkdir(parents=True, exist_ok=True)
        self.path = self._folder / METRICS_FILE
        self.forgotten = _keep_until(self.path, resume_step)
        self._file = self.path.open("ab", buffering=0)  # the system has a record when `write` returns
        self._events: SummaryWriter | None = None  # opened with the first record: its import takes seconds

    def write(self, kind: str, *, step: int, **values: Any) -> None:
        """Write one record: `write("train", step=1, tokens=4096, seconds=1.2, loss=8.3)`.

        JSON has no NaN or infinity: such values are written as null.
        """
        kind, values = present_form(kind, values)
        if kind not in KINDS:
            raise ValueError(f"unknown kind of record {kind!r}; known are {', '.join(KINDS)}")
        record = {"kind": kind, "step": step, **{name: _finite(value) for name, value in values.items()}}
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._full_disk_in_a_sentence():
            if self._file.write(line) != len(line):
                raise OSError("no space left for a whole line")
            self._write_events(record)

    def flush(self) -> None:
        """Sync everything written so far to disk; call it before a checkpoint is declared complete."""
        with self._full_disk_in_a_sentence():
            os.fsync(self._file.fileno())
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            with self._full_disk_in_a_sentence():
                self._events.close()

    @contextmanager
    def _full_disk_in_a_sentence(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"could not write {self.path}: {reason}; free some space or choose another place"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_events(self, record: Mapping[str, Any]) -> None:
        events, step, kind = self._open_events(), record["step"], record["kind"]
        if kind == "event":
            events.add_text("event", str(record.get("message", "")), step)
            return
        if kind == "experts":
            for layer, imbalance in enumerate(imbalances(record["load"])):
                events.add_scalar(f"experts/imbalance_of_moe_layer_{layer}", imbalance, step)
            return
        if kind in ("ranks", "timeline"):
            return
        if kind == "step_stats":
            for name in ("share", "idle_share", "tokens_per_second", "loss_scales"):
                for rank, value in enumerate(record[name]):
                    events.add_scalar(f"step_stats/{name}_{rank}", value, step)
            return
        if kind == "outer_step":
            for island, waited in enumerate(record["waited_seconds"]):
                events.add_scalar(f"outer_step/waited_seconds_{island}", waited, step)
            return
        for name, value in record.items():
            if isinstance(value, int | float) and name not in POSITION:
                events.add_scalar(f"{kind}/{name}", value, step)

    def _open_events(self) -> "SummaryWriter":
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard drops events at and after `purge_step` that an earlier process left behind.
            purge_step = self._resume_step + 1
            self._events = SummaryWriter(self._folder / EVENTS_FOLDER, purge_step=purge_step, flush_secs=10)
        return self._events


class Silence:
    """In the place of a MetricsWriter on ranks that write no records."""

    forgotten = 0

    def write(self, kind: str, *, step: int, **values: Any) -> None: ...

    def flush(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class RecentRecords:
    """Records of the last two steps, kept on every rank: if rank 0 exits, another one writes what it did not.

    Args:
        writer: to which rank 0 writes at once.
        records: of the last steps, also of an earlier rank 0; they are written first, as the file may lack them.
    """

    def __init__(self, writer: MetricsWriter | Silence, records: list[dict[str, Any]]) -> None:
        self._writer, self._records = writer, records
        for record in records:
            writer.write(**record)

    def write(self, kind: str, *, step: int, **values: Any) -> None:
        """As `MetricsWriter.write`."""
        self._records[:] = [record for record in self._records if record["step"] > step - RECENT_STEPS]
        self._records.append({"kind": kind, "step": step, **values})
        self._writer.write(kind, step=step, **values)

    def flush(self) -> None:
        self._writer.flush()


def records_of(folder: Path, step: int) -> list[dict[str, Any]]:
    """The records of one step of a run: `RecentRecords` of ranks that resume after it."""
    if not (Path(folder) / METRICS_FILE).is_file():
        return []
    return [record for record in read_metrics(folder) if record["step"] == step]


def imbalances(load: list[list[float]]) -> list[float]:
    """Per MoE layer, how many times its fair share the busiest expert received; 1.0 is perfect balance.

    `load` holds the share of routed tokens per layer and expert, as in records of kind "experts".
    """
    shares = [[share or 0.0 for share in layer] for layer in load]  # a share of nothing was written as null
    return [max(layer) * len(layer) / sum(layer) if sum(layer) > 0 else 1.0 for layer in shares]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl (or of the run folder that holds it), in order.

    Records of earlier versions come under their present names. A half-written last line, as a killed process leaves it,
    is skipped.

    Raises:
        InputError: no such file, or a line that is no record, with its number.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the folder of a training run") from None
    # Every whole line ends in a newline: what follows the last one is empty or half-written.
    records = [_record(line, path, number) for number, line in enumerate(lines[:-1], start=1)]
    if old := sorted({record["kind"] for record in records} & OLD_KINDS.keys()):
        present = ", ".join(f"{kind} as {OLD_KINDS[kind]}" for kind in old)
        warnings.warn(
            f"{path} was written by an earlier version; its records are read under new names: {present}", stacklevel=2
        )
    return [upgraded(record) for record in records]


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the present names of its kind and fields, which stay in order."""
    kind, values = present_form(record["kind"], {name: value for name, value in record.items() if name != "kind"})
    return {"kind": kind, **values}


def present_form(kind: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(kind, values) of a record, under their present names."""
    kind = OLD_KINDS.get(kind, kind)
    fields = OLD_FIELDS.get(kind, {})
    return kind, {fields.get(name, name): value for name, value in values.items()}


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}, line {number} is not valid JSON ({error}); remove the line to go on") from None
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("step"), int)
        or not isinstance(record.get("kind"), str)
    ):
        raise InputError(f"{path}, line {number} is no record of a training run: it needs a kind and a step")
    return record


def _keep_until(path: Path, step: int) -> int:
    """Drop records after `step`, and a half-written last line, from the file at `path`, if there is one.

    Returns the last step of which something was dropped, or 0.
    """
    if not path.exists():
        return 0
    records = read_metrics(path)
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        kept = (record for record in records if record["step"] <= step)
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    return max((record["step"] for record in records if record["step"] > step), default=0)


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, also inside lists."""
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
