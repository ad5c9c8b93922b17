"""Watches every operation of torch; counts the bytes of live tensors, on the meta device at any size."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Calls ``note(given, made)`` with the tensors that each operation in the block is given and makes."""

    def __init__(self, note: Callable[[list[Tensor], list[Tensor]], object]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._note(*([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out)))
        return out


class Meter:
    """``peak`` is the largest sum of bytes of storages that were made, and not given, and are still alive."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def note(self, given: list[Tensor], made: list[Tensor]) -> None:
        # What was there before is not made by a view of it.
        self._seen.update({tensor.untyped_storage(): True for tensor in given})
        for storage in (tensor.untyped_storage() for tensor in made):
            if storage not in self._seen:
                self._seen[storage] = True
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.live -= size


@torch.inference_mode()
def peak_of(work: Callable[[], object]) -> int:
    """The most bytes alive at once of what ``work`` makes."""
    meter = Meter()
    with Watch(meter.note):
        work()
    return meter.peak
