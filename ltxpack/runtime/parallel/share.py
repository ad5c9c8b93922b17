"""Shares out the lines of a prompts file: each task goes to the first free worker.

A :class:`Crew` knows what its workers are: this process, processes on devices of their own, or actors of a cluster.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ltxpack.errors import DeviceError
from ltxpack.files.publish import remove_temporaries
from ltxpack.reporter import Reporter
from ltxpack.runtime.lines import Encode, Outcome, Task, TaskResult, failed
from ltxpack.runtime.prompts_file import PromptsLine
from ltxpack.runtime.record import record_path
from ltxpack.runtime.request import Request

# The number of videos whose prompts are encoded before the first of them is made: the planner counts 1.6 GB on the host
# for so many contexts of the 22B model.
AHEAD = 64
# How often a task is handed out if workers end in the middle of it; and how often in a row a worker may end without
# having done a task, until its device is used no more.
TRIES, LOSSES = 2, 2


@dataclass(frozen=True)
class Ready:
    """A worker, by its number from 0, can take tasks; ``where`` it is, in words, if that was not known before."""

    worker: int
    where: str = ""


@dataclass(frozen=True)
class Told:
    """A worker's message for the user; ``kind``: a method of :class:`.Reporter`."""

    worker: int
    kind: str
    message: str


@dataclass(frozen=True)
class Carried:
    """A worker has carried out its task, and is free."""

    worker: int
    result: TaskResult


@dataclass(frozen=True)
class Gone:
    """A worker has ended, in the middle of a task or not; ``why`` in words."""

    worker: int
    why: str


@dataclass(frozen=True)
class Left:
    """The last event of a worker that is told to end: the ``peak`` of its memory, in words."""

    worker: int
    peak: str


class Voice(Reporter):
    """Makes an event for ``say`` of each message of worker ``number``; leaves out progress."""

    def __init__(self, number: int, say: Callable[[Told], object]) -> None:
        self._number, self._say = number, say

    def note(self, message: str) -> None:
        self._say(Told(self._number, "note", message))

    def detail(self, message: str) -> None:
        self._say(Told(self._number, "detail", message))

    def warn(self, message: str) -> None:
        self._say(Told(self._number, "warn", message))


Event: TypeAlias = Ready | Told | Carried | Gone | Left
# The kind of a task and the numbers of its lines: the same when it is handed out again.
Key: TypeAlias = tuple[type[Task], tuple[int, ...]]


class Crew(ABC):
    """Workers that carry out tasks at the same time, each with a session of its own.

    They start with the crew; each is ready at its first :class:`Ready`.
    """

    # The workers' names in messages.
    names: Sequence[str]
    # Whether the workers are other processes, so that the terminal is free for the progress of the whole.
    elsewhere = True
    # Whether some make the first stage of each video, and others the rest.
    by_stages = False

    @abstractmethod
    def begin(self, worker: int, task: Task, following: Request | None) -> None:
        """Hand ``task`` to a free ``worker``; ``following``: the video that it makes next, if known."""

    @abstractmethod
    def next(self) -> Event:
        """Wait for the next event of any worker."""

    @abstractmethod
    def replace(self, worker: int) -> None:
        """Start a new process for a ``worker`` that is gone, on the same device."""

    @abstractmethod
    def close(self) -> list[str]:
        """End all workers, also those at work, and wait for that; their lines for the summary."""

    def takes(self, worker: int, task: Task) -> bool:
        """Whether ``worker`` may carry out ``task``."""
        return True


