"""Blocks of a module that pass through two slots on the device: the next one is copied while one computes.

Knows no model: blocks are modules called in their order, again and again. A block's weights are in their slot from
just before its forward to just after; at other times its parameters are on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ltxpack.errors import LtxpackError
from ltxpack.files.direct import CACHED
from ltxpack.runtime.weights.copies import Copies, Event, HostMemory
from ltxpack.runtime.weights.load import Stored
from ltxpack.runtime.weights.plan import SLOTS
from ltxpack.runtime.weights.reading import FileReader, HashCheck, TensorRead
from ltxpack.runtime.weights.sizes import aligned

CopyDone = Callable[[], Event]
"""Waits until the copies to a slot are asked for, and returns the event after them."""
# The device of weights that are elsewhere.
NOWHERE = torch.device("meta")


def bytes_on(device: torch.device, nbytes: int) -> Tensor:
    """Memory of a device, as uint8."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


@dataclass
class ByteLayout:
    """Stored tensors by name, one after another and aligned in one stretch of bytes; each with its offset there.

    Floats that may be cast are in ``dtype``, if that is given.
    """

    dtype: torch.dtype | None
    tensors: dict[str, tuple[int, Stored]] = field(default_factory=dict)
    nbytes: int = 0

    def add(self, name: str, entry: Stored) -> None:
        """Append a tensor."""
        self.tensors[name] = self.nbytes, entry
        self.nbytes += self.size_of(entry)

    def size_of(self, entry: Stored) -> int:
        """The bytes that a tensor takes."""
        return aligned(math.prod(entry.shape) * entry.arriving_as(self.dtype).itemsize)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors in ``memory`` (uint8)."""
        found = {}
        for name, (offset, entry) in self.tensors.items():
            dtype = entry.arriving_as(self.dtype)
            nbytes = math.prod(entry.shape) * dtype.itemsize
            found[name] = memory[offset : offset + nbytes].view(dtype).view(entry.shape)
        return found

    def reads(
        self, views: Mapping[str, Tensor], on_host: bool = False, then: Callable[[], object] | None = None
    ) -> list[TensorRead]:
        """The reads that bring the tensors to ``views``."""
        return [entry.read_into(views[name], on_host, then) for name, (_, entry) in self.tensors.items()]


@dataclass(frozen=True)
class MemorySource:
    """A block in host memory, laid out as in a slot; the names of ``layout`` are those in the block."""

    layout: ByteLayout
    memory: HostMemory

    def start(self, slot: Tensor, after: Event) -> CopyDone:
        """Begin to copy the block to ``slot`` (uint8 on the device), which is free after the event ``after``."""
        target = slot[: self.layout.nbytes]
        done = self.memory.copies.run(lambda: target.copy_(self.memory.bytes, non_blocking=True), after)
        return lambda: done


class FileStream:
    """A thread that reads a module's blocks from files. ``reads``: as for FileReader; ``check`` sees all reads."""

    def __init__(self, copies: Copies, reads: str = CACHED, check: HashCheck | None = None) -> None:
        self._reader = FileReader(copies, reads=reads)
        self.check = check
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ltxpack-stream")

    def read(self, wanted: Sequence[TensorRead], after: Event) -> CopyDone:
        """Begin to read; each part goes to the device as it comes, not before ``after``."""
        return self._thread.submit(self._reader.fill, wanted, after=after, check=self.check).result

    def close(self) -> None:
        """End its threads."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
        if self.check is not None:
            self.check.close()


@dataclass(frozen=True)
class FileSource:
    """A block in a file, read again each time."""

    layout: ByteLayout
    stream: FileStream

    def start(self, slot: Tensor, after: Event) -> CopyDone:
        """As :meth:`MemorySource.start`; the slot fills part by part."""
        return self.stream.read(self.layout.reads(self.layout.views(slot)), after)


BlockSource = MemorySource | FileSource


@dataclass(slots=True)
class _Slot:
    """Bytes on the device, the number of the block in them or on its way (-1: none), and when its copy is done.

    ``parameters``: views of the bytes for each block that was here, by number.
    """

    memory: Tensor
    holds: int = -1
    copied: CopyDone | None = None
    parameters: dict[int, dict[str, nn.Parameter]] = field(default_factory=dict)


class Slots:
    """``blocks`` and their ``sources`` through two slots, from :meth:`open` to :meth:`close`.

    The blocks are called in order, from the first again after the last. A call out of order is right too, only late.
    """

    def __init__(self, blocks: Sequence[nn.Module], sources: Sequence[BlockSource], copies: Copies) -> None:
        self.blocks, self.sources, self.copies = blocks, sources, copies
        names = [source.layout.tensors for source in sources]
        self._owners = list(map(_owners, blocks, names))
        self._empty = [_parameters(each.layout, bytes_on(NOWHERE, each.layout.nbytes)) for each in sources]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._slots: list[_Slot] = []
        for number in range(len(blocks)):
            self._bind(number, self._empty[number])

    def open(self) -> None:
        """Allocate the slots and begin to copy the first blocks."""
        size = max((source.layout.nbytes for source in self.sources), default=0)
        count = min(SLOTS, len(self.blocks))
        self._slots = [_Slot(bytes_on(self.copies.device, size)) for _ in range(count)]
        for number, block in enumerate(self.blocks):
            self._hooks.append(block.register_forward_pre_hook(lambda module, args, n=number: self._before(n)))
            self._hooks.append(block.register_forward_hook(lambda module, args, out, n=number: self._after(n)))
        for number, slot in enumerate(self._slots):
            self._start(number, slot)

    def close(self) -> None:
        """Free the slots; the blocks are without weights again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for slot in self._slots:
            self._finish(slot)
        for number in range(len(self.blocks)):
            self._bind(number, self._empty[number])
        self._slots.clear()

    def _before(self, number: int) -> None:
        """Let the computation wait for the block; the host waits only while a thread still reads it."""
        if all(slot.holds != number for slot in self._slots):
            # The block before was not the one expected.
            for offset, slot in enumerate(self._slots):
                self._finish(slot)
                self._start((number + offset) % len(self.blocks), slot)
        slot = next(slot for slot in self._slots if slot.holds == number)
        assert slot.copied is not None
        self.copies.before_computing(slot.copied())
        if number not in slot.parameters:
            slot.parameters[number] = _parameters(self.sources[number].layout, slot.memory)
        self._bind(number, slot.parameters[number])

    def _after(self, number: int) -> None:
        """Begin to copy the block after the next to the block's slot, which is free once the block has computed."""
        self._bind(number, self._empty[number])
        slot = next(slot for slot in self._slots if slot.holds == number)
        following = (number + len(self._slots)) % len(self.blocks)
        if following != number:
            self._start(following, slot)

    def _bind(self, number: int, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            owner, attribute = self._owners[number][name]
            owner._parameters[attribute] = parameter

    def _start(self, number: int, slot: _Slot) -> None:
        slot.holds = number
        slot.copied = self.sources[number].start(slot.memory, self.copies.now())

    def _finish(self, slot: _Slot) -> None:
        """Wait until nothing writes to the slot any more. A read that failed is raised where its block is needed."""
        if slot.copied is None:
            return
        try:
            self.copies.finish(slot.copied())
        except (LtxpackError, OSError):
            slot.holds = -1
        slot.copied = None


def _owners(block: nn.Module, names: Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    """Name in the block -> the module that has the parameter, and the name there."""
    return {name: (block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}


def _parameters(layout: ByteLayout, memory: Tensor) -> dict[str, nn.Parameter]:
    """A block's weights as views of ``memory``."""
    return {name: nn.Parameter(view, requires_grad=False) for name, view in layout.views(memory).items()}
