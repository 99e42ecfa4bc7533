"""One rank's stage at work: forward and backward passes in the schedule's order, messages to the neighbouring stages.

Activations go down and their gradients up the pipeline as messages between two ranks, in the order of micro-batches, so
none needs a name.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from motley.data.stream import Batch
from motley.model import ModelConfig, Transformer
from motley.model.moe import Routing
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Coordinates
from motley.parallel.pipeline.schedule import order
from motley.parallel.pipeline.zero_bubble import defer_weight_gradients
from motley.parallel.zero.stage2 import Zero2
from motley.train.step import Counts, LossWeights, Tally, attended_documents, batch_rows, micro_batches, predicted_loss
from motley.train.validation import batch_nats

Sending = list[tuple[dist.Work | None, Tensor]]


@dataclass
class _Flight:
    """One micro-batch between its forward and its backward pass at a stage."""

    batch: Batch
    received: Tensor | None
    sent: Tensor | None
    loss: Tensor | float
    later: list[Callable[[], None]] = field(default_factory=list)


class PipelineRunner:
    """This rank's stage, at work on the rows of its replica.

    Attributes:
        span_seconds: from the first to the last piece of work of the last step, gaps of the pipeline included (but not
            the waits of `zero`): what a replica needs for its rows.
        broken: [3], above 0 where the last step had what is not finite: in what forward passes made, in activations
            received, in gradients received.
        pace: called after each piece of work with its seconds; returns seconds that it added (emulated slowness).
        zero: messages of all ranks during a micro-batch (ZeRO 2 and 3), or None.
    """

    def __init__(
        self, model: Transformer, config: ModelConfig, coordinates: Coordinates, comm: Communicator, wire: torch.dtype
    ) -> None:
        self.model, self.coordinates, self.comm, self.wire = model, coordinates, comm, wire
        self.span_seconds = 0.0
        self.broken = torch.zeros(3, device=model.device)
        self.pace: Callable[[float], float] = lambda seconds: 0.0
        self.zero: Zero2 | None = None
        self._config = config
        deferred = coordinates.group.schedule == "zero_bubble" and coordinates.group.stages > 1
        self._later = defer_weight_gradients(model) if deferred else None

    def run(
        self,
        batch: Batch,
        count: int,
        counts: Counts,
        weights: LossWeights,
        confined: bool,
        length: int,
        scale: float = 1.0,
    ) -> Tally:
        """Forward and backward passes of the replica's rows; gradients land in the parameters' .grad, times `scale`.

        Args:
            batch: the replica's rows of the step; may be empty.
            count: micro-batches to compute; more than the rows make are filled with padding that teaches nothing, so
                that ranks which share experts keep step. With `zero`: their number, over which the rows are spread.
            counts: of the whole step.
            weights: of the parts of the loss.
            confined: attention stays within documents.
            length: into sequences of so many tokens rows are cut.
            scale: this rank's loss scale, a power of two; messages carry what is not scaled.
        """
        started, waited = time.perf_counter(), self.comm.timer.waited
        batch, rows = self._cut(batch, count)
        self.broken.zero_()
        if self.zero is not None:
            self.zero.begin_step(scale)
        tally = Tally.empty(self.model.device)
        flights: dict[int, _Flight] = {}
        sending: Sending = []
        depths = bool(weights.mtp)
        for kind, micro in order(
            self.coordinates.group.schedule, self.coordinates.stage, self.coordinates.group.stages, count
        ):
            if kind == "F":
                if self.zero is not None:
                    self.zero.begin(backward=True)
                if not _any(rows[micro]):
                    continue
                part = batch_rows(batch, rows[micro], self.model.device).cut(length)
                received = (
                    None
                    if self.coordinates.first
                    else self._receive(part, self.coordinates.ranks[self.coordinates.stage - 1])
                )
                with self.working("forward", micro):
                    flight = self._forward(part, received, counts, weights, confined, depths, tally, scale)
                flights[micro] = flight
                self._look(1, received)
                self._look(0, flight.loss if flight.sent is None else flight.sent)
                if flight.sent is not None:
                    self._send(flight.sent.detach(), self.coordinates.ranks[self.coordinates.stage + 1], sending)
            elif kind == "B" and not _any(rows[micro]):
                assert self.zero is not None
                self.zero.finish()
            elif kind == "B":
                flight = flights[micro]
                grad = (
                    None
                    if self.coordinates.last
                    else self._receive(flight.batch, self.coordinates.ranks[self.coordinates.stage + 1])
                )
                with self.working("backward", micro):
                    self._look(2, grad)
                    self._backward(flight, grad, scale)
                if self.zero is not None:
                    self.zero.finish()
                if flight.received is not None:
                    assert flight.received.grad is not None
                    true = (flight.received.grad.float() / scale).to(self.wire)
                    self._send(true, self.coordinates.ranks[self.coordinates.stage - 1], sending)
                if self._later is None:
                    del flights[micro]
            else:
                with self.working("weights", micro), torch.no_grad():
                    for work in flights.pop(micro).later:
                        work()
        self._finish(sending)
        self.span_seconds = time.perf_counter() - started
        if self.zero is not None:  # each message is a wait for everyone
            self.span_seconds -= self.comm.timer.waited - waited
        return tally

    @torch.no_grad()
    def evaluate(self, batch: Batch, count: int, confined: bool) -> float:
        """Summed loss in nats of the replica's rows (0 on stages without the head); `count` as in `run`."""
        total = 0.0
        batch, rows = self._cut(batch, count)
        sending: Sending = []
        for part_rows in rows:
            if self.zero is not None:
                self.zero.begin(backward=False)
                if not _any(part_rows):
                    self.zero.finish()
                    continue
            part = batch_rows(batch, part_rows, self.model.device)
            received = (
                None
                if self.coordinates.first
                else self._receive(part, self.coordinates.ranks[self.coordinates.stage - 1])
            )
            x, _ = self._run_layers(part, received, attended_documents(part, confined))
            if self.coordinates.last:
                total += batch_nats(self.model, x, part, self.zero.predicted_loss if self.zero else predicted_loss)
            else:
                self._send(x.to(self.wire), self.coordinates.ranks[self.coordinates.stage + 1], sending)
        self._finish(sending)
        return total

    def _forward(
        self,
        part: Batch,
        received: Tensor | None,
        counts: Counts,
        weights: LossWeights,
        confined: bool,
        depths: bool,
        tally: Tally,
        scale: float,
    ) -> _Flight:
        model = self.model
        documents = attended_documents(part, confined)
        x, routings = self._run_layers(part, received, documents)
        loss: Tensor | float = 0.0
        sent = None
        if self.coordinates.last:
            further, more = model.further(x, part.input_ids, documents, part.documents) if depths else ([], [])
            if self.zero is None:
                loss = predicted_loss(model, x, further, part, counts, weights, tally, scale)
            else:
                loss = self.zero.predicted_loss(model, x, further, part, counts, weights, tally)
            routings = routings + more
        else:
            sent = x.to(self.wire)
        layers = self._config.num_hidden_layers + (self._config.num_nextn_predict_layers if depths else 0)
        moe = sum(self._config.is_moe_layer(layer) for layer in range(layers))
        loss = loss + tally.add_routings(routings, counts, weights.balance, max(1, moe))
        return _Flight(part, received, sent, loss)

    def _run_layers(
        self, part: Batch, received: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, list[Routing]]:
        """`Transformer.run_layers` of this stage."""
        model = self.model
        x = model.embed(part.input_ids) if received is None else received.to(model.dtype)
        return model.run_layers(x, model.where(part.input_ids, documents))

    def _cut(self, batch: Batch, count: int) -> tuple[Batch, Sequence[slice]]:
        """(the batch, the rows of each of `count` micro-batches)."""
        if self.zero is None:
            return _filled(batch, self.coordinates.group.micro_batch, count)
        rows = len(batch.input_ids)
        return batch, [slice(rows * number // count, rows * (number + 1) // count) for number in range(count)]

    def _backward(self, flight: _Flight, grad: Tensor | None, scale: float) -> None:
        outputs, grads = [], []
        if isinstance(flight.loss, Tensor) and flight.loss.requires_grad:
            outputs.append(flight.loss)
            grads.append(torch.full_like(flight.loss, scale))
        if flight.sent is not None:
            assert grad is not None
            outputs.append(flight.sent)
            grads.append(grad * scale)
        torch.autograd.backward(outputs, grads)
        flight.sent, flight.loss = None, 0.0
        if self._later is not None:
            flight.later = list(self._later)
            self._later.clear()

    @torch.no_grad()
    def _look(self, which: int, seen: Tensor | float | None) -> None:
        """Take note where a message or a loss is not finite."""
        if isinstance(seen, Tensor):
            self.broken[which] += ~seen.isfinite().all()

    @contextmanager
    def working(self, kind: str, micro_batch: int = -1) -> Iterator[None]:
        """Time what is done inside as work of this kind, waits inside left out, and let `pace` slow it down."""
        self._settle()
        with self.comm.timer.at(kind, micro_batch):
            started, waited = time.perf_counter(), self.comm.timer.waited
            yield
            self._settle()
            self.pace(time.perf_counter() - started - (self.comm.timer.waited - waited))

    def _settle(self) -> None:
        """Wait for a device that computes behind the host's back, so that its time is what is measured."""
        if self.comm.device.type == "cuda":
            torch.cuda.synchronize(self.comm.device)

    def _receive(self, part: Batch, source: int) -> Tensor:
        tensor = torch.empty(*part.input_ids.shape, self._config.hidden_size, dtype=self.wire, device=self.model.device)
        return self.comm.receive(tensor, source, self.comm.timeout).requires_grad_()

    def _send(self, tensor: Tensor, to: int, sending: Sending) -> None:
        """Begin to send; `sending` keeps what is under way, as much as a pipeline can hold."""
        sending += self.comm.begin_to_send(tensor, to)
        self._finish(sending, 4 * self.coordinates.group.stages)  # over an emulated link a message comes in two

    def _finish(self, sending: Sending, left: int = 0) -> None:
        limit = timedelta(seconds=self.comm.timeout)
        while len(sending) > left:
            work, _ = sending.pop(0)
            self.comm.talk("sending to the next stage", lambda: work.wait(limit) if work is not None else None)  # noqa: B023


def _any(rows: slice) -> bool:
    return rows.stop > rows.start


def _filled(batch: Batch, micro_batch: int, count: int) -> tuple[Batch, Sequence[slice]]:
    """(the batch with rows of padding behind, `count` micro-batches of it)."""
    rows = list(micro_batches(batch, micro_batch))
    missing = count - len(rows)
    if missing < 0:
        raise ValueError(f"{len(batch.input_ids)} rows do not fit {count} micro-batches of {micro_batch}")
    if missing:
        have, seq = batch.input_ids.shape
        empty = Batch(
            batch.input_ids.new_zeros(missing, seq),
            batch.targets.new_full((missing, seq), -100),
            batch.documents.new_full((missing, seq), -1),
        )
        joined = zip(
            (batch.input_ids, batch.targets, batch.documents),
            (empty.input_ids, empty.targets, empty.documents),
            strict=True,
        )
        batch = Batch(*(torch.cat(pair) for pair in joined))
        rows += [slice(have + extra, have + extra + 1) for extra in range(missing)]
    return batch, rows
