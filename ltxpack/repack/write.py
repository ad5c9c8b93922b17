"""Carries out a plan: checks it, then writes one item after the other, each whole and flushed to the disk.

No file has its final name before it is complete. Knows how to write items, not what they mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import posixpath
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from blake3 import blake3

from ltxpack.errors import FormatError, OverlayError
from ltxpack.files.direct import ALIGN, BUFFER, DIRECT_FROM, DirectWriter, aligned_buffer, round_up
from ltxpack.files.publish import Temporary, existing_parent, fsync_file, require_space, write_errors
from ltxpack.files.reader import Range, RangeReader, file_ranges, hash_file
from ltxpack.files.tensorfile import regular_size, truncated
from ltxpack.manifest import FileRecord, changed_file, safe_relative_path
from ltxpack.repack.items import Buffer, CopyFile, Item, LinkFile, WriteBytes, WriteShard, sources
from ltxpack.repack.staging import Staging
from ltxpack.reporter import Reporter

# Buffers of the file being written; the hash takes steps that stay in a core's cache.
WRITE_BUFFERS = 4
HASH_STEP = 256 * 1024
# The size of one read. With the bytes that alignment adds before it, a read fills a buffer of whole huge pages.
WINDOW = BUFFER - ALIGN
# One read covers ranges of a source that are this near to each other, and throws the gap away.
MAX_GAP = 64 * 1024
FICLONE = getattr(fcntl, "FICLONE", 0x40049409)  # Python has it from 3.12 on


# Inspects the bytes of ranges as they are read, and passes them on.
Watch = Callable[[Sequence[Range], Iterable[memoryview]], Iterator[memoryview]]


def unwatched(_: Sequence[Range], data: Iterable[memoryview]) -> Iterator[memoryview]:
    return iter(data)


def execute(
    items: Sequence[Item], staging: Staging, *, copy: bool, reporter: Reporter, watch: Watch = unwatched
) -> tuple[FileRecord, ...]:
    """Write the items that ``staging`` lacks; returns the records of all items, in order of the plan.

    ``copy`` forbids links; ``watch`` sees all reads. Raises OverlayError (no space or permission before the first
    byte, or a disk that fills up), SourceError and FormatError for sources; ``staging`` keeps complete files.
    """
    for path, count in Counter(item.path for item in items).items():
        if not safe_relative_path(path) or count > 1:  # a fault of whoever made the plan
            raise OverlayError("is not a path inside the overlay, or is planned twice", file=path)
    left = [item for item in items if item.path not in staging.done]
    preflight(left, staging.root, copy=copy)
    if left:
        reporter.begin("writing", sum(item.size for item in left), "B")
        for item in left:
            record = write_item(item, staging.root, staging.paths.overlay, copy=copy, reporter=reporter, watch=watch)
            staging.record(record)
        reporter.end()
    return tuple(staging.done[item.path] for item in items)


def write_item(
    item: Item, root: Path, overlay: Path, *, copy: bool, reporter: Reporter, watch: Watch = unwatched
) -> FileRecord:
    """Write one item under ``root``, whole and flushed to the disk. ``overlay`` holds the targets of links."""
    match item:
        case WriteShard():
            return write_shard(item, root, reporter, watch)
        case CopyFile():
            return copy_file(item, root, reporter, copy=copy, watch=watch)
        case LinkFile():
            return write_link(item, root, overlay, reporter)
        case WriteBytes():
            record = write_bytes(item, root)
    reporter.advance(item.size)
    return record


def write_shard(item: WriteShard, root: Path, reporter: Reporter, watch: Watch = unwatched) -> FileRecord:
    """Write the shard under ``root``. Advances ``reporter`` by the bytes of the file."""
    windows = read_plan(source for entry in item.entries for source in entry.producer.ranges)
    ranges = [window.range for window in windows]
    reader = RangeReader(ranges)
    parts = parts_of(windows, watch(ranges, reader))
    made = (
        entry.producer.make(taken(parts, sum(source.nbytes for source in entry.producer.ranges)))
        for entry in item.entries
    )
    return _stream(item, item.header, itertools.chain.from_iterable(made), reader, root, reporter)


def _stream(
    item: WriteShard | CopyFile,
    header: bytes,
    made: Iterable[Buffer],
    reader: RangeReader,
    root: Path,
    reporter: Reporter,
) -> FileRecord:
    """Write a file of ``header`` and the bytes that ``made`` gives from reads ahead."""
    with ShardWriter(root, item.path, header, item.size) as writer, reader:
        reporter.advance(len(header))
        for data in made:
            writer.write(data)
            reporter.advance(memoryview(data).nbytes)
        record = writer.close()
    reporter.detail(f"{item.path}: {'copied, ' if isinstance(item, CopyFile) else ''}{passage(reader, writer)}")
    return record


@dataclass
class Window:
    """One read, and its wanted parts: offset in it, bytes."""

    path: Path
    start: int
    parts: list[tuple[int, int]] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + sum(self.parts[-1])

    @property
    def range(self) -> Range:
        return Range(self.path, self.start, self.end - self.start)


def read_plan(ranges: Iterable[Range], limit: int = WINDOW) -> list[Window]:
    """Reads of all bytes of ``ranges`` in order, shared by neighbours; each part belongs to one range."""
    windows: list[Window] = []
    for path, start, nbytes in ranges:
        first, end = start, start + nbytes
        while first < end:
            last, room = (windows[-1] if windows else None), 0
            if last is not None and last.path == path and 0 <= first - last.end <= MAX_GAP:
                # With a multiple of 8 no element of a cast lies in two reads.
                room = (last.start + limit - first) // 8 * 8
            if last is None or room <= 0:
                last, room = Window(path, first), limit // 8 * 8
                windows.append(last)
            count = min(end - first, room)
            last.parts.append((first - last.start, count))
            first += count
    return windows


def parts_of(windows: Iterable[Window], read: Iterable[memoryview]) -> Iterator[memoryview]:
    """The wanted parts of ``read``, the bytes of ``windows``."""
    for window, data in zip(windows, read, strict=True):
        for at, size in window.parts:
            yield data[at : at + size]


def taken(parts: Iterator[memoryview], nbytes: int) -> Iterator[memoryview]:
    """The next parts, which have ``nbytes`` bytes together."""
    while nbytes:
        part = next(parts)
        nbytes -= len(part)
        yield part


def passage(reader: RangeReader, writer: TensorWriter) -> str:
    """A detail for ``-v``: whether the bytes went past the page cache, or why not."""
    ways = (("read", reader.why), ("written", writer.why))
    return ", ".join(f"{verb} {f'through the page cache ({why})' if why else 'with O_DIRECT'}" for verb, why in ways)


def copy_file(
    item: CopyFile, root: Path, reporter: Reporter, *, copy: bool = False, watch: Watch = unwatched
) -> FileRecord:
    """Take over the real file behind ``item.source``: reflink, else hard link, else (or with ``copy``) copy.

    A linked file is read for its hash. Advances ``reporter`` by its size. Raises FormatError for a source that changed.
    """
    found, source = regular_size(item.source), Path(os.path.realpath(item.source))
    if found != item.size:
        raise FormatError("has changed since it was planned", file=item.source, expected=item.size, found=found)
    ranges = file_ranges(source, item.size)
    how = None if copy else _link(source, root / item.path)
    if how is None:
        reader = RangeReader(ranges, direct=item.size >= DIRECT_FROM)
        return _stream(item, b"", watch(ranges, reader), reader, root, reporter)
    reporter.detail(f"{item.path}: {how}")
    digest = hash_file(root / item.path, reporter, watch=functools.partial(watch, ranges))
    return FileRecord(item.path, item.size, digest, "hard" if how == "hard-linked" else None)


def _link(source: Path, target: Path) -> str | None:
    """Give ``target`` the bytes of the real file ``source``: "reflinked" or "hard-linked"; None: copy it."""
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        link = Temporary(target, made=False)
        for how, make in (("reflinked", _reflink), ("hard-linked", os.link)):
            try:
                make(source, link.path)
            except OSError:
                link.discard()
                continue
            with contextlib.suppress(OSError):  # some systems sync only what this process wrote
                fsync_file(link.path)
            link.publish(synced=True)
            return how
    return None


def _reflink(source: Path, target: Path) -> None:
    with source.open("rb") as origin, target.open("xb") as copy:
        fcntl.ioctl(copy.fileno(), FICLONE, origin.fileno())


def write_bytes(item: WriteBytes, root: Path) -> FileRecord:
    with ShardWriter(root, item.path, item.data, item.size) as writer:
        return writer.close()


def write_link(item: LinkFile, root: Path, overlay: Path, reporter: Reporter) -> FileRecord:
    """Make the relative symlink under ``root``; on a filesystem without symlinks take over the file in ``overlay``.

    Advances ``reporter`` by the file's size. Raises OverlayError if that file differs from the plan.
    """
    path = root / item.path
    assert item.link is not None
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        link = Temporary(path, made=False)
        try:
            link.path.symlink_to(item.link)
            link.publish(synced=True)
        except OSError as error:
            link.discard()
            reporter.detail(f"{item.path}: no link: {error.strerror}")
        else:
            reporter.advance(item.size)
            return item
    goal = overlay / posixpath.normpath(posixpath.join(posixpath.dirname(item.path), item.link))
    record = copy_file(CopyFile(item.path, goal, item.size), root, reporter)
    if record.blake3 != item.blake3:
        raise changed_file(goal, f"blake3 {item.blake3}", f"blake3 {record.blake3}")
    return record


def preflight(items: Sequence[Item], folder: Path, *, copy: bool) -> None:
    """Check that ``items`` can be read, and written under ``folder``, which may not exist yet.

    Raises SourceError or FormatError for an absent or short source, OverlayError for a read-only folder or a full disk.
    """
    for path, needed in sources(items).items():
        if (size := regular_size(path)) < needed:
            raise truncated(path, needed, size)
    require_space(folder, sum(item.size for item in items if not _takes_no_space(item, folder, copy)), len(items))


def _takes_no_space(item: Item, folder: Path, copy: bool) -> bool:
    """Whether ``item`` is a link, or a file that can probably be reflinked or hard-linked into ``folder``."""
    if isinstance(item, LinkFile):
        return _has_links(existing_parent(folder))
    if not isinstance(item, CopyFile) or copy:
        return False
    try:
        status = item.source.stat()
        # Linux (protected_hardlinks) lets users link only what they own or may write.
        mine = os.geteuid() in (0, status.st_uid) or os.access(item.source, os.W_OK)
        return mine and status.st_dev == existing_parent(folder).stat().st_dev
    except OSError:
        return False


def _has_links(folder: Path) -> bool:
    """Whether ``folder``'s filesystem has links of any kind."""
    first, second = (Temporary(folder / "trial", made=False) for _ in range(2))
    try:
        first.path.touch()
        for make in (second.path.symlink_to, second.path.hardlink_to):
            with contextlib.suppress(OSError):
                make(first.path)
                return True
        return False
    except OSError:
        return True
    finally:
        first.discard()
        second.discard()


