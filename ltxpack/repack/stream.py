"""The engine: byte ranges in, shards out, at the speed of the disk and in eight 4 MB buffers. Plans nothing.

Reading ahead and writing run on threads of their own. The caller's thread copies memory and hashes (blake3) what it
just copied while that is still in the processor's cache: a thread for the hash alone would cost a third more CPU.
Nothing appears under its final name before it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from blake3 import blake3

from ltxpack.errors import FormatError, SourceError
from ltxpack.files.direct import BUFFER, DIRECT_FROM, DirectFile, aligned_buffer, round_up
from ltxpack.files.hashing import hash_file
from ltxpack.files.links import link_file
from ltxpack.files.publish import fsync_folder, write_failure
from ltxpack.files.reader import READ_BUFFERS, Range, RangeReader, file_ranges
from ltxpack.manifest import FileRecord
from ltxpack.repack.cast import cast_to_bfloat16
from ltxpack.repack.work import CopyFile, LinkFile, Piece, WriteBytes, WriteShard
from ltxpack.reporter import Reporter

# Pieces this near to each other in a source are read in one go, the gap thrown away.
MAX_GAP = 64 * 1024
WRITE_BUFFERS = 4
HASH_STEP = 256 * 1024
Buffer = memoryview | bytes | bytearray


class ShardWriter:
    """Writes one file of known size front to back: ``write`` … ``close``; ``abort`` (or an error) leaves nothing.

    The bytes go to ``<path>.part`` under ``root`` and get their name when all of them are on the disk. Up to
    ``buffers`` buffers of 4 MB are in flight. Raises OverlayError when the disk is full or refuses.
    """

    def __init__(
        self,
        root: Path,
        path: str,
        header: bytes,
        size: int,
        *,
        buffers: int = WRITE_BUFFERS,
        direct: bool = True,
    ) -> None:
        """``size`` counts the ``header``, which is written at once."""
        self.path = path
        self.size = size
        self._target = root / path
        self._part = self._target.with_name(self._target.name + ".part")
        self._hasher = blake3()
        self._written = 0
        self._spare = buffers
        self._memory: memoryview | None = None
        self._used = self._hashed = 0
        with self._telling():
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._part.unlink(missing_ok=True)
            self._file = DirectFile(self._part, write=True, direct=direct and size >= DIRECT_FROM)
        self._disk = _Disk(self._file)
        self.write(header)

    @property
    def why(self) -> str:
        """Why the file is not written past the page cache; "" if it is."""
        return self._file.why

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, data: Buffer) -> None:
        """The next bytes of the file; ``data`` may be reused at once. Any contiguous buffer will do."""
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
                self._submit()
        self._written += len(source)

    def close(self) -> FileRecord:
        """Wait for the disk, give the file its name, say what was written. Raises OverlayError if the disk refuses."""
        if self._written != self.size:
            raise AssertionError(f"{self.path}: {self._written} bytes were written of {self.size} planned")
        if self._memory is not None:
            self._hash_up_to(self._used)
            self._submit()
        self._disk.finish()
        with self._telling():
            self._disk.raise_failure()
            self._file.sync()
            self._file.close()
            self._part.replace(self._target)
            fsync_folder(self._target.parent)
        return FileRecord(self.path, self.size, self._hasher.hexdigest())

    def abort(self) -> None:
        """Stop writing and remove what was begun; after ``close`` this does nothing."""
        self._disk.finish()
        self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _take(self) -> memoryview:
        """An empty buffer: a new one while there are some to spare, else the next that the disk is done with."""
        self._used = self._hashed = 0
        if self._spare:
            self._spare -= 1
            return aligned_buffer(min(BUFFER, round_up(self.size)))
        memory = self._disk.free.get()
        with self._telling():
            self._disk.raise_failure()
        return memory

    def _submit(self) -> None:
        assert self._memory is not None
        self._disk.put(self._memory[: self._used], self._memory)
        self._memory = None

    def _hash_up_to(self, end: int) -> None:
        assert self._memory is not None
        self._hasher.update(self._memory[self._hashed : end])
        self._hashed = end

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_failure(error, self._target) from None


class _Disk:
    """Appends buffers to a file on a thread of its own, started with the first one; then they are ``free`` again.

    After a failure the rest passes through unwritten, so that nobody waits for ever.
    """

    def __init__(self, file: DirectFile) -> None:
        self.free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._file = file
        self._inbox: queue.SimpleQueue[tuple[memoryview, memoryview] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def put(self, data: memoryview, memory: memoryview) -> None:
        """Append ``data``, which lies in ``memory``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ltxpack-write", daemon=True)
            self._thread.start()
        self._inbox.put((data, memory))

    def finish(self) -> None:
        """Wait until everything put is written; the thread ends."""
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join()
            self._thread = None

    def raise_failure(self) -> None:
        """Raise what the thread met."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            data, memory = item
            if self._failure is None:
                try:
                    self._file.append(data)
                except BaseException as error:
                    self._failure = error
            self.free.put(memory)


class Window(NamedTuple):
    """One read of at most 4 MB and the stretches of it that are wanted: offset in it, bytes, the piece."""

    range: Range
    parts: tuple[tuple[int, int, Piece], ...]


def read_plan(pieces: Sequence[Piece], limit: int = BUFFER) -> list[Window]:
    """The reads that give all bytes of ``pieces`` in order: neighbours in one read, large pieces in several."""
    windows: list[Window] = []
    path, start, end = Path(), 0, 0
    parts: list[tuple[int, int, Piece]] = []
    for piece in pieces:
        done = 0
        while done < piece.nbytes:
            first = piece.start + done
            # A multiple of 8 leaves no element of a cast in two reads.
            room = (start + limit - first) // 8 * 8 if path == piece.source and 0 <= first - end <= MAX_GAP else 0
            if not parts or min(room, piece.nbytes - done) <= 0:
                if parts:
                    windows.append(Window(Range(path, start, end - start), tuple(parts)))
                path, start, end, parts, room = piece.source, first, first, [], limit // 8 * 8
            count = min(piece.nbytes - done, room)
            parts.append((first - start, count, piece))
            end = first + count
            done += count
    if parts:
        windows.append(Window(Range(path, start, end - start), tuple(parts)))
    return windows


def write_shard(item: WriteShard, root: Path, reporter: Reporter, *, direct: bool = True) -> FileRecord:
    """Write the shard under ``root``. Advances ``reporter`` by the bytes of the file."""
    windows = read_plan(item.pieces)
    reader = RangeReader([window.range for window in windows], buffers=READ_BUFFERS, direct=direct)
    with ShardWriter(root, item.path, item.header, item.size, direct=direct) as writer, reader:
        reporter.advance(len(item.header))
        for window, data in zip(windows, reader, strict=True):
            for offset, count, piece in window.parts:
                stretch = data[offset : offset + count]
                writer.write(cast_to_bfloat16(stretch, piece) if piece.is_cast else stretch)
            reporter.advance(sum(count * piece.size // piece.nbytes for _, count, piece in window.parts))
        record = writer.close()
    reporter.detail(f"{item.path}: {_passage(reader.why, writer.why)}")
    return record


def copy_file(
    item: CopyFile, root: Path, reporter: Reporter, *, allow_link: bool = True, direct: bool = True
) -> FileRecord:
    """Take over the real file behind ``item.source``: reflink, else hard link, else (or if not allowed) copy.

    A linked file is hashed by reading it. Advances ``reporter`` by its size. Raises FormatError if the source is not
    as large as planned.
    """
    source = Path(os.path.realpath(item.source))
    _check_size(item, source)
    how = link_file(source, root / item.path) if allow_link else "copied"
    if how == "copied":
        return _copy(item, source, root, reporter, direct=direct)
    reporter.detail(f"{item.path}: {how}")
    digest = hash_file(root / item.path, reporter, direct=direct)
    return FileRecord(item.path, item.size, digest, "hard" if how == "hard-linked" else None)


def write_bytes(item: WriteBytes, root: Path) -> FileRecord:
    """Write a small file under ``root``."""
    with ShardWriter(root, item.path, item.data, item.size) as writer:
        return writer.close()


def write_link(item: LinkFile, root: Path) -> FileRecord:
    """Make the relative symlink under ``root``."""
    path = root / item.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(item.target)
        fsync_folder(path.parent)
    except OSError as error:
        raise write_failure(error, path) from None
    return item.record()


def _copy(item: CopyFile, source: Path, root: Path, reporter: Reporter, *, direct: bool) -> FileRecord:
    reader = RangeReader(
        file_ranges(source, item.size), buffers=READ_BUFFERS, direct=direct and item.size >= DIRECT_FROM
    )
    with ShardWriter(root, item.path, b"", item.size, direct=direct) as writer, reader:
        for data in reader:
            writer.write(data)
            reporter.advance(len(data))
        record = writer.close()
    reporter.detail(f"{item.path}: copied, {_passage(reader.why, writer.why)}")
    return record


def _check_size(item: CopyFile, source: Path) -> None:
    try:
        found = source.stat().st_size
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=item.source) from None
    if found != item.size:
        raise FormatError("has changed since it was planned", file=item.source, expected=item.size, found=found)


def _passage(read_why: str, write_why: str) -> str:
    parts = [f"{verb} through the page cache ({why})" if why else f"{verb} with O_DIRECT"
             for verb, why in (("read", read_why), ("written", write_why))]  # fmt: skip
    return ", ".join(parts)
