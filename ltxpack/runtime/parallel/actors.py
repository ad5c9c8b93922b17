"""A crew of Ray actors on any number of machines, one a GPU, each of which makes whole videos with its own session.

Ray places the actors and notices when one ends; all machines see the overlay and the videos' folders under one path.
:class:`LineActor` runs there, everything else in the process of ``ltxpack run``.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltxpack.errors import UsageError
from ltxpack.files.publish import Temporary, output_errors
from ltxpack.imports import claim_process
from ltxpack.reporter import Reporter
from ltxpack.runtime.libraries import import_libraries
from ltxpack.runtime.lines import Task
from ltxpack.runtime.parallel.cluster import (
    NOT_STARTED,
    PATIENCE,
    SharedDisk,
    connected,
    cpu_workers,
    gpus,
    needs,
    sharers_here,
    where,
    why_ended,
)
from ltxpack.runtime.parallel.devices import RAY_HERE
from ltxpack.runtime.parallel.process import why_failed
from ltxpack.runtime.parallel.schemes import DATA, NONE
from ltxpack.runtime.parallel.share import Carried, Crew, Event, Gone, Ready, Told, Voice
from ltxpack.runtime.prompts_file import PromptsLine
from ltxpack.runtime.request import Request
from ltxpack.runtime.run import peak_memory
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import AUTO, SessionSettings

# Seconds that an actor gets to end by itself.
LEFT = 10.0


class LineActor:
    """A process of the cluster. One of its two threads carries out tasks, the other hands out events."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._said: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def next(self) -> Event:
        """Wait for the next event."""
        return self._said.get()

    def open(self, disk: SharedDisk, settings: SessionSettings, actors: int) -> str:
        """Open the session; where this is, in words. ``actors``: the most actors of the run on a machine."""
        with self._or_gone():
            disk.check()
            claim_process()
            self._session = Session(disk.root, settings, Voice(self._number, self._said.put))
            self._session.process_ends = True
            self._session.residency.processes = sharers_here(actors)
            import_libraries()
            self._said.put(Ready(self._number))
        return where()

    def carry_out(self, task: Task, following: Request | None) -> None:
        """Carry out ``task``; the result is an event."""
        with self._or_gone():
            self._said.put(Carried(self._number, task.carry_out(self._session, following)))

    def close(self) -> str:
        """Close the session; the peak of the process's memory, in words."""
        self._session.close()
        return peak_memory(self._session.device)

    @contextlib.contextmanager
    def _or_gone(self) -> Iterator[None]:
        """What goes wrong in the block is the last event, for whoever waits for the next one."""
        try:
            yield
        except Exception as error:
            self._said.put(Gone(self._number, why_failed(error)))


class Actors(Crew):
    """One actor for each GPU of the cluster at ``address``, or as many on CPUs as ``settings.devices`` says.

    No more than there are ``lines``. Raises UsageError for what does not go with a cluster or without Ray, DeviceError
    for a cluster that cannot be reached or has no GPU.
    """

    def __init__(
        self, address: str, root: Path, settings: SessionSettings, lines: Sequence[PromptsLine], reporter: Reporter
    ) -> None:
        workers = _cpu_workers(settings)
        reporter.note("starting Ray on this machine" if address == RAY_HERE else f"connecting to Ray ({address})")
        # References to each actor's next event, and to the result of opening it.
        self._asked: dict[Any, int] = {}
        self._opened: dict[int, Any] = {}
        self._actors: dict[int, Any] = {}
        self._at_work: set[int] = set()
        self._patient = True
        with contextlib.ExitStack() as ends:
            self._ray = ends.enter_context(connected(address, workers))
            self._count = min(workers or gpus(self._ray), len(lines))
            marks = [_mark(folder, ends) for folder in dict.fromkeys(line.output.parent for line in lines)]
            self._disk = SharedDisk.of(root, tuple(marks))
            self._settings = replace(settings, device="cpu" if workers else "cuda", devices=None, parallel=AUTO)
            self._actor = self._ray.remote(**needs(workers), max_concurrency=2, max_restarts=0)(LineActor)
            self.names: list[str] = [f"actor {number}" for number in range(self._count)]
            for number in range(self._count):
                self.replace(number)
            self._ends = ends.pop_all()

    def begin(self, worker: int, task: Task, following: Request | None) -> None:
        self._at_work.add(worker)
        self._actors[worker].carry_out.remote(task, following)

    def next(self) -> Event:
        while True:
            found, _ = self._ray.wait([*self._asked], num_returns=1, timeout=PATIENCE if self._patient else None)
            if found:
                return self._event(self._asked.pop(found[0]), found[0])
            self._patient = False
            if len(self._asked) == len(self._opened):
                return Told(0, "warn", NOT_STARTED)

    def replace(self, worker: int) -> None:
        actor = self._actors[worker] = self._actor.remote(worker)
        self._opened[worker] = actor.open.remote(self._disk, self._settings, self._count)
        self._asked[actor.next.remote()] = worker
        self._patient = True

    def close(self) -> list[str]:
        with self._ends:
            idle = [worker for worker in self._actors if worker not in {*self._at_work, *self._opened}]
            closed = {worker: self._actors[worker].close.remote() for worker in idle}
            said = [f"{self.names[worker]}: {self._peak(reference)}" for worker, reference in closed.items()]
            for actor in self._actors.values():
                self._ray.kill(actor)
            if self._asked:  # each ends with its actor
                self._ray.wait([*self._asked], num_returns=len(self._asked), timeout=LEFT)
        return said

    def _event(self, worker: int, reference: Any) -> Event:
        try:
            event: Event = self._ray.get(reference)
            if isinstance(event, Ready):
                self.names[worker] = f"actor {worker} on {self._ray.get(self._opened.pop(worker))}"
        except self._ray.exceptions.RayError as error:
            event = Gone(worker, why_ended(error))
        if isinstance(event, Gone | Carried):
            self._at_work.discard(worker)
        if isinstance(event, Gone):
            self._opened.pop(worker, None)
            self._ray.kill(self._actors.pop(worker))
        else:
            self._asked[self._actors[worker].next.remote()] = worker
        return event

    def _peak(self, reference: Any) -> str:
        with contextlib.suppress(self._ray.exceptions.RayError):
            return str(self._ray.get(reference, timeout=LEFT))
        return "did not answer at its end"


def _cpu_workers(settings: SessionSettings) -> int:
    """The number of workers on CPUs; 0 for one on each GPU. Raises UsageError for settings that Ray decides."""
    if settings.parallel not in (AUTO, DATA, NONE):
        problem = f"--parallel {settings.parallel} does not go with --ray: each actor makes whole videos"
        raise UsageError(problem, next=f"choose --parallel {DATA}")
    if settings.save_activations is not None:
        raise UsageError("--save-activations goes with one device", next="leave --ray out")
    return cpu_workers(settings.device, settings.devices)


def _mark(folder: Path, ends: contextlib.ExitStack) -> Path:
    """A file in ``folder``, until ``ends``, that proves who sees the folder. Raises UnwrittenError."""
    with output_errors(folder):
        mark = Temporary(folder / "ltxpack-ray")
    ends.callback(mark.discard)
    return mark.path
