"""Counting the bytes of tensors instead of asking the system: the same number every time."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While this is on, the most bytes of tensors made since that ever lived together.

    What an operation makes and drops inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [storage for storage in (t.untyped_storage() for t in _tensors(result)) if storage._cdata not in given]
        for storage in made:
            self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if made:
            self._seen = {key: (ref, size) for key, (ref, size) in self._seen.items() if not ref.expired()}
            self.peak = max(self.peak, sum(size for _, size in self._seen.values()))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"]
