"""Reads an exported file back from the disk while the rest of it is made, and compares each tensor by its hash."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from ltxpack.errors import OverlayError
from ltxpack.files.publish import write_errors
from ltxpack.files.reader import Range, RangeReader
from ltxpack.repack.write import parts_of, read_plan, taken
from ltxpack.reporter import Reporter

# Bytes that are put on the disk and read back together.
BATCH = 64 * 1024 * 1024
READS_AT_ONCE = 2


class Written(NamedTuple):
    """The written tensor ``name``: its bytes in the file, and their blake3."""

    name: str
    range: Range
    blake3: str


class ReadBack:
    """Compares :meth:`added <add>` bytes on a thread of its own, until :meth:`finish` or :meth:`stop`.

    It puts a batch on the disk and out of the page cache before it reads it, so that it compares the disk's bytes.
    ``failed``: whether any bytes differed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "ltxpack-read-back")
        self._adding = threading.Lock()
        self._batch: list[Written] = []
        self._under_way: deque[tuple[int, Future[None]]] = deque()
        self._stopped = self.failed = False

    def stop(self) -> None:
        self._stopped = True
        self._thread.shutdown(cancel_futures=True)

    def add(self, written: Written) -> None:
        """Compare these bytes soon; any thread may call this. Raises OverlayError if earlier bytes differ."""
        with self._adding:
            if written.range.nbytes:
                self._batch.append(written)
            if sum(written.range.nbytes for written in self._batch) >= BATCH:
                self._submit()
            while self._under_way and self._under_way[0][1].done():
                self._under_way.popleft()[1].result()

    def finish(self, reporter: Reporter) -> None:
        """Wait until all is compared. Raises OverlayError if bytes differ."""
        self._submit()
        reporter.begin("reading back", sum(nbytes for nbytes, _ in self._under_way), "B")
        for nbytes, compared in self._under_way:
            compared.result()
            reporter.advance(nbytes)
        reporter.end()

    def _submit(self) -> None:
        batch, self._batch = self._batch, []
        if batch:
            nbytes = sum(written.range.nbytes for written in batch)
            self._under_way.append((nbytes, self._thread.submit(self._compare, batch)))

    def _compare(self, batch: Sequence[Written]) -> None:
        batch = sorted(batch, key=lambda written: written.range.start)
        ranges = [written.range for written in batch]
        with write_errors(self._path):
            self._put_on_disk(ranges)
        windows = read_plan(ranges)
        with RangeReader([window.range for window in windows], in_flight=READS_AT_ONCE) as reader:
            parts = parts_of(windows, reader)
            for written in batch:
                hasher = blake3()
                for part in taken(parts, written.range.nbytes):
                    if self._stopped:
                        return
                    hasher.update(part)
                if hasher.hexdigest() != written.blake3:
                    self.failed = True
                    raise OverlayError(
                        "did not come back from the disk as it was written",
                        file=self._path,
                        tensor=written.name,
                        expected=f"blake3 {written.blake3}",
                        found=f"blake3 {hasher.hexdigest()}",
                        next="check the disk, then run this again",
                    )

    def _put_on_disk(self, ranges: Sequence[Range]) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            if hasattr(os, "posix_fadvise"):
                for written in ranges:
                    os.posix_fadvise(fd, written.start, written.nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
