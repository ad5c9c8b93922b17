"""A worker that runs elsewhere, whatever its kind: a process of this machine (:mod:`process`) or an actor of a Ray
cluster (:mod:`actors`).

Its module has the function ``work(opening, next, tell)``, which runs there: ``next()`` is what it is told next, None
tells it to end in order, and ``tell`` sends a message. Needs no torch.
"""

from __future__ import annotations

import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltxpack.errors import LtxpackError, one_line
from ltxpack.imports import OF_A_VIDEO, import_libraries
from ltxpack.reporter import Reporter
from ltxpack.runtime.settings import SessionSettings

if TYPE_CHECKING:
    from ltxpack.runtime.session import Session

# What a worker asks for the next message, and what sends one.
Next = Callable[[], Any]
Tell = Callable[[Any], None]


@dataclass(frozen=True)
class Opening:
    """What worker ``number`` begins with: its name in messages, the overlay ``root``, and the settings of its session.

    ``sharers``: how many share the machine. ``only``: the phases that it makes, if not all. ``threads``: of torch, if
    not as many as torch has by itself. ``where`` it is, in words, is known in an actor.
    """

    number: int
    name: str
    root: Path
    settings: SessionSettings
    sharers: int = 1
    only: frozenset[str] = frozenset()
    threads: int | None = None
    where: str = ""

    def session(
        self, reporter: Reporter | None = None, libraries: Mapping[str, tuple[str, ...]] = OF_A_VIDEO
    ) -> Session:
        """In the worker: its session, which ends with its process, and ``libraries`` imported. Raises LtxpackError."""
        import torch

        from ltxpack.runtime.session import Session

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        session = Session(self.root, self.settings, reporter)
        session.process_ends, session.residency.processes, session.only = True, self.sharers, self.only
        if session.device.type == "cuda":
            torch.cuda.set_device(session.device)
        import_libraries(libraries)
        return session


@dataclass(frozen=True)
class WorkerFault:
    """The last message of a worker that fails: ``why``, and what to do ``next``, if anything."""

    why: str
    next: str = ""

    def __str__(self) -> str:
        """It in a line."""
        return ";".join([*self.why.splitlines(), *([f"  next: {self.next}"] if self.next else [])])


def fault_of(error: Exception, next: str = "") -> WorkerFault:
    """``error``, of which the worker ends. What nobody expects is told to its standard error in full: ``next``."""
    if isinstance(error, LtxpackError):
        return WorkerFault(error.render().rpartition("\n")[0], error.next)
    traceback.print_exception(error, file=sys.stderr)
    return WorkerFault(f"{type(error).__name__}: {one_line(str(error))}", next)


class Worker(ABC):
    """A worker, for the process that started it with ``opening``.

    ``received`` is called with each message that it sends, ``ended`` when it has ended; both from threads. ``ready`` is
    set with the first message.
    """

    def __init__(self, opening: Any, received: Callable[[Any], object], ended: Callable[[Worker], object]) -> None:
        self.opening, self.ready = opening, threading.Event()
        self.said: WorkerFault | None = None
        self.has_ended = False
        self._received, self._ended = received, ended

    @abstractmethod
    def tell(self, message: Any) -> None:
        """Send it ``message``, from any thread. That it is gone is noticed elsewhere."""

    @abstractmethod
    def dismiss(self, *, idle: bool = False) -> None:
        """Tell it to end: in order if it is ``idle``, else at once."""

    @abstractmethod
    def end(self, seconds: float | None = None) -> None:
        """Give it ``seconds`` to end by itself, or as many as its kind needs."""

    @property
    @abstractmethod
    def fault(self) -> WorkerFault:
        """Why it ended."""

    def _hear(self, message: Any) -> None:
        if isinstance(message, WorkerFault):
            self.said = message
        else:
            self._received(message)
            self.ready.set()


# Starts a worker with an opening; what it calls with each message, and when the worker has ended.
Start = Callable[[Any, Callable[[Any], object], Callable[[Worker], object]], Worker]
