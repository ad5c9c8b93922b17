"""Work on a thread of its own: a load that somebody waits for or cancels, and files for the page cache."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, TypeVar

# What the kernel reads at one call, whatever it is asked for: its usual read-ahead.
READ_AHEAD = 128 * 1024

R = TypeVar("R")
Stop = Callable[[], None]


class Stopped(Exception):
    """Raised in a thread that was cancelled."""


class Background(Generic[R]):
    """``work(stop)`` on a thread for which the process does not wait; ``stop()`` raises when the work is to end."""

    def __init__(self, work: Callable[[Stop], R]) -> None:
        self._stopped = threading.Event()
        self._done: Future[R] = Future()
        self._thread = threading.Thread(target=self._run, args=(work,), name="ltxpack-ahead", daemon=True)
        self._thread.start()

    def result(self) -> R:
        """Wait for the result, or raise the error, of the work. For one call: afterwards nothing here refers to it."""
        self._thread.join()
        done, self._done = self._done, Future()
        return done.result()

    def cancel(self) -> None:
        """End the work, and wait for that."""
        self._stopped.set()
        self._thread.join()
        self._done = Future()

    def _run(self, work: Callable[[Stop], R]) -> None:
        try:
            self._done.set_result(work(self._check))
        except BaseException as error:
            self._done.set_exception(error)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise Stopped


class CacheWarmer:
    """Asks the system to read ``files`` into its page cache, in their order, at most ``room`` bytes.

    It waits for the first block of :meth:`waiting` to end, and pauses during others. It leaves out a file that cannot
    be read: whoever needs the file will say so.
    """

    def __init__(self, files: Iterable[Path], room: int) -> None:
        # Several links to one file count once.
        self._files, self._left = tuple(dict.fromkeys(path.resolve() for path in files)), room
        self._loads, self._lock, self._free = 0, threading.Lock(), threading.Event()
        self._background = Background(self._run)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that needs the disk for itself; for several threads."""
        with self._lock:
            self._loads += 1
            self._free.clear()
        try:
            yield
        finally:
            with self._lock:
                self._loads -= 1
                if self._loads == 0:
                    self._free.set()

    def close(self) -> None:
        """End the thread."""
        self._left = 0
        self._free.set()
        self._background.cancel()

    def _run(self, stop: Stop) -> None:
        for path in self._files:
            # A pipe in a file's place would wait for somebody to write.
            with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                for start in range(0, size, READ_AHEAD):
                    self._free.wait()
                    nbytes = min(READ_AHEAD, size - start)
                    if nbytes > self._left:
                        return
                    self._left -= nbytes
                    os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_WILLNEED)
