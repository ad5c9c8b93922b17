"""Watches every operation of torch; counts the bytes of live tensors, on the meta device at any size."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from _guard_operations import carried_out
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def called(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


class Watch(TorchDispatchMode):
    """Calls ``note(given, made)`` with the tensors that each operation in the block is given and makes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and keeping the compiler away from each operation takes longer than most do."""
        return False

    def __init__(self, note: Callable[[list[Tensor], list[Tensor]], object], carry_out: Callable[..., Any] = called):
        super().__init__()
        self._note, self._carry_out = note, carry_out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._carry_out(func, args, kwargs or {})
        self._note(leaves((args, kwargs)), leaves(out))
        return out


def leaves(value: Any) -> list[Tensor]:
    """The tensors in arguments."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        if isinstance(part, Tensor):
            found.append(part)
        elif part and isinstance(part, list | tuple | dict):
            found += leaves(part)
    return found


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
    with Watch(meter.note, carried_out):
        work()
    return meter.peak
