"""Watches every operation of torch; counts the bytes of live tensors, on the meta device at any size."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Calls ``note(given, made)`` with the tensors that each operation in the block is given and makes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and keeping the compiler away from each operation takes longer than most do."""
        return False

    def __init__(self, note: Callable[[list[Tensor], list[Tensor]], object]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._answer(func, args, kwargs or {})
        self._note(leaves((args, kwargs)), leaves(out))
        return out

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class Laying(Watch):
    """A watch that asks torch once what comes of an operation on the meta device, which tells it slowly."""

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = (func, described(args), described(kwargs))
        found = KNOWN.get(key)
        if found is WRITTEN:
            return args[0]
        if found is not None:
            return torch.empty_strided(found[0], found[1], dtype=found[2], device="meta")
        out = super()._answer(func, args, kwargs)
        given = leaves((args, kwargs))
        if isinstance(out, Tensor) and all(tensor.is_meta for tensor in (out, *given)):
            if args and out is args[0] and func._schema.is_mutable:
                KNOWN[key] = WRITTEN
            elif storage_of(out) not in map(storage_of, given):
                KNOWN[key] = (*laid(out), out.dtype)
        return out


# Operation and arguments -> size, stride and dtype of the new tensor.
KNOWN: dict[Any, Any] = {}
# Stands there for the first argument of an operation that writes to it.
WRITTEN = object()
CONTAINERS = (list, tuple, dict)


def leaves(value: Any) -> list[Tensor]:
    """The tensors in arguments."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        if isinstance(part, Tensor):
            found.append(part)
        elif part and isinstance(part, CONTAINERS):
            found += leaves(part)
    return found


def parts_of(out: Any) -> Sequence[Any]:
    return out if isinstance(out, list | tuple) else (out,)


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def laid(tensor: Tensor) -> tuple[Any, Any]:
    return tuple(tensor.shape), tensor.stride()


def described(value: Any) -> Any:
    """Arguments as a key: of tensors all but where they begin; those that have content are never the same."""
    if isinstance(value, Tensor):
        place = getattr(value, "_fake_device", None) or ("meta" if value.is_meta else object())
        return value.shape, value.stride(), value.dtype, place
    if isinstance(value, list | tuple):
        return tuple(described(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, described(part)) for name, part in value.items())
    # 1, 1.0 and True are equal keys and different arguments.
    return type(value), value


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
    with Laying(meter.note):
        work()
    return meter.peak
