"""Tensors from safetensors files to a device or to host memory, with several reads in flight, hashed as they pass.

Bytes for a device pass through a few pinned buffers; bytes for host memory are read straight to their tensor, or past
the page cache through a buffer too. No file is held whole. Knows no module and no names: what is read to which tensor
comes in as :class:`TensorRead` values. The queue of reads is files.reader's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from ltxpack.errors import FormatError, SourceError
from ltxpack.files.direct import ALIGN, CACHED
from ltxpack.files.reader import (
    AT_ONCE,
    IN_FLIGHT,
    READ_BYTES,
    SPARE_BUFFERS,
    PendingRead,
    PlannedRead,
    Range,
    ReadCheck,
    ReadQueue,
    no_stop,
    plan_reads,
)
from ltxpack.files.tensorfile import regular_size
from ltxpack.manifest import changed_file
from ltxpack.runtime.weights.copies import Copies, Event, HostMemory
from ltxpack.runtime.weights.plan import WAITING


@dataclass(slots=True, eq=False)
class TensorRead:
    """A tensor whose stored bytes are ``source``, of dtype ``stored``, on its way into the contiguous ``final``.

    Another dtype of ``final`` is a cast on arrival. ``on_host``: ``final`` is host memory, filled by the threads that
    read; else the queue of copies fills it. ``then`` is called when its last byte is there, or in that queue.
    """

    source: Range
    stored: torch.dtype
    final: Tensor
    on_host: bool = False
    then: Callable[[], object] | None = None
    _missing: int = field(init=False)
    _arriving: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._missing = self.source.nbytes

    def bytes(self, offset: int, nbytes: int) -> Tensor:
        """Where ``nbytes`` of the stored bytes go, from ``offset`` on, as uint8."""
        if self._arriving is None:
            same = self.final.dtype == self.stored
            self._arriving = self.final if same else torch.empty_like(self.final, dtype=self.stored)
        return self._arriving.reshape(-1).view(torch.uint8)[offset : offset + nbytes]

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The same as memory, for a tensor on the host."""
        return self.bytes(offset, nbytes).numpy().data

    def arrived(self, nbytes: int) -> None:
        """``nbytes`` more are there; with the last ones the tensor is cast if it must be."""
        self._missing -= nbytes
        if self._missing == 0 and self._arriving is not None:
            if self._arriving is not self.final:
                self.final.copy_(self._arriving)
            self._arriving = None
            if self.then is not None:
                self.then()


class PinnedBuffer:
    """A pinned buffer for reads. ``event``: when the device has copied what was read last."""

    def __init__(self, nbytes: int, copies: Copies) -> None:
        self.host = HostMemory(nbytes, copies)
        self.host.pin()
        self.memory: memoryview = self.host.bytes.numpy().data
        self.event: Event = None
        self._copies = copies

    def wait(self) -> None:
        """The host waits until the device has copied."""
        self._copies.finish(self.event)


class HashCheck:
    """The blake3 of files that are read in any order; ``digests`` says what to expect.

    A read that comes before its turn waits in host memory, or is read again if WAITING bytes wait already. Bytes that
    are in none of ``places`` are read here. Reads that come again, or of other files, are left out. All on one thread.
    """

    def __init__(self, digests: Mapping[Path, str], places: Iterable[Range]) -> None:
        found: dict[Path, list[Range]] = {path: [] for path in digests}
        for place in places:
            found[place.path].append(place)
        self._digests = digests
        self._files = {path: _FileHash(path, own) for path, own in found.items()}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ltxpack-hash")

    def begin(self, read: PlannedRead[Any], views: Sequence[memoryview]) -> Future[None] | None:
        """Begin to take in ``read``; ``views`` must stay until that is done."""
        return self._thread.submit(self._take, read, views) if read.file in self._files else None

    def finish(self) -> None:
        """Take in what is missing, and compare. Raises OverlayError for a file that is not what was expected."""
        for path, expected in self._digests.items():
            found = self._thread.submit(self._files[path].digest).result()
            if found != expected:
                raise changed_file(path, f"blake3 {expected}", f"blake3 {found}")

    def close(self) -> None:
        """End the thread, once it has taken in what was begun: somebody may wait for the buffers."""
        self._thread.shutdown(wait=True)

    def _take(self, read: PlannedRead[Any], views: Sequence[memoryview]) -> None:
        waiting = sum(file.waiting for file in self._files.values())
        self._files[read.file].take(read.start, views, waiting + read.nbytes <= WAITING)


