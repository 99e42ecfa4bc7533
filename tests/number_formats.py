"""Gradients of workers that compute in number formats of their own."""

import dataclasses
import random
from typing import Any

import torch
from layouts import ROWS, settings
from spawned_ranks import on_ranks
from tiny_models import DEEP, FEW, Rows, error, random_model

from motley.fleet.device import ACTIVATIONS, Format
from motley.model import ModelConfig, experts
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Layout
from motley.parallel.rank import Ranks
from motley.train.step import LossWeights, accumulate

Case = tuple[ModelConfig, Layout, int, list[Format], list[float]]
SMOOTH = dataclasses.replace(DEEP, num_experts_per_tok=DEEP.n_routed_experts)
"""All experts are chosen: no rounding can tip a router's choice, which would be another model's gradient."""


def employed(
    comm: Communicator, shape: ModelConfig, layout: Layout, seed: int, formats: list[Format], scales: list[float]
) -> Ranks:
    experts.PAD = FEW
    ranks = Ranks(shape, settings(), layout, comm, formats=formats)
    ranks.scaler.values = list(scales)
    whole = random_model(seed, shape).state_dict() if comm.leads else None
    ranks.take_state(None if whole is None else (dict(whole), {}))
    return ranks


def first_gradients(comm: Communicator, cases: list[Case]) -> list[Any]:
    """Of every case: (this worker's parts of the first step's gradient, culprits)."""
    results = []
    for case in cases:
        ranks = employed(comm, *case)
        losses, _ = ranks.gradient(ranks.read(Rows(), 0))  # type: ignore[arg-type]
        parts = [part for part in ranks.buffers.trained if part.owner == comm.rank]
        gradient = [(part, ranks.buffers.view(part).grad) for part in parts]
        results.append(
            ([(p.name, p.start, p.stop, grad.clone()) for p, grad in gradient if grad is not None], losses.culprits)
        )
    return results


def distances(size: int, cases: list[Case], reference: Format = "fp32") -> list[float]:
    """How far the gradient of each case is from a single process's in one format, relative to its length."""
    by_worker = on_ranks(size, first_gradients, cases)
    found = []
    for index, (shape, _, seed, *_) in enumerate(cases):
        model = random_model(seed, shape)
        model.compute_dtype = ACTIVATIONS[reference]
        model.train_in_fp8(reference == "fp8")
        accumulate(model, Rows().rows(0, ROWS), 2, LossWeights(0.3, 0.05), confined=True)
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        whole = {name: torch.full_like(grad, torch.nan) for name, grad in expected.items()}
        for worker in by_worker:
            parts, broke = worker[index]
            assert broke == []
            for name, start, stop, grad in parts:
                whole[name][start:stop] = grad.view_as(whole[name][start:stop])
        flat = [torch.cat([side[name].flatten() for name in expected]) for side in (whole, expected)]
        found.append(error(*flat))
    return found


def for_groups(layout: Layout, size: int, chance: random.Random, choices: list[Any]) -> list[Any]:
    """One of `choices` for every worker, the same within an expert group."""
    chosen: list[Any] = [None] * size
    for ranks in layout.expert_groups():
        one = chance.choice(choices)
        for rank in ranks:
            chosen[rank] = one
    return chosen
