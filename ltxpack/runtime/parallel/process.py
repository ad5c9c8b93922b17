"""A worker process of this machine: the end of the process that started it, and its own.

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
from dataclasses import dataclass
from functools import partial
from typing import Any

from ltxpack.errors import LtxpackError, one_line

# Seconds: until the last messages of a worker that ended are read, and what a worker gets to end by itself.
HEARD, LEFT = 2.0, 5.0


@dataclass(frozen=True)
class WorkerFault:
    """The last message of a worker that fails: ``why``, in words."""

    why: str


class Worker:
    """A process that runs ``module``, number ``rank``, on ``device``.

    ``received`` is called with each message that it sends, ``ended`` when it has ended; both from threads. ``ready`` is
    set with the first message.
    """

    def __init__(
        self,
        rank: int,
        device: str,
        module: str,
        ended: Callable[[Worker], None],
        received: Callable[[Any], object] = lambda message: None,
    ) -> None:
        self.rank, self.device, self.ready = rank, device, threading.Event()
        self._said, self._over, self._lock = "", False, threading.Lock()
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        command = [sys.executable, "-m", "ltxpack.imports", module]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null)
        self._listening = threading.Thread(target=self._listen, args=(received,), daemon=True)
        self._watching = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        self._listening.start()
        self._watching.start()

    def tell(self, message: Any) -> None:
        """Send it ``message``. That it is gone is noticed elsewhere."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def dismiss(self, *, idle: bool = False) -> None:
        """Tell it to end: in order if it is ``idle``, else at once."""
        assert self.process.stdin is not None
        if idle and not self.process.stdin.closed:
            self.tell(None)
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def end(self, seconds: float) -> None:
        """Give it ``seconds`` to end by itself."""
        self.dismiss()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._watching.join()

    @property
    def fault(self) -> str:
        """Why it ended, in words."""
        code = self.process.wait()
        return self._said or (f"its process was ended by signal {-code}" if code < 0 else f"exit status {code}")

    def _watch(self, ended: Callable[[Worker], None]) -> None:
        self.process.wait()
        # Forks of its own may hold the other end of the pipe for longer.
        self._listening.join(HEARD)
        with self._lock:
            self._over = True
        ended(self)

    def _listen(self, received: Callable[[Any], object]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said, contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                message = pickle.load(said)
                with self._lock:
                    if isinstance(message, WorkerFault):
                        self._said = message.why
                    elif not self._over:  # nothing is received of a worker that is told to have ended
                        received(message)
                        self.ready.set()


# What a worker asks for the next message, and what sends one.
Next = Callable[[], Any]
Tell = Callable[[Any], None]


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
    """In the worker: ``work`` with the first message; the exit status. ``abandon``: what to do if nobody is left."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the process that started this one gets it too
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(message: Any) -> None:
        pickle.dump(message, out)
        out.flush()

    first = pickle.load(sys.stdin.buffer)
    try:
        work(first, messages(partial(abandon, first)), tell)
    except KeyboardInterrupt:
        os._exit(1)  # all is tidy; an interpreter that ends in order takes its time
    except Exception as error:
        tell(WorkerFault(why_failed(error)))
        os._exit(1)
    return 0


def why_failed(error: Exception) -> str:
    """``error`` in a line."""
    if isinstance(error, LtxpackError):
        return error.render().replace("\n", ";")
    return f"{type(error).__name__}: {one_line(str(error))}"