class _FileHash:
    """The hash of one file, as far as its bytes are there from the beginning on."""

    def __init__(self, path: Path, places: Sequence[Range]) -> None:
        self._path = path
        self._tensors = sorted((place.start, place.start + place.nbytes) for place in places if place.nbytes)
        self._hasher = blake3(max_threads=blake3.AUTO)
        self._position = 0
        # Pieces after the position, by where they begin: their bytes, or how many will be read again.
        self._early: dict[int, bytes | int] = {}

    @property
    def waiting(self) -> int:
        """Bytes in memory that wait for their turn."""
        return sum(len(data) for data in self._early.values() if isinstance(data, bytes))

    def take(self, start: int, views: Sequence[memoryview], keep: bool) -> None:
        """Bytes from ``start`` on; ``keep``: they may wait in memory."""
        self._advance()
        if start == self._position:
            for view in views:
                self._update(view)
            self._advance()
        elif start > self._position and start not in self._early:
            self._early[start] = b"".join(views) if keep else sum(map(len, views))

    def digest(self) -> str:
        """The hash, after reading what nobody brought. Raises OverlayError."""
        self._tensors.clear()
        self._advance()
        return self._hasher.hexdigest()

    def _update(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)
        self._position += len(data)

    def _advance(self) -> None:
        """As far as bytes wait, or will not be brought by anybody."""
        try:
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                while self._position < size:
                    early = self._early.pop(self._position, 0)
                    if isinstance(early, bytes):
                        self._update(early)
                        continue
                    end = self._position + early if early else self._next(size)
                    file.seek(self._position)
                    data = file.read(min(end - self._position, READ_BYTES))
                    if not data:
                        return
                    self._update(data)
                    if early and self._position < end:
                        self._early[self._position] = end - self._position
        except OSError as error:
            raise changed_file(self._path, "readable", error.strerror) from None

    def _next(self, size: int) -> int:
        """Where the next bytes begin that somebody brings: the position itself if these are still to come."""
        tensors = (max(start, self._position) for start, end in self._tensors if end > self._position)
        return min([size, next(tensors, size), *(start for start in self._early if start > self._position)])


class FileReader:
    """Reads files on threads; what is read is delivered in the order of the file. For one thread at a time.

    ``reads``: one of files.direct.READS; past the page cache only where that helps. A read is of ``read_bytes``;
    ``in_flight`` reads are under way or in line.
    """

    def __init__(
        self, copies: Copies, *, reads: str = CACHED, read_bytes: int = READ_BYTES, in_flight: int = IN_FLIGHT
    ) -> None:
        self.copies, self.reads = copies, reads
        self._read_bytes = read_bytes
        self._queue = ReadQueue(
            lambda: PinnedBuffer(read_bytes + (0 if reads == CACHED else 2 * ALIGN), copies),
            reads=reads,
            in_flight=in_flight,
            at_once=in_flight if reads == CACHED else min(AT_ONCE, in_flight),
            spare=SPARE_BUFFERS,
        )

    @property
    def refused(self) -> str:
        """Why anything was read through the page cache against ``reads``, or ""."""
        return self._queue.why

    def fill(
        self,
        wanted: Iterable[TensorRead],
        digests: Mapping[Path, str] | None = None,
        *,
        stop: Callable[[], None] = no_stop,
        after: Event = None,
        check: ReadCheck | None = None,
    ) -> Event:
        """Read every tensor. Returns the event after which those on the device are there.

        The files of ``digests`` (file: blake3) are read whole and compared; without them ``check`` sees each read.
        Nothing is copied to the device before ``after``; default: where the computation is now, which is when tensors
        just made are free to be written. ``stop`` raises to end the reading. Raises OverlayError for a file that
        changed or cannot be read; what had arrived by then is not to be used.
        """
        after = after or self.copies.now()
        event: Event = None
        try:
            whole = [Range(path, 0, regular_size(path)) for path in digests or ()]
            planned = plan_reads(wanted, whole, self._read_bytes)
            with contextlib.closing(HashCheck(digests or {}, whole)) as hashes:
                with contextlib.closing(self._queue.run(planned, check or hashes, stop)) as reads:
                    for read in reads:
                        event = self._deliver(read, after) or event
                hashes.finish()
        except (SourceError, FormatError) as error:
            raise changed_file(Path(error.file or ""), error.expected or "readable", error.problem) from None
        return event

    def close(self) -> None:
        """End the threads and give the buffers back."""
        self._queue.close()

    def _deliver(self, read: PendingRead[TensorRead, PinnedBuffer], after: Event) -> Event:
        """Send on to the device what is meant for it, and note what arrived on the host."""
        event: Event = None
        if read.buffer is not None and not read.planned.on_host:
            data = read.buffer.host.bytes[read.lead :]
            event = read.buffer.event = self.copies.run(lambda: _send_on(read.planned, data), after)
        with torch.inference_mode():
            for stretch in read.planned.stretches:
                if (target := stretch.host_target) is not None:
                    target.arrived(stretch.nbytes)
        return event


def _send_on(read: PlannedRead[TensorRead], data: Tensor) -> None:
    """Copy from the buffer what is not yet at its target. Runs in the queue of copies."""
    position = 0
    for stretch in read.stretches:
        target = stretch.target
        if target is not None and not target.on_host:
            part = data[position : position + stretch.nbytes]
            target.bytes(stretch.offset, stretch.nbytes).copy_(part, non_blocking=True)
            target.arrived(stretch.nbytes)
        position += stretch.nbytes