class Sharing:
    """Lines on their way through a crew, and the outcome of each, by its number.

    A task whose worker ended goes to another one, once. ``ahead``: seconds of encoding prompts.
    """

    def __init__(self, crew: Crew, lines: Sequence[PromptsLine], reporter: Reporter) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.ahead = 0.0
        self._crew, self._reporter, self._count = crew, reporter, len(lines)
        size = max(1, AHEAD // len(crew.names))
        groups = (tuple(lines[start : start + size]) for start in range(0, len(lines), size))
        self._waiting: list[Task] = [Encode(group, crew.by_stages) for group in groups]
        self._at_work: dict[int, Task] = {}
        self._free: set[int] = set()
        self._alive = set(range(len(crew.names)))
        # How often a task lost its worker, and the last worker that it lost.
        self._tries: Counter[Key] = Counter()
        self._avoided: dict[Key, int] = {}
        self._losses: Counter[int] = Counter()
        self._told: set[tuple[str, str]] = set()

    def run(self) -> list[str]:
        """Work until every line has its outcome, then end the crew; the crew's lines for the summary."""
        if self._crew.elsewhere:
            self._reporter.begin("videos", self._count, "video")
        try:
            while len(self.outcomes) < self._count:
                self._hand_out()
                if len(self.outcomes) < self._count:
                    self._take(self._crew.next())
        finally:
            self._reporter.end()
            summary = self._crew.close()
            for task in self._at_work.values() if self._crew.elsewhere else ():
                _tidy(task)
        return summary

    def _hand_out(self) -> None:
        """Give each free worker a task, and an outcome to the lines that no worker is left for."""
        for lost in [task for task in self._waiting if not self._able(task)]:
            self._waiting.remove(lost)
            problem = "no device is left to make it on"
            self._end(lost, DeviceError(problem, next="the same command (it skips the videos that are done)"))
        for worker in sorted(self._free):
            task = self._best(worker)
            if task is not None:
                self._waiting.remove(task)
                self._free.discard(worker)
                self._at_work[worker] = task
                following = self._best(worker)
                first = None if following is None or isinstance(following, Encode) else following.lines[0].request
                self._crew.begin(worker, task, first)

    def _best(self, worker: int) -> Task | None:
        """The next task of ``worker``: the first line that waits for it, or else the prompts of more lines."""
        waiting = sorted(self._waiting, key=lambda task: (isinstance(task, Encode), task.lines[0].number))
        return next((task for task in waiting if worker in self._able(task)), None)

    def _able(self, task: Task) -> set[int]:
        """The workers that may carry out ``task``: not the one that ended in the middle of it, if there is another."""
        able = {worker for worker in self._alive if self._crew.takes(worker, task)}
        return able - {self._avoided.get(_key(task))} or able

    def _take(self, event: Event) -> None:
        match event:
            case Ready(worker):
                self._free.add(worker)
            case Told(_, kind, message):
                if (kind, message) not in self._told:
                    self._told.add((kind, message))
                    getattr(self._reporter, kind)(message)
            case Carried(worker, result):
                del self._at_work[worker]
                self._free.add(worker)
                self._losses[worker] = 0
                self._waiting += result.tasks
                self.ahead += result.encoding
                self._note(result.outcomes)
            case Gone(worker, why):
                self._lose(worker, why)

    def _lose(self, worker: int, why: str) -> None:
        name, task = self._crew.names[worker], self._at_work.pop(worker, None)
        self._free.discard(worker)
        self._losses[worker] += 1
        if self._losses[worker] < LOSSES:
            self._crew.replace(worker)
        else:
            self._alive.discard(worker)
        self._reporter.warn(f"{name} ended: {why}")
        if task is None:
            return
        _tidy(task)
        key = _key(task)
        self._tries[key] += 1
        self._avoided[key] = worker
        if self._tries[key] >= TRIES:
            again = "the same command (it skips the videos that are done)"
            self._end(task, DeviceError(f"{name} ended: {why}", found=f"{TRIES} tries", next=again))
        else:
            self._waiting.append(task)

    def _end(self, task: Task, error: Exception) -> None:
        self._note([failed(line, error, self._reporter) for line in task.lines])

    def _note(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.outcomes[outcome.line.number] = outcome
        if self._crew.elsewhere:
            self._reporter.advance(len(outcomes))


def _key(task: Task) -> Key:
    return type(task), tuple(line.number for line in task.lines)


def _tidy(task: Task) -> None:
    """Remove the half-written files of a worker that was killed."""
    for line in () if isinstance(task, Encode) else task.lines:
        for path in (line.output, record_path(line.output)):
            with contextlib.suppress(OSError):
                remove_temporaries(path)
