"""What loss a budget buys, by laws fitted to runs of motley's own: one for dense models, one for sparse.

    loss(N, D) = floor + a / N^alpha + b / D^beta           (Hoffmann et al. 2022, arXiv 2203.15556, 3.3)

N are the parameters that a token is multiplied by, D the tokens learned from. A law holds for the text, the vocabulary
and the recipe of its runs; for others it says which budget is the better one rather than what the loss will be. The
runs are small (`losses.yaml`), so what lies far beyond them is not said at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from motley.errors import InputError
from motley.plan.network.flops import multiplying_parameters
from motley.plan.network.spec import NetworkSpec

MOST_BEYOND = 1000.0  # times the compute of a law's largest run, up to which it is asked
POWERS = (0.02, 1.5)  # among which exponents are looked for
GRID, ROUNDS = 25, 6
SPARSE, DENSE = "sparse", "dense"


@dataclass(frozen=True)
class FittedRun:
    """One finished run: parameters that multiply a token, tokens, held-out loss in nats per token."""

    parameters: float
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        return 6 * self.parameters * self.tokens


@dataclass(frozen=True)
class LossLaw:
    """The loss by parameters and tokens.

    Attributes:
        floor, a, alpha, b, beta: as in the module's docstring.
        runs: how many it was fitted to.
        largest_flops: compute of the largest of them.
        error: root of the mean square of relative errors there.
        about: text, vocabulary and recipe of the runs, in words.
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    runs: int
    largest_flops: float
    error: float
    about: str

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def best_split(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) with the least loss for so much compute, 6 N D."""
        ratio = self.alpha * self.a / (self.beta * self.b)
        parameters = (ratio * (flops / 6) ** self.beta) ** (1 / (self.alpha + self.beta))
        return parameters, flops / 6 / parameters


def fitted(runs: Sequence[FittedRun], about: str) -> LossLaw:
    """The law with the least squares of relative errors: exponents by a grid that closes in, factors by linear algebra.

    Raises InputError where runs are too few, or alike, to tell its five numbers.
    """
    parameters, tokens, losses = (
        np.array([getattr(run, name) for run in runs]) for name in ("parameters", "tokens", "loss")
    )
    if len(runs) < 6 or len(set(parameters)) < 3 or len(set(tokens)) < 3:
        raise InputError(f"{len(runs)} runs do not fix a law of the loss; make at least 6, of 3 sizes and 3 lengths")

    def solved(alpha: float, beta: float) -> tuple[float, np.ndarray]:
        columns = np.stack([np.ones(len(runs)), parameters**-alpha, tokens**-beta], axis=1)
        size = columns.max(axis=0)
        factors, *_ = np.linalg.lstsq(columns / size / losses[:, None], np.ones(len(runs)), rcond=None)
        if factors.min() < 0:
            return np.inf, factors
        error = float(np.square(columns / size @ factors / losses - 1).mean())
        return error, factors / size

    low, high = np.full(2, np.log(POWERS[0])), np.full(2, np.log(POWERS[1]))
    best: tuple[float, float, float] = (np.inf, 1.0, 1.0)
    for _ in range(ROUNDS):
        for alpha in np.exp(np.linspace(low[0], high[0], GRID)):
            for beta in np.exp(np.linspace(low[1], high[1], GRID)):
                best = min(best, (solved(alpha, beta)[0], float(alpha), float(beta)))
        if best[0] == np.inf:
            raise InputError("no law of the loss fits these runs: it does not fall with both parameters and tokens")
        step = (high - low) / (GRID - 1)
        middle = np.log([best[1], best[2]])
        low, high = middle - 2 * step, middle + 2 * step
    error, (floor, a, b) = solved(best[1], best[2])
    largest = max(run.flops for run in runs)
    return LossLaw(float(floor), float(a), best[1], float(b), best[2], len(runs), largest, float(np.sqrt(error)), about)


def load_laws(file: Path | None = None) -> dict[str, LossLaw]:
    """Laws by kind of model, from a file, or those that motley has. Raises InputError for a file that holds none."""
    text = files("motley.plan").joinpath("losses.yaml").read_text("utf-8") if file is None else _read(file)
    try:
        laws = {kind: _law(values) for kind, values in yaml.safe_load(text)["laws"].items()}
        if not laws or set(laws) - {SPARSE, DENSE}:
            raise ValueError(f"it has laws for {', '.join(laws) or 'nothing'}, not for {SPARSE} or {DENSE} models")
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{file} holds no laws of the loss as benchmarks/scaling_law.py writes them: {str(error).splitlines()[0]}"
        ) from None
    return laws


def _law(values: Mapping[str, Any]) -> LossLaw:
    """Raises KeyError, TypeError or ValueError for values that are none of a law."""
    numbers = {name: float(value) for name, value in values.items() if name != "about"}
    law = LossLaw(**{**numbers, "runs": int(numbers["runs"]), "about": str(values["about"])})  # pyright: ignore[reportArgumentType]
    if not all(0 < getattr(law, name) < np.inf for name in ("a", "alpha", "b", "beta", "largest_flops")):
        raise ValueError("factors, powers and largest_flops must be above 0")
    return law


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--losses {file} cannot be read: {error}") from None


def expected_loss(laws: Mapping[str, LossLaw], shape: NetworkSpec, tokens: float) -> dict[str, Any] | None:
    """What a model is expected to come to after so many tokens; None where there is no law of its kind.

    Too far beyond the law's runs the loss is None, and only how far is known.
    """
    law = laws.get(SPARSE if shape.experts else DENSE)
    if law is None:
        return None
    parameters = multiplying_parameters(shape)
    beyond = 6 * parameters * tokens / law.largest_flops
    known = beyond <= MOST_BEYOND
    return {
        "nats_per_token": law.loss(parameters, tokens) if known else None,
        "with_twice_the_tokens": law.loss(parameters, 2 * tokens) if known else None,
        "times_beyond": beyond,
        "about": law.about,
    }
