"""The workers of a server: a process for each device, and a thread that hands it one job after another.

A process that dies is replaced, and its job goes back to its place in the queue; a job of which several have died is
not tried again.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltxpack.errors import LtxpackError
from ltxpack.reporter import Reporter
from ltxpack.serve.jobs import Job, Jobs
from ltxpack.serve.metrics import Metrics

COMMAND = (sys.executable, "-m", "ltxpack.serve.worker")
STARTING, IDLE, BUSY, DOWN = "starting", "idle", "busy", "down"
# Seconds: between looks whether an idle process is alive, before a dead one is replaced, and until one must have ended.
LOOK, FIRST_PAUSE, LONGEST_PAUSE, END = 1.0, 0.5, 30.0, 10.0
API_KEY = "LTXPACK_API_KEY"


class Died(Exception):
    """A worker's process has ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(f"the worker {process.pid} has ended")


@dataclass(frozen=True)
class Opening:
    """What a worker begins with: the overlay and the settings of its session, and how many share the host's memory.

    ``device`` is what people call it.
    """

    device: str
    overlay: str
    settings: Mapping[str, Any]
    sharers: int = 1


class Workers:
    """One thread and process for each of ``openings``. ``on_fault(error)`` where one cannot even begin."""

    def __init__(
        self,
        openings: Sequence[Opening],
        jobs: Jobs,
        metrics: Metrics,
        reporter: Reporter,
        on_fault: Callable[[LtxpackError], None],
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.all = [DeviceWorker(opening, jobs, metrics, reporter, on_fault, command) for opening in openings]

    def start(self) -> None:
        """Start the processes; they are ready some seconds later."""
        for one in self.all:
            one.start()

    def stop(self) -> None:
        """End the processes; jobs in progress wait for the next server."""
        for one in self.all:
            one.stop()
        for one in self.all:
            one.join()

    def cancel(self, job_id: str) -> None:
        """End the work for a job at its next step, whoever has it."""
        for one in self.all:
            one.cancel(job_id)

    @property
    def states(self) -> list[dict[str, Any]]:
        """What each worker is doing."""
        return [{"device": one.opening.device, "state": one.state, "job": one.job_id} for one in self.all]


class DeviceWorker:
    """Keeps the process of one device alive, and hands it jobs from a thread."""

    def __init__(
        self,
        opening: Opening,
        jobs: Jobs,
        metrics: Metrics,
        reporter: Reporter,
        on_fault: Callable[[LtxpackError], None],
        command: Sequence[str],
    ) -> None:
        self._thread = threading.Thread(target=self._run, name=f"worker {opening.device}", daemon=True)
        self.opening, self.state, self.job_id = opening, STARTING, ""
        self._jobs, self._metrics, self._reporter, self._on_fault = jobs, metrics, reporter, on_fault
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._stopping = threading.Event()
        # Only one thread at a time writes to the process.
        self._writing = threading.Lock()
        self._was_ready = False

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait until the process has ended."""
        if self._thread.is_alive():
            self._thread.join(END)

    def _run(self) -> None:
        """One process after another, until the server stops."""
        pause = 0.0
        while not self._stopping.is_set():
            self.state = STARTING
            try:
                self._give_back()
                if self._stopping.wait(pause):
                    break
                with self._started() as process:
                    self._await_ready(process)
                    pause = 0.0
                    while not self._stopping.is_set():
                        self._take_one(process)
            except (Died, sqlite3.Error, OSError, ValueError) as error:
                self.state = DOWN
                if not self._stopping.is_set():
                    self._metrics.count("worker_deaths", device=self.opening.device)
                    self._note(f"{error}; another worker is started")
            pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * pause))

    def stop(self) -> None:
        """End the process, also in the middle of work."""
        self._stopping.set()
        process = self._process
        if process is not None and self.state == STARTING:
            process.kill()  # it would look at its input only when everything is imported
        elif process is not None:
            with self._writing:
                _close(process)

    def cancel(self, job_id: str) -> None:
        """End the work for a job at its next step, if this worker has it."""
        process = self._process
        if job_id == self.job_id and process is not None:
            self._send(process, {"cancel": job_id})

    def _started(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != API_KEY}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        # The signals of a terminal are for the server, which stops its workers.
        pipes["start_new_session"] = True
        self._process = _Process([*self._command], env=environment, **pipes)  # type: ignore[call-overload]
        return self._process

    def _await_ready(self, process: subprocess.Popen[str]) -> None:
        """Open the session of a new process. Raises Died."""
        self._send(process, vars(self.opening))
        try:
            for message in self._messages(process):
                if "ready" in message:
                    self._was_ready, self.state = True, IDLE
                    self._note(f"a worker is ready on {message['ready']}")
                    return
                if "fault" in message:
                    self._fault(LtxpackError(message["fault"], next=message["next"]))
        except Died:
            problem = f"the worker of {self.opening.device} ended before it was ready"
            self._fault(LtxpackError(problem, next="look above for what it said"))
            raise

    def _fault(self, error: LtxpackError) -> None:
        """The process could not begin: that ends the server, unless it could before."""
        if self._stopping.is_set():
            return
        if self._was_ready:
            self._note(error.render())
        else:
            self._stopping.set()
            self._on_fault(error)

    def _take_one(self, process: subprocess.Popen[str]) -> None:
        """Wait for a job, and have it made. Raises Died."""
        if process.poll() is not None:
            raise Died(process)
        job = self._jobs.claim(LOOK)
        if job is not None:
            self.state, self.job_id = BUSY, job.id
            self._make(process, job)
            self.state, self.job_id = IDLE, ""

    def _give_back(self) -> None:
        """The job that a process died of is for another one."""
        if self.job_id:
            self._jobs.give_back(self.job_id, crashed=True)
            self.job_id = ""

    def _make(self, process: subprocess.Popen[str], job: Job) -> None:
        """Have ``job`` made; its end is in the database when this returns. Raises Died."""
        task, output = vars(job.task), str(self._jobs.video(job.id).absolute())
        self._send(process, {**task, "id": job.id, "output": output, "pictures": str(self._jobs.pictures.absolute())})
        if self._jobs.get(job.id) is None:  # deleted before the worker had it
            self.cancel(job.id)
        for message in self._messages(process):
            if "progress" in message:
                self._jobs.set_progress(job.id, message["progress"])
            elif "warning" in message:
                self._jobs.warn(job.id, message["warning"])
                self._note(f"{job.id}: warning: {message['warning']}")
            elif "done" in message:
                kept = self._jobs.complete(job.id)
                self._ended(job, "completed" if kept else "cancelled", sum(message["done"].values()))
                return
            elif "failed" in message:
                self._jobs.fail(job.id, message["code"], message["failed"])
                self._ended(job, "failed")
                self._note(f"{job.id}: {message['log']}")
                if "ends" in message:
                    self.job_id = ""
                    raise Died(process)
                return
            elif "cancelled" in message:
                self._jobs.discard(job.id)
                self._ended(job, "cancelled")
                return

    def _ended(self, job: Job, status: str, seconds: float | None = None) -> None:
        self._metrics.count("jobs_ended", status=status)
        if seconds is not None:
            self._metrics.took(job.task.model, seconds)
        self._note(f"{job.id}: {status}" + ("" if seconds is None else f" in {seconds:.1f} s"))

    def _messages(self, process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
        """What the process says; notes are passed on. Raises Died at its end."""
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "note" in message:
                self._note(message["note"])
            else:
                yield message
        raise Died(process)

    def _send(self, process: subprocess.Popen[str], message: Mapping[str, Any]) -> None:
        """Say ``message``; a process that has ended is told by its answers."""
        assert process.stdin is not None
        with self._writing:
            try:
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()
            except (OSError, ValueError):
                pass

    def _note(self, text: str) -> None:
        self._reporter.note(f"{self.opening.device}: {text}")


class _Process(subprocess.Popen[str]):
    """Ends at the end of the block."""

    def __exit__(self, *exception: object) -> None:
        _close(self)
        try:
            self.wait(END)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
        if self.stdout is not None:
            self.stdout.close()


def _close(process: subprocess.Popen[str]) -> None:
    """Let the process know that nothing more comes."""
    try:
        if process.stdin is not None:
            process.stdin.close()
    except (OSError, ValueError):
        pass
