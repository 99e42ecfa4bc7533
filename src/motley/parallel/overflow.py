"""Which ranks made numbers that are not finite, from what all ranks saw; only those lower their loss scale."""

from collections.abc import Iterable, Sequence

from torch import Tensor


def culprits(seen: Tensor, groups: Iterable[Sequence[int]]) -> list[int]:
    """Ranks where numbers that are not finite came from, of groups that exchange numbers within each pass.

    seen: [ranks, 4], above 0 where a rank saw what is not finite: in what it made in forward passes, in the
        activations it received, in its gradient, in the gradients it received.
    """
    found: list[int] = []
    for ranks in groups:
        made, received, gradient, received_gradient = (seen[list(ranks)].sum(0) > 0).tolist()
        if (made and not received) or (gradient and not received and not received_gradient):
            found += ranks
    return sorted(found)
