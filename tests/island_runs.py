"""Islands that train without the guards of the loop."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tiny_models import DEEP, FEW, Rows, random_model

from motley.model import experts
from motley.parallel.communicator import Communicator
from motley.parallel.diloco.diloco import Diloco, OuterStep
from motley.parallel.layout import Layout, PipelineGroup, side_by_side
from motley.parallel.rank import Ranks
from motley.train.config import PretrainConfig

Skipped = tuple[int, int] | None
SHAPE = dataclasses.replace(DEEP, num_hidden_layers=3)
PIPELINE = Layout((PipelineGroup(((0, 1),), (1, 2), micro_batch=2),), zero=1)


def settings(**chosen: Any) -> PretrainConfig:
    """With a slow bias: at the speed of so short a run, a number rounded the other way may change a token's experts."""
    return PretrainConfig(
        **{"batch_rows": 6, "micro_batch": 2, "seq_len": 12, "steps": 4, "confine_to_document": True, "clip": 0.5,
           "inner_steps": "planned", "outer_bits": 32, "bias_speed": 1e-3} | chosen
    )  # fmt: skip


def island_of(comm: Communicator, sizes: Sequence[int], speeds: Sequence[float], config: PretrainConfig, every: int,
              layouts: dict[int, Layout], seed: int = 3) -> Any:  # fmt: skip
    experts.PAD = FEW
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts = [tuple(range(first, first + size)) for first, size in zip(firsts, sizes, strict=True)]
    number = next(number for number, part in enumerate(parts) if comm.rank in part)
    layout = layouts.get(number) or side_by_side(sizes[number], SHAPE.num_hidden_layers, 2, int(sizes[number] > 1))  # type: ignore[arg-type]
    own = comm.part(parts) if len(parts) > 1 else comm
    ranks = Ranks(SHAPE, config, layout, own)
    island = Diloco(ranks, comm, parts, speeds, every) if len(parts) > 1 else ranks
    island.take_state((dict(random_model(seed, SHAPE).state_dict()), {}) if comm.leads else None)
    return island


def learn(
    island: Diloco | Ranks, until: int, seconds: float = 0.01, skipped: Skipped = None, start: int = 0
) -> list[OuterStep]:
    """Steps of the trainer without its guards, each of so many seconds; what each outer step said.

    start: the run's step where ranks without islands begin.
    """
    outer_steps, taken = [], 0
    while (island.step if isinstance(island, Diloco) else start + taken) < until:
        losses, norm = island.gradient(island.read(Rows(), start + taken))  # type: ignore[arg-type]
        learned = isinstance(island, Ranks) or (island.number, taken) != skipped
        if learned:
            island.update(losses, norm, 0.01)
        taken += 1
        if isinstance(island, Ranks):
            island.share_rows()
            continue
        island.ranks.share_rows()
        if (outer := island.moved(losses.tokens, learned, seconds)) is not None:
            outer_steps.append(outer)
    return outer_steps
