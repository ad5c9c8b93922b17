"""Blocks of a module that pass through two slots on the device: the next one is under way while one computes.

Knows no model: blocks are modules called in their order, again and again. A block's weights are in their slot from
just before its forward to just after; at other times its parameters are on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ltxpack.errors import LtxpackError
from ltxpack.files.source_file import CACHED
from ltxpack.runtime.weights.copies import Copies, HostMemory, Mark
from ltxpack.runtime.weights.load import Stored
from ltxpack.runtime.weights.plan import SLOTS
from ltxpack.runtime.weights.reading import Arrival, FileReader
from ltxpack.runtime.weights.sizes import aligned

Brought = Callable[[], Mark]
"""Waits until the copies to a slot are asked for, and gives the mark that they are done."""


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a block lie in one stretch of bytes: name -> (offset, shape, dtype)."""

    tensors: Mapping[str, tuple[int, tuple[int, ...], torch.dtype]]
    nbytes: int

    @classmethod
    def of(cls, stored: Mapping[str, Stored], dtype: torch.dtype | None) -> Layout:
        """One tensor after another, each aligned."""
        tensors: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        end = 0
        for name, entry in stored.items():
            arriving = entry.arriving_as(dtype)
            tensors[name] = (end, entry.shape, arriving)
            end += aligned(math.prod(entry.shape) * arriving.itemsize)
        return cls(tensors, end)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors in ``memory`` (uint8)."""
        return {
            name: memory[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (offset, shape, dtype) in self.tensors.items()
        }


class Source(Protocol):
    """Where the weights of a block come from; names of ``layout`` are the block's own."""

    @property
    def layout(self) -> Layout:
        """Where each tensor lies in a slot."""

    def bring(self, slot: Tensor, after: Mark) -> Brought:
        """Begin to copy the weights to ``slot`` (uint8 on the device), which is free at the mark ``after``."""


@dataclass(frozen=True)
class MemorySource:
    """A block in host memory, laid out as in a slot."""

    layout: Layout
    memory: HostMemory
    copies: Copies

    def bring(self, slot: Tensor, after: Mark) -> Brought:
        """One copy."""
        target = slot[: self.layout.nbytes]
        mark = self.copies.run(lambda: _copy(target, self.memory.bytes), after)
        return lambda: mark


class FileStream:
    """One thread that reads blocks from their file, for all blocks of a module; ``reads`` as for FileReader."""

    def __init__(self, copies: Copies, reads: str = CACHED) -> None:
        self._reader = FileReader(copies, reads=reads)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ltxpack-stream")

    def read(self, arrivals: Sequence[Arrival], after: Mark) -> Brought:
        """Begin to read, each piece on to the device as it comes and ``after`` is reached."""
        return self._thread.submit(self._reader.fill, arrivals, after=after).result

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._reader.close()


@dataclass(frozen=True)
class FileSource:
    """A block in a file, read again each time."""

    layout: Layout
    stored: Mapping[str, Stored]
    stream: FileStream

    def bring(self, slot: Tensor, after: Mark) -> Brought:
        """Reads; the slot fills piece by piece."""
        views = self.layout.views(slot)
        return self.stream.read([Arrival(entry.place, views[name]) for name, entry in self.stored.items()], after)


@dataclass(slots=True)
class _Slot:
    """Bytes on the device, the number of the block in them or on its way (-1: none), and when it is there.

    ``parameters`` are views of the bytes, for each block that was here.
    """

    memory: Tensor
    holds: int = -1
    brought: Brought | None = None
    parameters: dict[int, dict[str, nn.Parameter]] = field(default_factory=dict)

    def parameters_of(self, number: int, layout: Layout) -> Mapping[str, nn.Parameter]:
        """The weights of block ``number`` in this slot."""
        if number not in self.parameters:
            views = layout.views(self.memory)
            self.parameters[number] = {name: nn.Parameter(view, requires_grad=False) for name, view in views.items()}
        return self.parameters[number]


class Slots:
    """``blocks`` and their ``sources`` through two slots, from :meth:`open` to :meth:`close`.

    The blocks are called in order, from the first again after the last. A call out of order is right too, only late.
    """

    def __init__(self, blocks: Sequence[nn.Module], sources: Sequence[Source], copies: Copies) -> None:
        self.blocks, self.sources, self.copies = blocks, sources, copies
        self._owners = [_owners(block, source.layout) for block, source in zip(blocks, sources, strict=True)]
        self._empty = [_without_weights(owners) for owners in self._owners]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._slots: list[_Slot] = []
        for number in range(len(blocks)):
            self._bind(number, self._empty[number])

    def open(self) -> None:
        """Take the slots and begin to bring the first blocks."""
        size = max((source.layout.nbytes for source in self.sources), default=0)
        count = min(SLOTS, len(self.blocks))
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=self.copies.device)) for _ in range(count)]
        for number, block in enumerate(self.blocks):
            self._hooks.append(block.register_forward_pre_hook(lambda module, args, n=number: self._before(n)))
            self._hooks.append(block.register_forward_hook(lambda module, args, out, n=number: self._after(n)))
        for number, slot in enumerate(self._slots):
            self._bring(number, slot)

    def close(self) -> None:
        """Give the slots back; the blocks are without weights again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for slot in self._slots:
            self._settle(slot)
        for number in range(len(self.blocks)):
            self._bind(number, self._empty[number])
        self._slots.clear()

    def _before(self, number: int) -> None:
        """The computation waits for the block; the host does so only where a thread still reads."""
        slot = next((slot for slot in self._slots if slot.holds == number), None)
        if slot is None:
            slot = self._start_over(number)
        assert slot.brought is not None
        self.copies.before_computing(slot.brought())
        self._bind(number, slot.parameters_of(number, self.sources[number].layout))

    def _after(self, number: int) -> None:
        """The block's slot is free once what was asked for is computed; the block after the next goes there."""
        self._bind(number, self._empty[number])
        slot = next(slot for slot in self._slots if slot.holds == number)
        following = (number + len(self._slots)) % len(self.blocks)
        if following != number:
            self._bring(following, slot)

    def _start_over(self, number: int) -> _Slot:
        """Bring ``number`` and what follows it: the one before was not the one expected."""
        for offset, slot in enumerate(self._slots):
            self._settle(slot)
            self._bring((number + offset) % len(self.blocks), slot)
        return self._slots[0]

    def _bind(self, number: int, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            owner, attribute = self._owners[number][name]
            owner._parameters[attribute] = parameter

    def _bring(self, number: int, slot: _Slot) -> None:
        slot.holds = number
        slot.brought = self.sources[number].bring(slot.memory, self.copies.now())

    def _settle(self, slot: _Slot) -> None:
        """Wait until nothing writes to the slot any more. A reading that failed is told to who needs the block."""
        if slot.brought is None:
            return
        try:
            self.copies.finish(slot.brought())
        except (LtxpackError, OSError):
            slot.holds = -1
        slot.brought = None


def _owners(block: nn.Module, layout: Layout) -> dict[str, tuple[nn.Module, str]]:
    """Name in the layout -> the module that holds the parameter, and its name there."""
    found = {}
    for name in layout.tensors:
        path, _, attribute = name.rpartition(".")
        found[name] = (block.get_submodule(path), attribute)
    return found


def _without_weights(owners: Mapping[str, tuple[nn.Module, str]]) -> dict[str, nn.Parameter]:
    """The parameters' shapes and dtypes, on the meta device."""
    empty = {}
    for name, (owner, attribute) in owners.items():
        held = owner._parameters[attribute]
        assert held is not None
        empty[name] = nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=False)
    return empty


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
