"""Modules whose weights lie on the card, in host memory or only in their file, and come to the card for their work.

Knows no plan and no kind of model: which blocks lie where comes in. A module without weights on the card has tensors
on the meta device in their place, so that work with a forgotten one fails at once.
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ltxpack.runtime.weights.copies import Copies, HostMemory
from ltxpack.runtime.weights.load import Stored
from ltxpack.runtime.weights.reading import Arrival, FileReader, no_stop
from ltxpack.runtime.weights.sizes import aligned
from ltxpack.runtime.weights.slots import FileSource, FileStream, Layout, MemorySource, Slots, Source

M = TypeVar("M", bound=nn.Module)
CARD, MEMORY, FILE = "card", "memory", "file"
# Weights outside the blocks lie in stretches of at most so many bytes or of one tensor. On the card because asking the
# driver for memory some thousand times takes longer than copying. In host memory because while the driver pins, some
# 0.1 s for each GB, nothing else of the process gets through to the card: each is pinned by itself, while the next one
# is read.
STRETCH = 256 * 1024 * 1024
NOWHERE: dict[str, Any] = {"dtype": torch.uint8, "device": "meta"}


@dataclass(frozen=True)
class Placement:
    """Where a module's weights go when it is loaded, and which of its blocks are streamed.

    ``root`` names the list of blocks, ``streamed`` their numbers. ``rest`` is where all else goes, ``blocks`` where
    the streamed ones are: MEMORY or FILE. ``held``: the blocks, streamed or not, that lie in host memory in any case
    and can be had from there when the module is loaded again. ``keep``: whether all of it is held when its work is
    done. ``together``: its weights share memory on the card too, which is given back when the last of it is dropped;
    not for modules that put others in the place of some.
    """

    rest: str = CARD
    blocks: str = CARD
    root: str = ""
    streamed: frozenset[int] = frozenset()
    held: frozenset[int] = frozenset()
    keep: bool = False
    together: bool = False


class SpareMemory:
    """Pinned host memory that weights have left for the card, for the next ones: pinning and unpinning it anew would
    take longer than the copy does. From several threads.
    """

    def __init__(self) -> None:
        self._free: list[HostMemory] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> HostMemory | None:
        """Memory of ``nbytes`` bytes, or None. Then what there is of other sizes goes, so that it does not add up."""
        with self._lock:
            found = next((memory for memory in self._free if memory.bytes.nbytes == nbytes), None)
            if found is None:
                self._free.clear()
            else:
                self._free.remove(found)
            return found

    def give(self, memory: HostMemory) -> None:
        """Nobody reads ``memory`` any more."""
        with self._lock:
            self._free.append(memory)

    def clear(self) -> None:
        """Let all of it go."""
        with self._lock:
            self._free.clear()


class PlacingReader:
    """Reads each tensor to where ``placement`` has it and compares hashes (see :class:`.load.Reader`).

    Afterwards ``memory`` is what lies in host memory outside the streamed blocks, ``sources`` the streamed blocks by
    number, ``held`` the blocks held by number, ``unpinned`` the bytes of host memory that the system would not pin.
    ``reader`` is used for this load alone, ``copies`` for as long as the module lives. ``held`` blocks of an earlier
    load are not read again. ``spare`` is where a module that is not kept takes memory from and leaves it to.
    """

    def __init__(
        self,
        placement: Placement,
        digests: Mapping[Path, str],
        reader: FileReader,
        copies: Copies,
        stop: Callable[[], None] = no_stop,
        held: Mapping[int, MemorySource] | None = None,
        spare: SpareMemory | None = None,
    ) -> None:
        self.placement, self.digests, self.reader, self.stop = placement, digests, reader, stop
        self.copies = copies
        self.spare = spare or SpareMemory()
        self.memory: list[MemorySource] = []
        self.held = dict(held or {})
        self.sources: dict[int, Source] = {}
        self.stream: FileStream | None = None
        self.unpinned = 0
        self._arrivals: list[Arrival] = []
        # How many tensors each memory still waits for.
        self._awaited: Counter[HostMemory] = Counter()
        self._pinning: ThreadPoolExecutor

    def __call__(
        self, stored: Mapping[str, Stored], device: torch.device, dtype: torch.dtype | None
    ) -> Mapping[str, Tensor]:
        """The tensors by name; those of blocks that stay in their file are on the meta device."""
        rest, blocks = self._split(stored)
        tensors: dict[str, Tensor] = {}
        if self.placement.rest == MEMORY:
            for some in _stretches(rest, dtype):
                stretch, views = self._in_memory(some, dtype, self.spare)
                self.memory.append(stretch)
                tensors.update(views)
        else:
            tensors.update(self._on_card(rest, device, dtype))
        if self.placement.blocks == FILE:
            self.stream = FileStream(self.copies, self.reader.reads)
        from_host: list[tuple[Tensor, MemorySource]] = []
        for number, block in blocks.items():
            prefix = f"{self.placement.root}.{number}."
            own = {name.removeprefix(prefix): entry for name, entry in block.items()}
            source, views = self._block(number, own, dtype)
            if number in self.placement.streamed:
                self.sources[number] = source
            else:
                target = _bytes_on(device, source.layout)
                from_host.append((target, self.held[number]))
                views = source.layout.views(target)
            tensors.update({prefix + name: view for name, view in views.items()})
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="ltxpack-pin") as self._pinning:
                mark = self.reader.fill(self._arrivals, self.digests, stop=self.stop)
        finally:
            # They refer to this reader: after a failure memory would stay until the garbage collector comes by.
            self._arrivals.clear()
        self.reader.copies.before_computing(mark)
        self.unpinned = sum(memory.bytes.nbytes for memory in self._awaited if not memory.pin())
        for target, held in from_host:
            # The host waits, as nobody else keeps the memory yet.
            mark = held.bring(target, self.copies.now())()
            self.copies.finish(mark)
            self.copies.before_computing(mark)
        return tensors

    def _split(self, stored: Mapping[str, Stored]) -> tuple[dict[str, Stored], dict[int, dict[str, Stored]]]:
        """What is neither streamed nor held, and the blocks that are, by number."""
        pattern = re.compile(re.escape(self.placement.root) + r"\.(\d+)\.")
        rest: dict[str, Stored] = {}
        numbers = self.placement.streamed | self.placement.held
        blocks: dict[int, dict[str, Stored]] = {number: {} for number in sorted(numbers)}
        for name, entry in stored.items():
            match = pattern.match(name)
            group = blocks.get(int(match[1]), rest) if match else rest
            group[name] = entry
        return rest, blocks

    def _on_card(
        self, stored: Mapping[str, Stored], device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        alone = ({name: entry} for name, entry in stored.items())
        for some in _stretches(stored, dtype) if self.placement.together else alone:
            layout = Layout.of(some, dtype)
            tensors.update(layout.views(_bytes_on(device, layout)))
        self._arrivals += [Arrival(entry.place, tensors[name]) for name, entry in stored.items()]
        return tensors

    def _in_memory(
        self, stored: Mapping[str, Stored], dtype: torch.dtype | None, spare: SpareMemory | None = None
    ) -> tuple[MemorySource, dict[str, Tensor]]:
        layout = Layout.of(stored, dtype)
        memory = (spare and spare.take(layout.nbytes)) or HostMemory(layout.nbytes, self.copies)
        views = layout.views(memory.bytes)
        self._awaited[memory] = sum(entry.nbytes > 0 for entry in stored.values())
        self._arrivals += [
            Arrival(entry.place, views[name], on_host=True, then=lambda: self._one_less(memory))
            for name, entry in stored.items()
        ]
        return MemorySource(layout, memory, self.copies), views

    def _one_less(self, memory: HostMemory) -> None:
        """A tensor has arrived in ``memory``, which is pinned once it is full."""
        self._awaited[memory] -= 1
        if self._awaited[memory] == 0:
            self._pinning.submit(memory.pin)

    def _block(
        self, number: int, stored: Mapping[str, Stored], dtype: torch.dtype | None
    ) -> tuple[Source, dict[str, Tensor]]:
        if number in self.held:
            before = self.held[number]
            self.held[number] = MemorySource(before.layout, before.memory, self.copies)
            return self.held[number], before.layout.views(before.memory.bytes)
        if self.stream is None or number in self.placement.held:
            source, views = self._in_memory(stored, dtype)
            if number in self.placement.held:
                self.held[number] = source
            return source, views
        layout = Layout.of(stored, dtype)
        return FileSource(layout, stored, self.stream), layout.views(torch.empty(layout.nbytes, **NOWHERE))


class Offloaded(Generic[M]):
    """A module that ``read`` has loaded, and those of its weights that are not on the card."""

    def __init__(self, module: M, read: PlacingReader) -> None:
        self.module = module
        self.placement = read.placement
        self.unpinned, self.held = read.unpinned, read.held
        self._memory, self._spare, self._stream = read.memory, read.spare, read.stream
        self._copies = read.copies
        blocks = [module.get_submodule(f"{read.placement.root}.{number}") for number in read.sources]
        self._slots = Slots(blocks, list(read.sources.values()), self._copies)
        self._settled = False
        if self._memory:
            module.to("meta")

    @contextmanager
    def on_card(self, settle: Callable[[M, bool], None] | None = None) -> Iterator[M]:
        """The module, ready to work. ``settle(module, streamed)`` is called once, when its weights are there.

        Not for two at a time.
        """
        try:
            if self._memory:
                self._bring(self._memory)
            if settle is not None and not self._settled:
                settle(self.module, bool(self._slots.blocks))
                self._settled = True
            self._slots.open()
            yield self.module
        finally:
            self._slots.close()
            if self._memory:
                self.module.to("meta")

    def drop(self) -> None:
        """End what runs for it and let its weights go, even if somebody still refers to the module.

        A module that is part of a reference cycle would keep them until the garbage collector comes by.
        """
        if self._stream is not None:
            self._stream.close()
        for module in self.module.modules():
            module._parameters.clear()
            module._buffers.clear()

    def _bring(self, sources: list[MemorySource]) -> None:
        """Copy from host memory to the card; unless the module is kept, the memory is spare then."""
        targets = [_bytes_on(self._copies.device, source.layout) for source in sources]
        now, mark = self._copies.now(), None
        arriving: dict[str, Tensor] = {}
        for source, target in zip(sources, targets, strict=True):
            mark = source.bring(target, now)()
            arriving.update(source.layout.views(target))
        if not self.placement.keep:
            self._copies.finish(mark)
            for source in sources:
                self._spare.give(source.memory)
            self._memory = []
        self._copies.before_computing(mark)
        self.module.load_state_dict(arriving, strict=False, assign=True)


def _stretches(stored: Mapping[str, Stored], dtype: torch.dtype | None) -> Iterator[dict[str, Stored]]:
    """``stored`` in its order, in groups of at most STRETCH bytes or of one tensor."""
    group: dict[str, Stored] = {}
    held = 0
    for name, entry in stored.items():
        nbytes = aligned(math.prod(entry.shape) * entry.arriving_as(dtype).itemsize)
        if group and held + nbytes > STRETCH:
            yield group
            group, held = {}, 0
        group[name] = entry
        held += nbytes
    if group:
        yield group


def _bytes_on(device: torch.device, layout: Layout) -> Tensor:
    return torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
