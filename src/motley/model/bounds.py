"""Token ids are looked up as places in memory: what lies outside of the vocabulary is refused with a sentence."""

import torch
from torch import Tensor

from motley.errors import InputError


def check_tokens(tokens: Tensor, vocabulary: int, what: str, places: Tensor | None = None) -> None:
    """Raises InputError for the first of `tokens` (any shape, whole numbers) that is not in [0, vocabulary).

    Waits for the device once.

    what: they are, for the message. places: [tokens], where each stood among all, if some were left out.
    """
    if not tokens.numel():
        return
    lowest, highest = torch.stack(torch.aminmax(tokens)).tolist()
    if lowest >= 0 and highest < vocabulary:
        return
    flat = tokens.flatten()
    first = int(((flat < 0) | (flat >= vocabulary)).nonzero()[0])
    place = first if places is None else int(places[first])
    raise InputError(
        f"{what} {int(flat[first])} at position {place} is outside of the model's vocabulary of {vocabulary} tokens; "
        "text and model must come from the same tokenizer"
    )
