"""Reads and hashes files with several requests in flight, past the page cache where that helps; results in order.

``plan_reads`` cuts the wanted ranges into reads, a ``ReadQueue`` carries them out. A read goes into a buffer, or
straight into the memory of its targets. A target is anything with a range of a file. Knows no tensors, cards or names.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from blake3 import blake3

from ltxpack.files.direct import ALIGN, BUFFER, CACHED, DIRECT, DIRECT_FROM, DirectReader, aligned_buffer
from ltxpack.files.tensorfile import open_source, regular_size
from ltxpack.reporter import Reporter

# The size of a large read. Past the page cache AT_ONCE reads are under way, and IN_LINE more wait for a thread: reads
# that begin together end together, and the queue keeps the disk busy while the caller takes their bytes. Through the
# cache, where the system reads ahead and threads copy, all are under way at once.
READ_BYTES = 16 * 1024 * 1024
AT_ONCE, IN_LINE = 6, 6
IN_FLIGHT = AT_ONCE + IN_LINE
# Buffers beyond those of the reads in flight, for copies to a device that are not done.
SPARE_BUFFERS = 4
# Reads of a RangeReader that are under way, done and waiting, or in use. A single one leaves a fast disk half idle.
RANGES_IN_FLIGHT = 6


class Range(NamedTuple):
    """``nbytes`` bytes of ``path`` from offset ``start``."""

    path: Path
    start: int
    nbytes: int


class Target(Protocol):
    """The destination of the bytes of ``source``."""

    @property
    def source(self) -> Range: ...

    @property
    def on_host(self) -> bool:
        """Whether the reading threads fill it. For other targets the bytes stay in the buffer, for the caller."""

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The memory for ``nbytes`` bytes from ``offset`` on; only if ``on_host``."""


T = TypeVar("T", bound=Target)


@dataclass(frozen=True, slots=True)
class Stretch(Generic[T]):
    """Adjacent bytes of a file: those of ``target`` from its ``offset`` on, or bytes without a target."""

    start: int
    nbytes: int
    target: T | None = None
    offset: int = 0

    @property
    def host_target(self) -> T | None:
        """The target, if the reading threads fill it."""
        return self.target if self.target is not None and self.target.on_host else None


@dataclass(frozen=True, slots=True)
class PlannedRead(Generic[T]):
    """The bytes of one read: stretches without a gap between them."""

    file: Path
    stretches: tuple[Stretch[T], ...]

    @property
    def start(self) -> int:
        return self.stretches[0].start

    @property
    def nbytes(self) -> int:
        return sum(stretch.nbytes for stretch in self.stretches)

    @property
    def on_host(self) -> bool:
        """Whether the reading threads copy all of it to its targets."""
        return all(stretch.host_target is not None for stretch in self.stretches)


class Buffer(Protocol):
    """Page-aligned memory for one read after the other."""

    @property
    def memory(self) -> memoryview: ...

    def wait(self) -> None:
        """Wait until no copy uses the bytes of the last read."""


class HostBuffer:
    """A buffer for a caller that has finished with its bytes when it asks for the next read."""

    def __init__(self, nbytes: int) -> None:
        self.memory = aligned_buffer(nbytes)

    def wait(self) -> None: ...


B = TypeVar("B", bound=Buffer)


class ReadCheck(Protocol):
    """Checks the bytes that are read, in order."""

    def begin(self, read: PlannedRead[Any], views: Sequence[memoryview]) -> Future[None] | None:
        """Begin to check ``read``; ``views`` stay valid until that is done. Returns None if there is nothing to do."""


@dataclass(slots=True)
class PendingRead(Generic[T, B]):
    """A read under way: its bytes go to ``views``; in ``buffer`` they begin at byte ``lead``."""

    planned: PlannedRead[T]
    views: list[memoryview]
    buffer: B | None
    done: Future[None]
    lead: int = 0
    checked: Future[None] | None = None


def no_stop() -> None:
    """A ``stop`` that never ends the reading."""


