"""Brings files into the system's page cache while a run computes, so that the next process finds them in memory.

A run itself reads past the cache, which is faster; what this reads again costs it no time.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from ltxpack.files.page_cache import PageCache
from ltxpack.runtime.weights.reading import PIECE

# What one read brings of a piece.
STEP = 1024 * 1024


class CacheFiller:
    """Reads ``files`` into the page cache on a thread, in their order, ``room`` bytes at most; what is there counts.

    Nothing is read before the first block of :meth:`waiting` is over, nor during another. A file that cannot be read
    is left out: whoever needs it will say so.
    """

    def __init__(self, files: Iterable[Path], room: int) -> None:
        # Links of one file are one.
        self._files = tuple(dict.fromkeys(path.resolve() for path in files))
        self._left = room
        self._closed = False
        self._others, self._lock = 0, threading.Lock()
        self._free = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ltxpack-cache", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Read nothing while the block runs: it needs the disk. From several threads."""
        with self._lock:
            self._others += 1
            self._free.clear()
        try:
            yield
        finally:
            with self._lock:
                self._others -= 1
                if self._others == 0:
                    self._free.set()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._free.set()
        self._thread.join()

    def _run(self) -> None:
        memory = memoryview(bytearray(STEP))
        for path in self._files:
            with contextlib.suppress(OSError):
                self._bring(path, memory)

    def _bring(self, path: Path, memory: memoryview) -> None:
        # A pipe in a file's place would wait for somebody to write.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        cache = PageCache(file)
        try:
            size = os.fstat(file).st_size
            for start in range(0, size, PIECE):
                end = min(start + PIECE, size)
                self._free.wait()
                if self._closed or end - start > self._left:
                    return
                self._left -= end - start
                if not cache.holds(start, end - start):
                    for position in range(start, end, STEP):
                        os.preadv(file, [memory[: end - position]], position)
        finally:
            cache.close()
            os.close(file)
