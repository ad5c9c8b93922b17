"""Byte ranges of files, read ahead on a thread, past the page cache where that can be. Plans nothing."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ltxpack.errors import FormatError, SourceError
from ltxpack.files.direct import ALIGN, BUFFER, DirectFile, aligned_buffer

READ_BUFFERS = 4


class Range(NamedTuple):
    """``nbytes`` bytes of ``path`` from offset ``start``."""

    path: Path
    start: int
    nbytes: int


class RangeReader:
    """Yields the bytes of each range in order, read ahead on a thread into ``buffers`` reusable buffers.

    A view is valid until the next one is asked for, and ``kept`` more after that. It starts at a multiple of 8 bytes in
    memory. Memory used: ``buffers`` (more than ``kept``) times the largest range. Use as a context manager; raises
    SourceError, or FormatError for a file that ends before the range does.
    """

    def __init__(self, ranges: Sequence[Range], *, buffers: int = 2, kept: int = 0, direct: bool = True) -> None:
        self._ranges = ranges
        self._kept = kept
        self._direct = direct
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[tuple[memoryview, memoryview] | BaseException] = queue.SimpleQueue()
        capacity = max((item.nbytes for item in ranges), default=0)
        for _ in range(min(buffers, len(ranges))):
            self._free.put(aligned_buffer(capacity + 2 * ALIGN))
        self._files: dict[Path, DirectFile] = {}
        self._thread = threading.Thread(target=self._read_ahead, name="ltxpack-read", daemon=True)
        self.why = ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ranges = ()
        self._free.put(None)
        self._thread.join()

    def __iter__(self) -> Iterator[memoryview]:
        in_use: deque[memoryview] = deque()
        for _ in range(len(self._ranges)):
            item = self._filled.get()
            if isinstance(item, BaseException):
                raise item
            memory, view = item
            in_use.append(memory)
            yield view
            if len(in_use) > self._kept:
                self._free.put(in_use.popleft())

    def _read_ahead(self) -> None:
        try:
            for wanted in self._ranges:
                memory = self._free.get()
                if memory is None:
                    return
                self._filled.put((memory, self._read(wanted, memory)))
        except BaseException as error:
            self._filled.put(error)
        finally:
            for file in self._files.values():
                file.close()

    def _read(self, wanted: Range, memory: memoryview) -> memoryview:
        try:
            file = self._files.get(wanted.path)
            if file is None:
                file = self._files[wanted.path] = DirectFile(wanted.path, write=False, direct=self._direct)
            view = file.read(memory, wanted.start, wanted.nbytes)
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}", file=wanted.path) from None
        self.why = file.why or self.why
        if len(view) < wanted.nbytes:
            raise FormatError(
                f"ends too early: {wanted.nbytes - len(view)} bytes are missing",
                file=wanted.path, expected=f"{wanted.start + wanted.nbytes} bytes", next="fetch or copy the file again",
            )  # fmt: skip
        return _slid(memory, view, wanted.start) if wanted.start % 8 else view


def file_ranges(path: Path, size: int) -> list[Range]:
    """The whole file in reads of 4 MB."""
    return [Range(path, start, min(BUFFER, size - start)) for start in range(0, size, BUFFER)]


def _slid(memory: memoryview, view: memoryview, start: int) -> memoryview:
    """The same bytes at a multiple of 8, for a file whose header length is none: readers of floats want that."""
    lead = start % ALIGN // 8 * 8
    memory[lead : lead + len(view)] = view
    return memory[lead : lead + len(view)]
