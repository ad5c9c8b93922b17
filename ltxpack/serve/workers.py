"""The workers of a server: one for each device, and a thread that hands it one job after another.

A worker that dies is replaced, and its job goes back to its place in the queue; a job of which several have died is
not tried again.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from ltxpack.errors import LtxpackError
from ltxpack.reporter import Reporter
from ltxpack.runtime.parallel.contract import Opening, WorkerFault
from ltxpack.serve.jobs import QUEUED, Job, Jobs
from ltxpack.serve.links import END, Died, Message, WorkerLink, Workplace
from ltxpack.serve.metrics import Metrics

P = ParamSpec("P")
R = TypeVar("R")
STARTING, IDLE, BUSY, DOWN = "starting", "idle", "busy", "down"
# Seconds: between looks whether an idle worker is alive, and before what failed is tried again.
LOOK, FIRST_PAUSE, LONGEST_PAUSE = 1.0, 0.5, 30.0
# What is called with the reason for which a worker cannot even begin; None: such a one is tried again for ever.
OnFault = Callable[[LtxpackError], None] | None


class Workers:
    """One thread and worker for each opening of ``place``. ``on_fault`` where one cannot even begin."""

    def __init__(self, place: Workplace, jobs: Jobs, metrics: Metrics, reporter: Reporter, on_fault: OnFault) -> None:
        self.all = [DeviceWorker(one, place.start, jobs, metrics, reporter, on_fault) for one in place.openings]

    def start(self) -> None:
        """Start the workers; they are ready some seconds later."""
        for one in self.all:
            one.thread.start()

    def stop(self) -> None:
        """End the workers; jobs in progress wait for the next server."""
        for one in self.all:
            one.stop()
        for one in self.all:
            if one.thread.is_alive():
                one.thread.join(END)

    def cancel(self, job_id: str) -> None:
        """End the work for a job at its next step, whoever has it."""
        for one in self.all:
            one.cancel(job_id)

    @property
    def states(self) -> list[dict[str, Any]]:
        """What each worker is doing."""
        return [{"device": one.opening.name, "state": one.shown, "job": one.job_id} for one in self.all]


class DeviceWorker:
    """Keeps the worker of one device alive, and hands it jobs from a thread."""

    def __init__(
        self,
        opening: Opening,
        start: Callable[[Opening], WorkerLink],
        jobs: Jobs,
        metrics: Metrics,
        reporter: Reporter,
        on_fault: OnFault,
    ) -> None:
        self.thread = threading.Thread(target=self._run, name=f"worker {opening.name}", daemon=True)
        self.opening, self.state, self.job_id = opening, STARTING, ""
        self._jobs, self._metrics, self._reporter, self._on_fault = jobs, metrics, reporter, on_fault
        self._start = start
        self._link: WorkerLink | None = None
        self._stopping = threading.Event()
        self._was_ready = False

    @property
    def shown(self) -> str:
        """The state as people are told it."""
        missing = self.state == IDLE and self._link is not None and self._link.is_missing
        return STARTING if missing else self.state

    def _run(self) -> None:
        """One worker after another, until the server stops."""
        pause = 0.0
        while not self._stopping.wait(pause):
            self.state = STARTING
            try:
                self._give_back()
                with contextlib.closing(self._start(self.opening)) as self._link:
                    self._await_ready(self._link)
                    pause = 0.0
                    while not self._stopping.is_set():
                        self._take_one(self._link)
            except (Died, sqlite3.Error, OSError, ValueError) as error:
                self.state = DOWN
                if not self._stopping.is_set():
                    self._metrics.count("worker_deaths", device=self.opening.name)
                    self._note(f"{error}; another worker is started")
            pause = _longer(pause)

    def stop(self) -> None:
        """End the worker, also in the middle of work."""
        self._stopping.set()
        if self._link is not None:
            self._link.end()

    def cancel(self, job_id: str) -> None:
        """End the work for a job at its next step, if this worker has it."""
        if job_id == self.job_id and self._link is not None:
            self._link.cancel(job_id)

    def _await_ready(self, link: WorkerLink) -> None:
        """Wait until the session of a new worker is open. Raises Died."""
        if self._stopping.is_set():
            link.end()
        try:
            said = next(one for one in self._messages(link) if "ready" in one)
        except Died as died:
            found = died.fault or WorkerFault(f"the worker of {self.opening.name} ended before it was ready")
            self._fault(LtxpackError(found.why, next=found.next or "look above for what it said"))
            raise
        self._was_ready, self.state = True, IDLE
        self._note(f"a worker is ready on {said['ready']}")

    def _fault(self, error: LtxpackError) -> None:
        """The worker could not begin: that ends the server, unless it could before."""
        if self._stopping.is_set():
            return
        if self._was_ready or self._on_fault is None:
            self._note(error.render())
        else:
            self._stopping.set()
            self._on_fault(error)

    def _take_one(self, link: WorkerLink) -> None:
        """Wait for a job, and have it made. Raises Died."""
        with link.free():
            job = self._noted(self._jobs.claim, LOOK)
            if job is None:
                return
            self.state, self.job_id = BUSY, job.id
            link.make(job, self._jobs.video(job.id).absolute(), self._jobs.pictures.absolute())
        self._follow(link, job)
        self.state, self.job_id = IDLE, ""

    def _give_back(self) -> None:
        """The job that a worker died of is for another one, unless that was its end."""
        if self.job_id:
            status = self._noted(self._jobs.give_back, self.job_id)
            if status != QUEUED:
                self._ended(self.job_id, status or "cancelled")
            self.job_id = ""

    def _follow(self, link: WorkerLink, job: Job) -> None:
        """Note what comes of ``job``; its end is in the database when this returns. Raises Died."""
        if self._jobs.get(job.id) is None:  # deleted before the worker had it
            self.cancel(job.id)
        for message in self._messages(link):
            if "progress" in message:
                self._jobs.set_progress(job.id, message["progress"])
            elif "warning" in message:
                self._noted(self._jobs.warn, job.id, message["warning"])
                self._note(f"{job.id}: warning: {message['warning']}")
            elif "done" in message:
                status = "completed" if self._noted(self._jobs.complete, job.id) else "cancelled"
                seconds = sum(message["done"].values())
                self._metrics.took(job.task.model, seconds)
                self._ended(job.id, status, f" in {seconds:.1f} s")
                return
            elif "failed" in message:
                self._noted(self._jobs.fail, job.id, message["code"], message["failed"])
                self._ended(job.id, "failed")
                self._note(f"{job.id}: {message['log']}")
                if "ends" in message:
                    self.job_id = ""
                    raise Died("the worker cannot go on after that")
                return
            elif "cancelled" in message:
                self._jobs.discard(job.id)
                self._ended(job.id, "cancelled")
                return

    def _noted(self, note: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """The result of ``note``, a method of the jobs; tried again while their disk is full. The worker waits."""
        state, pause = self.state, 0.0
        while True:
            try:
                result = note(*arguments, **named)
            except sqlite3.Error as error:
                self.state, pause = DOWN, _longer(pause)
                self._note(f"the jobs cannot be read or written now: {error}")
                if self._stopping.wait(pause):
                    raise
            else:
                self.state = state
                return result

    def _ended(self, job_id: str, status: str, more: str = "") -> None:
        self._metrics.count("jobs_ended", status=status)
        self._note(f"{job_id}: {status}{more}")

    def _messages(self, link: WorkerLink) -> Iterator[Message]:
        """What the worker says; notes are passed on. Raises Died at its end."""
        for message in link.messages():
            if "note" in message:
                self._note(message["note"])
            else:
                yield message

    def _note(self, text: str) -> None:
        self._reporter.note(f"{self.opening.name}: {text}")


def _longer(pause: float) -> float:
    return min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * pause))
