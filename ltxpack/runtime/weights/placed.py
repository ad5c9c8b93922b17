"""Modules whose weights are where their placement says: on the card, in pinned host memory or only in the file.

Knows no plan and no kind of model. Weights that are not on the card are tensors on the meta device: work with one that
was forgotten fails at once.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ltxpack.files.reader import no_stop
from ltxpack.runtime.weights.copies import Copies, HostMemory
from ltxpack.runtime.weights.load import Stored
from ltxpack.runtime.weights.plan import FILE, HOST, Placement
from ltxpack.runtime.weights.reading import FileReader, HashCheck, TensorRead
from ltxpack.runtime.weights.slots import (
    NOWHERE,
    BlockSource,
    ByteLayout,
    FileSource,
    FileStream,
    MemorySource,
    Slots,
    bytes_on,
)

M = TypeVar("M", bound=nn.Module)
# Weights outside the blocks share memory in stretches of at most so many bytes or of one tensor. On the card, some
# thousand requests for memory take longer than copying. In host memory, each stretch is pinned while the next one is
# read: while the driver pins, some 0.1 s for each GB, the process cannot use the card.
STRETCH = 256 * 1024 * 1024


class SpareMemory:
    """Pinned host memory whose weights have gone to the card, for the next ones: pinning takes longer than copying.

    For several threads.
    """

    def __init__(self) -> None:
        self._free: list[HostMemory] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> HostMemory | None:
        """Memory of ``nbytes`` bytes. Without any, returns None and drops the other sizes, which would add up."""
        with self._lock:
            for memory in self._free:
                if memory.bytes.nbytes == nbytes:
                    self._free.remove(memory)
                    return memory
            self._free.clear()
            return None

    def give(self, memory: HostMemory) -> None:
        """Take back ``memory``, which nobody reads any more."""
        with self._lock:
            self._free.append(memory)

    def clear(self) -> None:
        """Drop all memory."""
        with self._lock:
            self._free.clear()


@dataclass(eq=False)
class PlacementReader:
    """Reads each tensor to the place that ``placement`` says and compares hashes (a :class:`.load.Reader`).

    ``root`` names the list of blocks in the module, if it has one. Its weights then share memory on the card too, which
    modules that replace submodules after loading (channels_last) cannot do. ``to_host``: all but streamed blocks goes
    to host memory, for later use. ``hash_streamed``: a file from which blocks stream is hashed while they stream for
    the first time, and compared by :meth:`PlacedModule.verify`. ``reader`` serves this load, ``copies`` the module as
    long as it lives. ``held`` blocks of an earlier load are not read again. A module that is not kept takes memory from
    ``spare`` and leaves it there.

    Afterwards ``memory`` is host memory outside the streamed blocks, ``sources`` has the streamed blocks by number,
    ``held`` those held, and ``unpinned`` is the number of bytes of host memory that the system would not pin.
    """

    placement: Placement
    root: str
    digests: Mapping[Path, str]
    reader: FileReader
    copies: Copies
    to_host: bool = field(default=False, kw_only=True)
    hash_streamed: bool = field(default=False, kw_only=True)
    stop: Callable[[], None] = field(default=no_stop, kw_only=True)
    held: dict[int, MemorySource] = field(default_factory=dict, kw_only=True)
    spare: SpareMemory = field(default_factory=SpareMemory, kw_only=True)

    def __post_init__(self) -> None:
        self.held = dict(self.held)
        self.memory: list[MemorySource] = []
        self.sources: dict[int, BlockSource] = {}
        self.stream: FileStream | None = None
        self.unpinned = 0
        self._reads: list[TensorRead] = []
        # How many tensors each memory still waits for.
        self._awaited: Counter[HostMemory] = Counter()
        self._pinning: ThreadPoolExecutor

    def __call__(
        self, stored: Mapping[str, Stored], device: torch.device, dtype: torch.dtype | None
    ) -> Mapping[str, Tensor]:
        """The tensors by name; those that are not on the card yet are on the meta device."""
        on_host = self.to_host or self.placement.home == HOST
        rest, blocks = self._laid_out(stored, dtype, STRETCH if on_host or self.root else 0)
        tensors: dict[str, Tensor] = {}
        for layout in rest:
            views = layout.views(bytes_on(NOWHERE if on_host else device, layout.nbytes))
            if on_host:
                self.memory.append(self._in_memory(layout, self.spare))
            else:
                self._reads += layout.reads(views)
            tensors.update(views)
        if self.placement.source == FILE:
            places = (entry.source for entry in stored.values())
            check = HashCheck(self.digests, places) if self.hash_streamed else None
            self.stream = FileStream(self.copies, self.reader.reads, check)
        from_host: list[tuple[Tensor, MemorySource]] = []
        for number, layout in blocks.items():
            source, streamed = self._block(number, layout), number in self.placement.streamed
            place = bytes_on(NOWHERE if streamed else device, layout.nbytes)
            if streamed:
                self.sources[number] = source
            else:
                from_host.append((place, self.held[number]))
            tensors.update({f"{self.root}.{number}.{name}": view for name, view in layout.views(place).items()})
        self._fill()
        for place, held in from_host:
            # The host waits, as nobody else keeps the memory yet.
            event = held.start(place, self.copies.now())()
            self.copies.finish(event)
            self.copies.before_computing(event)
        return tensors

    def _fill(self) -> None:
        """Do all reads, and pin host memory that is full meanwhile."""
        check = self.stream.check if self.stream is not None else None
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="ltxpack-pin") as self._pinning:
                event = self.reader.fill(self._reads, {} if check else self.digests, stop=self.stop, check=check)
        finally:
            # They refer to this reader: after a failure they would keep memory until the next garbage collection.
            self._reads.clear()
        self.reader.copies.before_computing(event)
        self.unpinned = sum(memory.bytes.nbytes for memory in self._awaited if not memory.pin())

    def _laid_out(
        self, stored: Mapping[str, Stored], dtype: torch.dtype | None, most: int
    ) -> tuple[list[ByteLayout], dict[int, ByteLayout]]:
        """The tensors outside streamed and held blocks, in stretches of at most ``most`` bytes or of one tensor; and
        these blocks by number, with the names of their own.
        """
        pattern = re.compile(re.escape(self.root) + r"\.(\d+)\.(.*)")
        rest: list[ByteLayout] = []
        blocks = {number: ByteLayout(dtype) for number in sorted(self.placement.streamed | self.placement.held)}
        for name, entry in stored.items():
            match = pattern.match(name)
            if match and int(match[1]) in blocks:
                blocks[int(match[1])].add(match[2], entry)
                continue
            if not rest or rest[-1].nbytes + rest[-1].size_of(entry) > most:
                rest.append(ByteLayout(dtype))
            rest[-1].add(name, entry)
        return rest, blocks

    def _in_memory(self, layout: ByteLayout, spare: SpareMemory | None = None) -> MemorySource:
        memory = (spare and spare.take(layout.nbytes)) or HostMemory(layout.nbytes, self.copies)
        self._awaited[memory] = sum(entry.nbytes > 0 for _, entry in layout.tensors.values())
        views = layout.views(memory.bytes)
        self._reads += layout.reads(views, on_host=True, then=lambda: self._one_less(memory))
        return MemorySource(layout, memory)

    def _one_less(self, memory: HostMemory) -> None:
        """Note that a tensor has arrived in ``memory``; pin it once it is full."""
        self._awaited[memory] -= 1
        if self._awaited[memory] == 0:
            self._pinning.submit(memory.pin)

    def _block(self, number: int, layout: ByteLayout) -> BlockSource:
        if self.stream is not None and number not in self.placement.held:
            return FileSource(layout, self.stream)
        source = self.held.get(number) or self._in_memory(layout)
        if number in self.placement.held:
            self.held[number] = source
        return source


class PlacedModule(Generic[M]):
    """A module that ``read`` has loaded, and those of its weights that are not on the card."""

    def __init__(self, module: M, read: PlacementReader) -> None:
        self.module = module
        self.placement = read.placement
        self.unpinned, self.refused = read.unpinned, read.reader.refused
        self._memory, self._spare, self._stream, self._copies = read.memory, read.spare, read.stream, read.copies
        blocks = [module.get_submodule(f"{read.root}.{number}") for number in read.sources]
        self._slots = Slots(blocks, list(read.sources.values()), self._copies)
        self._prepared = False

    @contextmanager
    def in_use(self, prepare: Callable[[M, bool], None] | None = None) -> Iterator[M]:
        """The module, ready to work; for one at a time. Calls ``prepare(module, streamed)`` once with weights there."""
        try:
            if self._memory:
                self._to_card()
            if prepare is not None and not self._prepared:
                prepare(self.module, bool(self._slots.blocks))
                self._prepared = True
            self._slots.open()
            yield self.module
        finally:
            self._slots.close()
            if self._memory:
                self.module.to("meta")

    def verify(self) -> None:
        """Compare the hashes of files that were streamed. Raises OverlayError for a file that changed."""
        if self._stream is not None and self._stream.check is not None:
            self._stream.check.finish()

    def drop(self) -> None:
        """End its threads and free its weights, even if somebody still refers to the module.

        A module in a reference cycle would keep them until the next garbage collection.
        """
        if self._stream is not None:
            self._stream.close()
        for module in self.module.modules():
            module._parameters.clear()
            module._buffers.clear()

    def _to_card(self) -> None:
        """Copy from host memory to the card. The memory is spare then, unless it is the module's home."""
        targets = [bytes_on(self._copies.device, source.layout.nbytes) for source in self._memory]
        now, event = self._copies.now(), None
        arriving: dict[str, Tensor] = {}
        for source, target in zip(self._memory, targets, strict=True):
            event = source.start(target, now)()
            arriving.update(source.layout.views(target))
        if self.placement.home != HOST:
            self._copies.finish(event)
            for source in self._memory:
                self._spare.give(source.memory)
            self._memory = []
        self._copies.before_computing(event)
        self.module.load_state_dict(arriving, strict=False, assign=True)
