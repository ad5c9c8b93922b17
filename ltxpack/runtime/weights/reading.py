"""Tensors from safetensors files to a device or to host memory, with several reads in flight, hashed as they pass.

Bytes for a device pass through a few pinned buffers; bytes for host memory are read straight to their tensor, or past
the page cache through a buffer too. No file is held whole. Knows no module and no names: what is read to which tensor
comes in as :class:`TensorRead` values. The queue of reads is files.reader's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


class TensorRead:
    """A tensor whose stored bytes are ``source``, of dtype ``stored``, on its way into the contiguous ``final``.

    Another dtype of ``final`` is a cast on arrival. ``on_host``: ``final`` is host memory, filled by the threads that
    read; else the queue of copies fills it. ``then`` is called when its last byte is there, or in that queue.
    """

    __slots__ = ("_arriving", "_missing", "_then", "final", "on_host", "source", "stored")

    def __init__(
        self,
        source: Range,
        stored: torch.dtype,
        final: Tensor,
        on_host: bool = False,
        then: Callable[[], object] | None = None,
    ) -> None:
        self.source, self.stored, self.final, self.on_host = source, stored, final, on_host
        self._then = then
        self._missing = source.nbytes
        self._arriving: Tensor | None = None

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
            if self._then is not None:
                self._then()


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
    """The blake3 of ``files``, whose reads pass by file after file and in order; on ``thread``, which must be one."""

    def __init__(self, files: Collection[Path], thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._begun: list[Future[None]] = []
        self._hashers = {path: blake3(max_threads=blake3.AUTO) for path in files}

    def begin(self, read: PlannedRead[Any], views: Sequence[memoryview]) -> Future[None] | None:
        """Begin to hash ``read``, if its file is one of ``files``. ``views`` must stay until that is done."""
        if read.file not in self._hashers:
            return None
        self._begun.append(self._thread.submit(self._update, self._hashers[read.file], views))
        return self._begun[-1]

    def digests(self) -> dict[Path, str]:
        """The hash of each file, as hex digits, when all reads have passed."""
        for each in self._begun:
            each.result()
        return {path: hasher.hexdigest() for path, hasher in self._hashers.items()}

    def _update(self, hasher: blake3, views: Sequence[memoryview]) -> None:
        for view in views:
            hasher.update(view)


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
        # One thread: files are hashed in order, while the next bytes are sent on.
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="ltxpack-hash")

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
        expected = digests or {}
        hashes = HashCheck(expected, self._hashing)
        after = after or self.copies.now()
        event: Event = None
        try:
            whole = [Range(path, 0, regular_size(path)) for path in expected]
            planned = plan_reads(wanted, whole, self._read_bytes)
            with contextlib.closing(self._queue.run(planned, check or hashes, stop)) as reads:
                for read in reads:
                    event = self._deliver(read, after) or event
        except (SourceError, FormatError) as error:
            raise changed_file(Path(error.file or ""), error.expected or "readable", error.problem) from None
        for path, found in hashes.digests().items():
            if found != expected[path]:
                raise changed_file(path, f"blake3 {expected[path]}", f"blake3 {found}")
        return event

    def close(self) -> None:
        """End the threads and give the buffers back."""
        self._hashing.shutdown(wait=True)
        self._queue.close()

    def _deliver(self, read: PendingRead[TensorRead, PinnedBuffer], after: Event) -> Event:
        """Send on to the device what is meant for it, and note what arrived on the host."""
        event: Event = None
        if read.buffer is not None and not read.planned.on_host:
            data = read.buffer.host.bytes[read.lead :]
            event = read.buffer.event = self.copies.run(lambda: _send_on(read.planned, data), after)
        _note_on_host(read.planned)
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


@torch.inference_mode()
def _note_on_host(read: PlannedRead[TensorRead]) -> None:
    for stretch in read.stretches:
        if (target := stretch.host_target) is not None:
            target.arrived(stretch.nbytes)