class ReadQueue(Generic[B]):
    """Carries out planned reads on ``at_once`` threads, ``in_flight`` of them under way or in line. For one caller.

    A finished read keeps its buffer while the queue hands out ``spare`` more. ``why``: the reason if a read went
    through the page cache although ``reads`` (one of direct.READS) says otherwise, or "".
    """

    def __init__(
        self, make_buffer: Callable[[], B], *, reads: str, in_flight: int, at_once: int, spare: int = 0
    ) -> None:
        self.reads, self.in_flight = reads, in_flight
        self.why = ""
        self._make_buffer, self._unmade = make_buffer, in_flight + spare
        # Oldest first, each with the check that must be done before it is used again.
        self._buffers: deque[tuple[B, Future[None] | None]] = deque()
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="ltxpack-read")

    def run(
        self, planned: Iterable[PlannedRead[T]], check: ReadCheck | None = None, stop: Callable[[], None] = no_stop
    ) -> Generator[PendingRead[T, B]]:
        """The finished reads in their order; ``check`` has begun with each. ``stop`` raises to end the reading.

        Close the iterator if you leave it early. Raises SourceError or FormatError (see DirectReader).
        """
        pending: deque[PendingRead[T, B]] = deque()
        with contextlib.ExitStack() as files:
            opened = functools.cache(
                lambda path: files.enter_context(contextlib.closing(DirectReader(path, self.reads)))
            )
            try:
                for read in planned:
                    file = opened(read.file)
                    stop()
                    if self.reads != CACHED:
                        self.why = file.why or self.why
                    pending.append(self._begin(read, file))
                    if len(pending) == self.in_flight:
                        yield from self._finish(pending, check)
                while pending:
                    yield from self._finish(pending, check)
            finally:
                self._abandon(pending)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for buffer, checked in self._buffers:
            _wait(buffer, checked)
        self._buffers.clear()

    def _begin(self, read: PlannedRead[T], file: DirectReader) -> PendingRead[T, B]:
        if not file.past_cache:
            buffer = None if read.on_host else self._free_buffer()
            views = list(_views(read, buffer.memory if buffer is not None else memoryview(b"")))
            return PendingRead(read, views, buffer, self._threads.submit(file.scatter, views, read.start))
        # A read past the cache needs aligned pages, so it goes to the buffer; its thread copies to targets on the host.
        buffer, lead = self._free_buffer(), read.start % ALIGN
        memory = buffer.memory
        found = memory[lead : lead + read.nbytes]
        copies = list(_on_host(read))

        def gather() -> None:
            file.gather(memory, read.start, len(found))
            for view, begin, end in copies:
                copy_bytes(view, found[begin:end])

        return PendingRead(read, [found], buffer, self._threads.submit(gather), lead)

    def _finish(self, pending: deque[PendingRead[T, B]], check: ReadCheck | None) -> Iterator[PendingRead[T, B]]:
        read = pending[0]
        read.done.result()
        read.checked = check.begin(read.planned, read.views) if check is not None else None
        yield read
        pending.popleft()
        if read.buffer is not None:
            self._buffers.append((read.buffer, read.checked))

    def _free_buffer(self) -> B:
        if self._unmade:
            self._unmade -= 1
            return self._make_buffer()
        buffer, checked = self._buffers.popleft()
        _wait(buffer, checked)
        return buffer

    def _abandon(self, pending: deque[PendingRead[T, B]]) -> None:
        """Cancel or wait for ``pending``, so that no thread writes to memory that the caller frees."""
        for read in pending:
            read.done.cancel()
        for read in pending:
            with contextlib.suppress(Exception, CancelledError):
                read.done.result()
            if read.buffer is not None:
                _wait(read.buffer, read.checked)
                self._buffers.append((read.buffer, None))
        pending.clear()


