"""Work on a thread of its own that can be waited for, and told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

R = TypeVar("R")
Stop = Callable[[], None]


class Stopped(Exception):
    """Raised in the thread when nobody waits for its result any more."""


class Background(Generic[R]):
    """``work(stop)`` under way; ``stop()`` raises when the work is to end. A thread that the process does not wait for.

    What the work raises is raised where its result is taken.
    """

    def __init__(self, work: Callable[[Stop], R]) -> None:
        self._work = work
        self._stopped = threading.Event()
        self._result: R | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ltxpack-ahead", daemon=True)
        self._thread.start()

    def result(self) -> R:
        """What the work returned, once it is done; for one call."""
        self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        result, self._result = self._result, None
        assert result is not None
        return result

    def cancel(self) -> None:
        """Let the work end, and wait for that."""
        self._stopped.set()
        self._thread.join()
        self._result = self._error = None

    def _run(self) -> None:
        try:
            self._result = self._work(self._check)
        except BaseException as error:
            self._error = error

    def _check(self) -> None:
        if self._stopped.is_set():
            raise Stopped
