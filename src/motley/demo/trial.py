"""How long will it take? Run a few real steps and see."""

import statistics
import time

import torch

from motley.data.stream import Batch
from motley.data.tasks import FAMILIES, make_problems
from motley.fleet.device import Format
from motley.model import ModelConfig, Transformer
from motley.train.config import TrainingConfig
from motley.train.strategy import SingleProcess

PROBLEMS = 2000  # drawn to see how fast Python is
PROBLEMS_SECONDS = 0.115  # that this took where the stages beside training were measured
MOST_TIMES = (0.25, 20.0)  # a moment in which nothing went is not believed
WARM_UP = 2  # first steps allocate memory and pick kernels


def step_seconds(
    shape: ModelConfig,
    config: TrainingConfig,
    device: torch.device,
    number_format: Format,
    steps: int = 6,
    within: float = float("inf"),
) -> tuple[float, float]:
    """Median seconds of one training step of this model at these settings, on random tokens.

    Returns those of its passes, forward and backward, and those of clipping and of the update.

    Args:
        shape: of the model.
        config: settings of the stage.
        device: where it computes.
        number_format: what it computes in.
        steps: that are measured, after two that are not.
        within: seconds after which no further step is begun, once one was measured.
    """
    model = Transformer(shape)
    model.initialize(config.seed)
    strategy = SingleProcess(model.to(device), config, number_format)
    ids = torch.randint(
        shape.vocab_size, (config.batch_rows, config.seq_len), generator=torch.Generator().manual_seed(0)
    )
    documents = torch.arange(config.seq_len).div(64, rounding_mode="floor").expand_as(ids).contiguous()
    batch = Batch(ids, ids.roll(-1, dims=1), documents)
    times: list[tuple[float, float]] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = now()
    while len(times) < WARM_UP + steps and (len(times) <= WARM_UP or now() - began < within):
        started = now()
        losses, norm = strategy.gradient(batch)
        passed = now()
        strategy.update(losses, norm, 0.0)
        times.append((passed - started, now() - passed))
    passes, updates = zip(*times[WARM_UP:], strict=True)
    return statistics.median(passes), statistics.median(updates)


def slowness() -> float:
    """How many times slower than the machine of `PROBLEMS_SECONDS` this one is at what is no training."""
    started = time.perf_counter()
    for _ in make_problems(tuple(FAMILIES), PROBLEMS, seed=0):
        pass
    least, most = MOST_TIMES
    return min(max((time.perf_counter() - started) / PROBLEMS_SECONDS, least), most)