class RangeReader:
    """Yields the bytes of each range in order, read ahead on threads into buffers as large as the largest range.

    A view stays valid until the caller asks for the next one, and for ``kept`` more. It starts at a multiple of 8 bytes
    in memory. ``why``: the reason if a read went through the page cache, or "". Use as a context manager; raises
    SourceError, or FormatError for a file that ends before the range does.
    """

    def __init__(
        self, ranges: Sequence[Range], *, in_flight: int = RANGES_IN_FLIGHT, kept: int = 0, direct: bool = True
    ) -> None:
        capacity = max((wanted.start % ALIGN + wanted.nbytes for wanted in ranges), default=0)
        make, reads = functools.partial(HostBuffer, capacity), DIRECT if direct else CACHED
        self._queue = ReadQueue(make, reads=reads, in_flight=in_flight, at_once=in_flight, spare=kept)
        planned: Iterator[PlannedRead[Target]]
        planned = (PlannedRead(path, (Stretch(start, nbytes),)) for path, start, nbytes in ranges)
        self._reads = self._queue.run(planned)

    @property
    def why(self) -> str:
        return "as asked" if self._queue.reads == CACHED else self._queue.why

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._reads.close()
        self._queue.close()

    def __iter__(self) -> Iterator[memoryview]:
        for read in self._reads:
            assert read.buffer is not None
            nbytes, lead = read.planned.nbytes, read.lead
            memory = read.buffer.memory
            if lead % 8:  # readers of floats want an aligned address; a file's header may have any length
                memory[lead // 8 * 8 : lead // 8 * 8 + nbytes] = memory[lead : lead + nbytes]
                lead = lead // 8 * 8
            yield memory[lead : lead + nbytes]


def file_ranges(path: Path, size: int) -> list[Range]:
    """The whole file in reads of 4 MB."""
    return [Range(path, start, min(BUFFER, size - start)) for start in range(0, size, BUFFER)]


def hash_file(
    path: Path,
    reporter: Reporter | None = None,
    *,
    before: bytes = b"",
    cached: bool = False,
    watch: Callable[[Iterable[memoryview]], Iterator[memoryview]] = iter,
) -> str:
    """blake3 of ``before`` and then all of the file, as hex digits, at disk speed.

    ``cached`` reads through the page cache and leaves the file there, for a later load. Otherwise ``watch`` sees the
    bytes in the reads of ``file_ranges``. Advances ``reporter`` by the bytes read. Raises SourceError, or FormatError
    for a file that becomes shorter meanwhile.
    """
    size = regular_size(path)
    hasher = blake3(before, max_threads=blake3.AUTO if cached else 1)
    if cached:
        # Not through a mapping: where the disk fails, that ends the process (SIGBUS).
        with open_source(path) as file:
            while part := file.read(READ_BYTES):
                hasher.update(part)
        if reporter is not None:
            reporter.advance(size)
        return hasher.hexdigest()
    ranges = file_ranges(path, size)
    with RangeReader(ranges, direct=size >= DIRECT_FROM) as reader:
        for data in watch(reader):
            hasher.update(data)
            if reporter is not None:
                reporter.advance(len(data))
    return hasher.hexdigest()


def plan_reads(targets: Iterable[T], whole: Iterable[Range], limit: int) -> Iterator[PlannedRead[T]]:
    """Reads of at most ``limit`` bytes, file by file: all bytes of the files ``whole``, of others only the targets."""
    sizes = {path: size for path, _, size in whole}
    by_file: dict[Path, list[T]] = {path: [] for path in sizes}
    for target in targets:
        by_file.setdefault(target.source.path, []).append(target)
    for path, wanted in by_file.items():
        wanted.sort(key=lambda target: target.source.start)
        for stretches in _cut(_stretches(wanted, sizes.get(path)), limit):
            yield PlannedRead(path, stretches)


def _stretches(targets: Sequence[T], size: int | None) -> Iterator[Stretch[T]]:
    """The targets as stretches in order; with ``size`` also the bytes before, between and after them."""
    end = 0
    for target in targets:
        _, start, nbytes = target.source
        if size is not None and start > end:
            yield Stretch(end, start - end)
        if nbytes:
            yield Stretch(start, nbytes, target)
        end = max(end, start + nbytes)
    if size is not None and size > end:
        yield Stretch(end, size - end)


def _cut(stretches: Iterable[Stretch[T]], limit: int) -> Iterator[tuple[Stretch[T], ...]]:
    """Groups of stretches without gaps, each of at most ``limit`` bytes."""
    group: list[Stretch[T]] = []
    held = 0
    for stretch in stretches:
        if group and group[-1].start + group[-1].nbytes != stretch.start:
            yield tuple(group)
            group, held = [], 0
        done = 0
        while done < stretch.nbytes:
            taken = min(limit - held, stretch.nbytes - done)
            group.append(Stretch(stretch.start + done, taken, stretch.target, done))
            done, held = done + taken, held + taken
            if held == limit:
                yield tuple(group)
                group, held = [], 0
    if group:
        yield tuple(group)


def _on_host(read: PlannedRead[T]) -> Iterator[tuple[memoryview, int, int]]:
    """For each stretch with a target on the host: the target's memory, and the stretch's begin and end in ``read``."""
    for stretch in read.stretches:
        if (target := stretch.host_target) is not None:
            begin = stretch.start - read.start
            yield target.view(stretch.offset, stretch.nbytes), begin, begin + stretch.nbytes


def _views(read: PlannedRead[T], memory: memoryview) -> Iterator[memoryview]:
    """The destinations of ``read``'s bytes, in order: a target's memory, or adjacent bytes of ``memory``."""
    position = 0
    for view, begin, end in _on_host(read):
        if begin > position:
            yield memory[position:begin]
        yield view
        position = end
    if read.nbytes > position:
        yield memory[position : read.nbytes]


def copy_bytes(view: memoryview, data: memoryview) -> None:
    """Copy ``data`` to ``view`` without the interpreter lock, which a memoryview's own copy holds."""
    import numpy as np

    np.copyto(np.asarray(view), np.asarray(data))


def _wait(buffer: Buffer, checked: Future[None] | None) -> None:
    """Wait until nothing reads the buffer. A fault that the check found is raised later, with its results."""
    buffer.wait()
    if checked is not None:
        wait([checked])