class TensorWriter(Protocol):
    """Takes the bytes of a shard's tensors in their order."""

    @property
    def why(self) -> str:
        """The reason for not writing past the page cache, or ""."""

    def write(self, data: Buffer) -> None: ...

    def close(self) -> FileRecord:
        """Return when all bytes are on the disk."""


class ShardWriter:
    """Writes one file of known size front to back: ``write`` … ``close``. Without ``close`` no file stays.

    A thread writes. The caller's thread copies memory and hashes (blake3) the copy while it is still in the processor's
    cache: a thread for the hash alone would cost a third more CPU. The bytes go to a temporary file beside ``root /
    path``, which gets its name when all bytes are on the disk. Up to ``buffers`` buffers of 4 MB are in flight.
    ``size`` includes the ``header``, which is written at once. Raises OverlayError if the disk is full or fails.
    """

    def __init__(self, root: Path, path: str, header: bytes, size: int, *, buffers: int = WRITE_BUFFERS) -> None:
        self.path, self.size = path, size
        self._target = root / path
        self._hasher = blake3()
        self._written = 0
        self._spare = buffers
        self._memory: memoryview | None = None
        self._used = self._hashed = 0
        # When each buffer is free again, the oldest first.
        self._pending: deque[tuple[Future[None], memoryview]] = deque()
        with write_errors(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Temporary(self._target)
            self._file = DirectWriter(self._temporary.path, direct=size >= DIRECT_FROM)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ltxpack-write")
        self.write(header)

    @property
    def why(self) -> str:
        return self._file.why

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop writing and remove the temporary file; after ``close`` only end the thread."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()
        self._temporary.discard()

    def write(self, data: Buffer) -> None:
        """Take the next bytes of the file, any contiguous buffer; the caller may reuse ``data`` at once."""
        source = memoryview(data)
        if not source.nbytes:
            return
        source = source.cast("B")
        done = 0
        while done < len(source):
            memory = self._memory = self._memory or self._take()
            count = min(len(source) - done, HASH_STEP - self._used % HASH_STEP, len(memory) - self._used)
            memory[self._used : self._used + count] = source[done : done + count]
            self._used += count
            done += count
            if self._used % HASH_STEP == 0 or self._used == len(memory):
                self._hash_up_to(self._used)
            if self._used == len(memory):
                self._submit(memory)
        self._written += len(source)

    def close(self) -> FileRecord:
        """Wait for the disk and give the file its name; returns its record."""
        if self._written != self.size:
            raise AssertionError(f"{self.path}: {self._written} bytes were written of {self.size} planned")
        if self._memory is not None:
            self._hash_up_to(self._used)
            self._submit(self._memory)
        with write_errors(self._target):
            for done, _ in self._pending:
                done.result()
            self._file.sync()
            self._file.close()
            self._temporary.publish(synced=True)
        return FileRecord(self.path, self.size, self._hasher.hexdigest())

    def _take(self) -> memoryview:
        """An empty buffer: a new one while there are some to spare, else the next one that is written."""
        self._used = self._hashed = 0
        if self._spare:
            self._spare -= 1
            return aligned_buffer(min(BUFFER, round_up(self.size)))
        done, memory = self._pending.popleft()
        with write_errors(self._target):
            done.result()
        return memory

    def _submit(self, memory: memoryview) -> None:
        self._pending.append((self._thread.submit(self._file.append, memory[: self._used]), memory))
        self._memory = None

    def _hash_up_to(self, end: int) -> None:
        assert self._memory is not None
        self._hasher.update(self._memory[self._hashed : end])
        self._hashed = end
