"""Work on a thread of its own: a load that is waited for or cancelled, and files asked into the page cache."""

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
    """Raised in the thread when nobody waits for its result any more."""


class Background(Generic[R]):
    """``work(stop)`` under way; ``stop()`` raises when the work is to end. A thread that the process does not wait for.

    What the work raises is raised where its result is taken.
    """

    def __init__(self, work: Callable[[Stop], R]) -> None:
        self._stopped = threading.Event()
        self._done: Future[R] = Future()
        self._thread = threading.Thread(target=self._run, args=(work,), name="ltxpack-ahead", daemon=True)
        self._thread.start()

    def result(self) -> R:
        """What the work returned, once it is done; for one call, after which nothing here refers to it."""
        self._thread.join()
        done, self._done = self._done, Future()
        return done.result()

    def cancel(self) -> None:
        """Let the work end, and wait for that."""
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

    Nothing is asked for before the first block of :meth:`waiting` is over, nor during another. A file that cannot be
    read is left out: whoever needs it will say so.
    """

    def __init__(self, files: Iterable[Path], room: int) -> None:
        # Links of one file are one.
        self._files, self._left = tuple(dict.fromkeys(path.resolve() for path in files)), room
        self._loads, self._lock, self._free = 0, threading.Lock(), threading.Event()
        self._background = Background(self._run)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Ask for nothing while the block runs: it needs the disk. From several threads."""
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
