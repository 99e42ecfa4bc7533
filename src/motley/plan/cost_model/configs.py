"""How a model is laid out on equal chips, as arrays: one element a candidate, so that thousands are costed at once.

Ranks are numbered as in Megatron: tensor parallelism inside, then context, data (experts spread over it), pipeline
outside. A pipeline of `pp` stages, each cut over `tp` x `cp` chips, is one replica; there are `dp` of them.
"""

from dataclasses import dataclass, fields
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["1f1b", "zero_bubble", "dualpipe"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ParallelConfigs:
    """Candidates side by side; every field is an array [candidates] of whole numbers.

    Attributes:
        tp, cp, ep, dp, pp: degrees of tensor, context, expert, data and pipeline parallelism.
        micro_batch: sequences a replica computes at a time.
        micro_batches: how many of them each replica computes in a step.
        recompute: index into RECOMPUTES.
        schedule: index into SCHEDULES.
        chunks: model chunks per stage (interleaved 1F1B), 1 without.
        zero: 0 everything replicated, 1 optimizer state sharded, 2 gradients too, 3 weights too.
    """

    tp: Ints
    cp: Ints
    ep: Ints
    dp: Ints
    pp: Ints
    micro_batch: Ints
    micro_batches: Ints
    recompute: Ints
    schedule: Ints
    chunks: Ints
    zero: Ints

    @classmethod
    def of(cls, **values: object) -> Self:
        """Broadcast numbers and arrays to one length."""
        arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(values[field.name])) for field in fields(cls)))
        return cls(*(array.astype(np.int64) for array in arrays))

    def __len__(self) -> int:
        return len(self.tp)

    def __getitem__(self, index: object) -> "ParallelConfigs":
        return ParallelConfigs(*(np.atleast_1d(getattr(self, field.name)[index]) for field in fields(self)))

    @property
    def replica(self) -> Ints:
        """Chips of one replica."""
        return self.tp * self.cp * self.pp

    @property
    def least_micro_batches(self) -> Ints:
        """Micro-batches below which a schedule's bubble is no longer its formula's: DualPipe needs two a stage and
        direction, zero bubble one a stage to have weights' gradients to fill with."""
        dual, zero = (self.schedule == SCHEDULES.index(name) for name in ("dualpipe", "zero_bubble"))
        return np.where(self.pp > 1, np.where(dual, 2 * self.pp, np.where(zero, self.pp, 1)), 1)

    @property
    def chips(self) -> Ints:
        return self.replica * self.dp

    def row(self, index: int) -> dict[str, int | str]:
        """One candidate for people."""
        values: dict[str, int | str] = {field.name: int(getattr(self, field.name)[index]) for field in fields(self)}
        values["recompute"] = RECOMPUTES[int(self.recompute[index])]
        values["schedule"] = SCHEDULES[int(self.schedule[index])]
        return values
