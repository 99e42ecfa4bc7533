"""A whole number in parts proportional to weights."""

import math
from collections.abc import Sequence


def apportion(whole: int, weights: Sequence[float], most: bool = False) -> list[int]:
    """`whole` in parts proportional to `weights`, by largest remainder; with `most`, no part exceeds its weight."""
    total = sum(weights)
    if total == 0:
        return [0] * len(weights)
    exact = [whole * weight / total for weight in weights]
    parts = [math.floor(part) for part in exact]
    order = sorted(range(len(weights)), key=lambda i: (parts[i] - exact[i], i))
    for index in order[: whole - sum(parts)]:
        parts[index] += 1
    if most and any(part > weight for part, weight in zip(parts, weights, strict=True)):
        raise ValueError("the weights are too small for the whole")
    return parts
