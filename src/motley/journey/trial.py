"""How long will it take? Run a few real steps and see."""

import statistics
import time

import torch

from motley.data.stream import Batch
from motley.model import ModelConfig, Transformer
from motley.train.config import TrainingConfig
from motley.train.optimizer import Optimizer
from motley.train.step import LossWeights, accumulate

WARM_UP = 2  # first steps allocate memory and pick kernels


def step_seconds(
    shape: ModelConfig, config: TrainingConfig, device: torch.device, dtype: torch.dtype, steps: int = 6
) -> float:
    """Median seconds of one training step of this model at these settings, on random tokens."""
    model = Transformer(shape)
    model.initialize(config.seed)
    model.to(device)
    model.compute_dtype = dtype
    optimizer = Optimizer(model.named_parameters(), config.optimizer, config.weight_decay, dtype, config.embedding_rate)
    ids = torch.randint(
        shape.vocab_size, (config.batch_rows, config.seq_len), generator=torch.Generator().manual_seed(0)
    )
    documents = torch.arange(config.seq_len).div(64, rounding_mode="floor").expand_as(ids).contiguous()
    batch = Batch(ids, ids.roll(-1, dims=1), documents)
    times: list[float] = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        optimizer.zero_grad()
        accumulate(model, batch, config.micro_batch, LossWeights(config.mtp_weight), config.confine_to_document)
        float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        optimizer.step(0.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])
