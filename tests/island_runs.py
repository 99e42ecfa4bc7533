"""Islands that train without the guards of the loop."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tiny_models import DEEP, FEW, Rows, random_model

from motley.model import experts
from motley.parallel.communicator import Crew
from motley.parallel.diloco.diloco import Island
from motley.parallel.layout import Layout, Team, side_by_side
from motley.parallel.rank import Worker
from motley.train.config import PretrainConfig

Skipped = tuple[int, int] | None
SHAPE = dataclasses.replace(DEEP, num_hidden_layers=3)
PIPELINE = Layout((Team(((0, 1),), (1, 2), micro_batch=2),), zero=1)


def settings(**chosen: Any) -> PretrainConfig:
    """With a slow bias: at the speed of so short a run, a number rounded the other way may change a token's experts."""
    return PretrainConfig(
        **{"batch_rows": 6, "micro_batch": 2, "seq_len": 12, "steps": 4, "confine_to_document": True, "clip": 0.5,
           "inner_steps": "planned", "outer_bits": 32, "bias_speed": 1e-3} | chosen
    )  # fmt: skip


def island_of(crew: Crew, sizes: Sequence[int], speeds: Sequence[float], config: PretrainConfig, every: int,
              layouts: dict[int, Layout], seed: int = 3) -> Island:  # fmt: skip
    experts.PAD = FEW
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts = [tuple(range(first, first + size)) for first, size in zip(firsts, sizes, strict=True)]
    number = next(number for number, part in enumerate(parts) if crew.rank in part)
    layout = layouts.get(number) or side_by_side(sizes[number], SHAPE.num_hidden_layers, 2, int(sizes[number] > 1))  # type: ignore[arg-type]
    own = crew.part(parts) if len(parts) > 1 else crew
    island = Island(Worker(SHAPE, config, layout, own), crew, parts, speeds, every)
    island.take_state((dict(random_model(seed, SHAPE).state_dict()), {}) if crew.leads else None)
    return island


def learn(island: Island, until: int, seconds: float = 0.01, skipped: Skipped = None) -> list[Any]:
    """Steps of the loop without its guards, each of so many seconds; what each meeting said."""
    worker, meetings, taken = island.worker, [], 0
    while island.step < until:
        losses, norm = worker.gradient(Rows(), 0, island.rows)  # type: ignore[arg-type]
        learned = (island.number, taken) != skipped
        if learned:
            worker.update(losses, norm, 0.01)
        worker.share_again()
        taken += 1
        if (meeting := island.moved(losses.tokens, learned, seconds)) is not None:
            meetings.append(meeting)
    return meetings
