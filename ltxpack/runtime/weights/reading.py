"""Tensors from safetensors files to a device or to host memory, with several reads in flight, hashed as they pass.

Bytes for a device pass through a few pinned buffers. Bytes for host memory go straight to their tensor, or past the
page cache through a buffer too. Knows no module and no names: :class:`TensorRead` says which bytes go to which tensor.
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
    """A tensor of dtype ``stored``, whose bytes are ``source``, on its way into the contiguous ``final``.

    If ``final`` has another dtype, the tensor is cast on arrival. ``on_host``: ``final`` is host memory, which the
    reading threads fill; else the queue of copies does. ``then`` is called when the last byte is there or in the queue.
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
        """The place of ``nbytes`` of the stored bytes from ``offset`` on, as uint8."""
        if self._arriving is None:
            same = self.final.dtype == self.stored
            self._arriving = self.final if same else torch.empty_like(self.final, dtype=self.stored)
        return self._arriving.reshape(-1).view(torch.uint8)[offset : offset + nbytes]

    def view(self, offset: int, nbytes: int) -> memoryview:
        """As :meth:`bytes`, for a tensor on the host."""
        return self.bytes(offset, nbytes).numpy().data

    def arrived(self, nbytes: int) -> None:
        """Note that ``nbytes`` more are there; after the last ones, cast the tensor if it must be."""
        self._missing -= nbytes
        if self._missing == 0 and self._arriving is not None:
            if self._arriving is not self.final:
                self.final.copy_(self._arriving)
            self._arriving = None
            if self.then is not None:
                self.then()


class PinnedBuffer(HostMemory):
    """A pinned buffer for reads. ``event``: the copy done of the last read."""

    def __init__(self, nbytes: int, copies: Copies) -> None:
        super().__init__(nbytes, copies)
        self.pin()
        self.memory: memoryview = self.bytes.numpy().data
        self.event: Event = None

    def wait(self) -> None:
        """Let the host wait until the device has copied."""
        self.copies.finish(self.event)


class HashCheck:
    """The blake3 of files that are read in any order, compared with ``digests``; on one thread.

    A read before its turn waits in host memory, or is read again if WAITING bytes wait already. Bytes outside
    ``places`` are read here. Repeated reads and those of other files are left out.
    """

    def __init__(self, digests: Mapping[Path, str], places: Iterable[Range]) -> None:
        found: dict[Path, list[Range]] = {path: [] for path in digests}
        for place in places:
            found[place.path].append(place)
        self._digests = digests
        self._files = {path: _FileHash(path, own) for path, own in found.items()}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ltxpack-hash")

    def begin(self, read: PlannedRead[Any], views: Sequence[memoryview]) -> Future[None] | None:
        """Begin to hash ``read``; ``views`` must stay until that is done."""
        return self._thread.submit(self._take, read, views) if read.file in self._files else None

    def finish(self) -> None:
        """Hash the missing bytes, and compare. Raises OverlayError for a file that changed."""
        for path, expected in self._digests.items():
            found = self._thread.submit(self._files[path].digest).result()
            if found != expected:
                raise changed_file(path, f"blake3 {expected}", f"blake3 {found}")

    def close(self) -> None:
        """End the thread after what it has begun: somebody may wait for the buffers."""
        self._thread.shutdown(wait=True)

    def _take(self, read: PlannedRead[Any], views: Sequence[memoryview]) -> None:
        waiting = sum(file.waiting for file in self._files.values())
        self._files[read.file].take(read.start, views, waiting + read.nbytes <= WAITING)


class _FileHash:
    """The hash of one file up to a position."""

    def __init__(self, path: Path, places: Sequence[Range]) -> None:
        self._path = path
        self._tensors = sorted((place.start, place.start + place.nbytes) for place in places if place.nbytes)
        self._hasher = blake3(max_threads=blake3.AUTO)
        self._position = 0
        # Pieces after the position, by their start: their bytes, or the number of bytes to read again.
        self._early: dict[int, bytes | int] = {}

    @property
    def waiting(self) -> int:
        """Bytes in memory that wait for their turn."""
        return sum(len(data) for data in self._early.values() if isinstance(data, bytes))

    def take(self, start: int, views: Sequence[memoryview], keep: bool) -> None:
        """Hash the bytes from ``start`` on, or remember them until their turn; ``keep``: they may wait in memory."""
        self._advance()
        if start == self._position:
            for view in views:
                self._update(view)
            self._advance()
        elif start > self._position and start not in self._early:
            self._early[start] = b"".join(views) if keep else sum(map(len, views))

    def digest(self) -> str:
        """The hash, after reading all missing bytes. Raises OverlayError."""
        self._tensors.clear()
        self._advance()
        return self._hasher.hexdigest()

    def _update(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)
        self._position += len(data)

    def _advance(self) -> None:
        """Hash bytes that wait, and those that nobody will bring, up to the first that somebody will."""
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
        """The start of the next bytes that somebody has brought or will bring."""
        tensors = (max(start, self._position) for start, end in self._tensors if end > self._position)
        return min([size, next(tensors, size), *(start for start in self._early if start > self._position)])


class FileReader:
    """Reads files on threads and delivers the reads in the order of the file. For one thread at a time.

    ``reads``: one of files.direct.READS; past the page cache only if that helps. ``in_flight`` reads of ``read_bytes``
    are under way or in line.
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
        """Why a file was read through the page cache against ``reads``, or ""."""
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

        The files of ``digests`` (file: blake3) are read whole and compared; without them ``check`` sees each read. No
        copy to the device begins before ``after``, by default before all that the computation is asked for by now: then
        new tensors are free to be written. ``stop`` raises to end the reading. Raises OverlayError for a file that
        changed or cannot be read; the tensors are then of no use.
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
        except BaseException as error:
            self.copies.finish(event)  # the caller frees the tensors, to which copies may still be on their way
            if not isinstance(error, SourceError | FormatError):
                raise
            error.__traceback__ = None  # it and the read that failed would keep each other, and all that was read
            raise changed_file(Path(error.file or ""), error.expected or "readable", error.problem) from None
        return event

    def close(self) -> None:
        """End the threads and free the buffers."""
        self._queue.close()

    def _deliver(self, read: PendingRead[TensorRead, PinnedBuffer], after: Event) -> Event:
        """Copy to the device the bytes for it, and note those that arrived on the host."""
        event: Event = None
        if read.buffer is not None and not read.planned.on_host:
            data = read.buffer.bytes[read.lead :]
            event = read.buffer.event = self.copies.run(lambda: _send_on(read.planned, data), after)
        with torch.inference_mode():
            for stretch in read.planned.stretches:
                if (target := stretch.host_target) is not None:
                    target.arrived(stretch.nbytes)
        return event


def _send_on(read: PlannedRead[TensorRead], data: Tensor) -> None:
    """Copy from the buffer to targets on the device. Runs in the queue of copies."""
    position = 0
    for stretch in read.stretches:
        target = stretch.target
        if target is not None and not target.on_host:
            part = data[position : position + stretch.nbytes]
            target.bytes(stretch.offset, stretch.nbytes).copy_(part, non_blocking=True)
            target.arrived(stretch.nbytes)
        position += stretch.nbytes
