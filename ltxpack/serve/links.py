"""What the server knows of a worker that runs elsewhere: what it can be told, and that it says one message at a time.

A worker is a process of this machine (:mod:`processes`) or an actor of a Ray cluster (:mod:`ray_workers`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxpack.errors import LtxpackError
from ltxpack.runtime.settings import SessionSettings
from ltxpack.serve.jobs import Job

Message = Mapping[str, Any]


class Died(Exception):
    """A worker has ended; the message says which, or why."""


@dataclass(frozen=True)
class Opening:
    """What a worker begins with: the overlay and the settings of its session, and how many share the host's memory.

    ``device`` is what people call it.
    """

    device: str
    overlay: str
    settings: Mapping[str, Any]
    sharers: int = 1

    @classmethod
    def of(cls, name: str, device: str, root: Path, session: SessionSettings, sharers: int) -> Opening:
        """For a session as ``session`` says, on ``device``; the settings are plain values."""
        settings = {**dataclasses.asdict(session), "device": device}
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        return cls(name, str(root), plain, sharers)


def fault_of(error: LtxpackError) -> Message:
    """What a worker says that cannot begin."""
    return {"fault": error.render().rpartition("\n")[0], "next": error.next}


class WorkerLink(ABC):
    """The server's end of a worker that was started. All but :meth:`messages` may be called from any thread."""

    @abstractmethod
    def make(self, job: Job, output: Path, pictures: Path) -> None:
        """Have the video of ``job`` made from its ``pictures`` in this folder; ``output`` is there when it is done."""

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """End the work for a job at its next step."""

    @abstractmethod
    def messages(self) -> Iterator[Message]:
        """What the worker says, beginning with that it is ready or why it cannot be. Raises Died at its end."""

    @abstractmethod
    def check(self) -> None:
        """Raises Died if the worker has ended."""

    @contextmanager
    def free(self) -> Iterator[None]:
        """In the block the worker is ready for a task. Raises Died."""
        self.check()
        yield

    @property
    def is_missing(self) -> bool:
        """Whether no process is there now that could take a task; only where others start them."""
        return False

    @abstractmethod
    def end(self) -> None:
        """End the worker, also in the middle of work; it may end a little later."""

    def close(self) -> None:
        """End the worker, and wait for it where that says something."""
        self.end()


@dataclass(frozen=True)
class Workplace:
    """Where workers run: what each of them begins with, and how one is started."""

    openings: Sequence[Opening]
    start: Callable[[Opening], WorkerLink]
