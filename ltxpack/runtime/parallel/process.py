"""A worker as a process of this machine: the end of the process that started it, and its own.

A worker hears pickles on its standard input and answers with pickles on its standard output; what libraries print there
goes to standard error instead. Its input is closed when the other process ends, in whatever way: the worker then ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from ltxpack.runtime.parallel.contract import Next, Tell, Worker, WorkerFault, fault_of

# Seconds: until the last messages of a worker that ended are read, and what a worker gets to end by itself.
HEARD, LEFT = 2.0, 5.0


class ProcessWorker(Worker):
    """A process that runs the function ``main`` of ``module``; ``options`` are further ones of Popen."""

    def __init__(
        self,
        module: str,
        opening: Any,
        received: Callable[[Any], object],
        ended: Callable[[Worker], object],
        **options: Any,
    ) -> None:
        super().__init__(opening, received, ended)
        self._lock, self._writing = threading.Lock(), threading.Lock()
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        command = [sys.executable, "-m", "ltxpack.imports", module]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, **options)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self.tell(opening)
        self._listening.start()
        self._watching.start()

    def tell(self, message: Any) -> None:
        assert self.process.stdin is not None
        with self._writing, contextlib.suppress(OSError, ValueError):
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def dismiss(self, *, idle: bool = False) -> None:
        assert self.process.stdin is not None
        if idle and not self.process.stdin.closed:
            self.tell(None)
        if not self.ready.is_set():
            self.process.kill()  # it would look at its input only when everything is imported
        with self._writing, contextlib.suppress(OSError):
            self.process.stdin.close()

    def end(self, seconds: float | None = None) -> None:
        self.dismiss()
        try:
            self.process.wait(LEFT if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._watching.join()

    @property
    def fault(self) -> WorkerFault:
        code = self.process.wait()
        ended = f"its process was ended by signal {-code}" if code < 0 else f"exit status {code}"
        return self.said or WorkerFault(ended)

    def _watch(self) -> None:
        self.process.wait()
        # Forks of its own may hold the other end of the pipe for longer.
        self._listening.join(HEARD)
        with self._lock:
            self.has_ended = True
        self._ended(self)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said, contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                message = pickle.load(said)
                with self._lock:
                    if not self.has_ended:  # nothing is received of a worker that is told to have ended
                        self._hear(message)


def messages(abandon: Callable[[], object]) -> Next:
    """What the other process sends, in order, up to None, its farewell. If it ends without one, calls ``abandon``."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        message: Any = ...
        try:
            while message is not None:
                message = pickle.load(sys.stdin.buffer)
                waiting.put(message)
        except (EOFError, OSError, pickle.UnpicklingError):
            abandon()

    threading.Thread(target=read, daemon=True).start()
    return waiting.get


def run_worker(work: Callable[[Any, Next, Tell], None], abandon: Callable[[Any], object]) -> int:
    """In the worker: ``work`` with the opening; the exit status. ``abandon``: what to do if nobody is left."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the process that started this one gets it too
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(message: Any) -> None:
        pickle.dump(message, out)
        out.flush()

    opening = pickle.load(sys.stdin.buffer)
    try:
        work(opening, messages(partial(abandon, opening)), tell)
    except KeyboardInterrupt:
        os._exit(1)  # all is tidy; an interpreter that ends in order takes its time
    except Exception as error:
        tell(fault_of(error))
        os._exit(1)
    return 0
