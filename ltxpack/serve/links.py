"""What the server knows of a worker that runs elsewhere: what it can be told, and that it says one message at a time.

A worker is a process of this machine, an actor of a Ray cluster (:mod:`ray_workers`), or a replica that Ray Serve
started (:mod:`replicas`).
"""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltxpack.runtime.parallel import cluster
from ltxpack.runtime.parallel.contract import Opening, Start, WorkerFault
from ltxpack.runtime.settings import SessionSettings
from ltxpack.serve.jobs import Job

WORKER = "ltxpack.serve.worker"
# Seconds until a worker must have ended.
END = 10.0
Message = Mapping[str, Any]


class Died(Exception):
    """A worker has ended; the message says why. ``fault``: what it said itself."""

    def __init__(self, why: str, fault: WorkerFault | None = None) -> None:
        super().__init__(why)
        self.fault = fault


class WorkerLink(ABC):
    """The server's end of a worker. All but :meth:`messages` may be called from any thread."""

    @abstractmethod
    def make(self, job: Job, output: Path, pictures: Path) -> None:
        """Have the video of ``job`` made from its ``pictures`` in this folder; ``output`` is there when it is done."""

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """End the work for a job at its next step."""

    @abstractmethod
    def messages(self) -> Iterator[Message]:
        """What the worker says, beginning with that it is ready. Raises Died at its end."""

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


class StartedLink(WorkerLink):
    """A worker that the server starts itself, by ``start``."""

    # Whether it is told when the worker has said nothing for long: it may wait for room.
    _is_patient = False

    def __init__(self, start: Start, opening: Opening) -> None:
        self._said: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._worker = start(opening, self._said.put, lambda worker: self._said.put(None))

    def make(self, job: Job, output: Path, pictures: Path) -> None:
        self._worker.tell({**vars(job.task), "id": job.id, "output": str(output), "pictures": str(pictures)})

    def cancel(self, job_id: str) -> None:
        self._worker.tell({"cancel": job_id})

    def messages(self) -> Iterator[Message]:
        while True:
            try:
                message = self._said.get(timeout=cluster.PATIENCE if self._is_patient else None)
            except queue.Empty:
                message = {"note": cluster.NOT_STARTED}
            self._is_patient = False
            if message is None:
                raise self._died()
            yield message

    def check(self) -> None:
        if self._worker.has_ended:
            raise self._died()

    def end(self) -> None:
        self._worker.dismiss()

    def close(self) -> None:
        self._worker.end(END)

    def _died(self) -> Died:
        fault = self._worker.fault
        return Died(fault.why, self._worker.said)


def openings_of(named: Sequence[tuple[str, str]], root: Path, session: SessionSettings) -> list[Opening]:
    """What workers of these names and devices begin with; their sessions are as ``session`` says."""
    return [
        Opening(number, name, root, replace(session, device=device), len(named))
        for number, (name, device) in enumerate(named)
    ]


@dataclass(frozen=True)
class Workplace:
    """Where workers run: what each of them begins with, and how one is started."""

    openings: Sequence[Opening]
    start: Callable[[Opening], WorkerLink]
