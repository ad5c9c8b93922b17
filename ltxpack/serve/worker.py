"""A worker: makes the videos of a server on one device, one after another, in a process or an actor of its own.

It hears tasks, and the jobs that nobody wants any more; a process ends with the server, also in the middle of work.
Where the server's files are not, the pictures come with a task, and the mp4 goes with its end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ltxpack.errors import LtxpackError, UsageError
from ltxpack.reporter import Reporter
from ltxpack.runtime.parallel.contract import Next, Opening, Tell
from ltxpack.runtime.parallel.process import run_worker
from ltxpack.runtime.request import Request
from ltxpack.runtime.run import write_video
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.session import Session
from ltxpack.runtime.text.gemma import tell_cut
from ltxpack.serve.jobs import request_of
from ltxpack.serve.links import Message
from ltxpack.serve.ray_workers import DONE, FILES, VIDEO
from ltxpack.serve.refusal import told

# Shares of the progress: stages count by what they compute, which is most of it.
TEXT, DECODE = 0.05, 0.05
# How the names of folders of temporary files begin.
FOLDER = "ltxpack-worker-"
# Seconds for which such a folder may be without its lock.
YOUNG = 60.0


class Cancelled(Exception):
    """Nobody wants the video any more."""


class JobReporter(Reporter):
    """Tells the server how far a job is, and ends it at the next step once it is cancelled."""

    def __init__(self, job_id: str, request: Request, cancelled: set[str], say: Tell) -> None:
        self._job_id, self._cancelled, self._say = job_id, cancelled, say
        self.shares = _shares(request)
        self._before = self._share = 0.0
        self._done, self._total, self._told = 0, 1, 0

    def note(self, message: str) -> None:
        self._say({"note": message})

    def warn(self, message: str) -> None:
        self._say({"warning": message})

    def begin(self, label: str, total: int, unit: str) -> None:
        self._before += self._share
        # A phase that begins again, or that nobody counted, moves nothing.
        self._share = self.shares.pop(label, 0.0)
        self._done, self._total = 0, max(1, total)
        self._tell()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        self._tell()

    def _tell(self) -> None:
        if self._job_id in self._cancelled:
            raise Cancelled
        percent = int(100 * (self._before + self._share * min(1.0, self._done / self._total)))
        if percent > self._told:
            self._told = min(99, percent)
            self._say({"progress": self._told})


def _shares(request: Request) -> dict[str, float]:
    """Phase -> its share of the whole."""
    work = [
        stage.evaluations * stage.passes * stage.shape.tokens
        for stage in request.work([""] * len(request.recipe.stages)).stages
    ]
    stages = {stage_label(number): (1 - TEXT - DECODE) * part / sum(work) for number, part in enumerate(work)}
    return {"text": TEXT, **stages, "decode": DECODE}


def make(session: Session, task: Mapping[str, Any], cancelled: set[str], say: Tell) -> bool:
    """Make the video of ``task`` and say what became of it; False where the process had better be a new one.

    It ends at its next step once its id is ``cancelled``.
    """
    try:
        request = request_of(task["prompt"], task["settings"], task["images"], Path(task["pictures"]))
        reporter = JobReporter(task["id"], request, cancelled, say)
        with session.reporting(reporter), session.taking(task["stages"]):
            tell_cut(session.overlay, request.named_prompts, reporter)
            write_video(session, request, Path(task["output"]))
        say({"done": dict(session.timings.seconds)})
    except Cancelled:
        say({"cancelled": True})
    except LtxpackError as error:
        code = "invalid_request" if isinstance(error, UsageError) else "server_error"
        say({"failed": told(error), "code": code, "log": error.render()})
    except Exception as error:
        # A card on which a kernel has failed computes nothing more in this process.
        what = f"failed unexpectedly: {type(error).__name__}"
        log = "".join(traceback.format_exception(error))
        say({"failed": what, "code": "server_error", "log": log, "ends": True})
        return False
    finally:
        cancelled.discard(task["id"])
    return True


def make_apart(session: Session, task: Mapping[str, Any], cancelled: set[str], say: Tell) -> bool:
    """As :func:`make`, where the server's files are not: ``task`` has the pictures, and the end says the video."""
    try:
        with _own_folder() as name:
            for picture, data in task[FILES].items():
                Path(name, picture).write_bytes(data)
            output = Path(name, "video.mp4")

            def with_video(message: Message) -> None:
                say({**message, VIDEO: output.read_bytes()} if DONE in message else message)

            return make(session, {**task, "output": str(output), "pictures": name}, cancelled, with_video)
    except OSError as error:
        problem = "the worker's folder for temporary files cannot be written"
        say({"failed": problem, "code": "server_error", "log": f"{problem}: {error}"})
    return True


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    """A new folder for temporary files; those of workers that were killed are removed. Raises OSError."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError), _locked(left) as status:
            if time.time() - status.st_mtime > YOUNG:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True) as name, contextlib.ExitStack() as ends:
        with contextlib.suppress(OSError):  # a filesystem without locks: nobody can remove the folder either
            ends.enter_context(_locked(Path(name)))
        yield name


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[os.stat_result]:
    """The lock on a folder of this user, which ends with its process. Raises OSError where another one has it."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(opened)
        if status.st_uid != os.getuid():
            raise PermissionError(folder)
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield status
    finally:
        os.close(opened)


class WorkerNotes(Reporter):
    """What is told outside of jobs."""

    def __init__(self, say: Tell) -> None:
        self._say = say

    def note(self, message: str) -> None:
        self._say({"note": message})

    def warn(self, message: str) -> None:
        self._say({"note": f"warning: {message}"})


def work(opening: Opening, next: Next, tell: Tell) -> None:
    """Make what is asked for until the worker had better be a new one."""
    session = opening.session(WorkerNotes(tell))
    cancelled = set[str]()
    tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def hear() -> None:
        while (message := next()) is not None:
            if "cancel" in message:
                cancelled.add(message["cancel"])
            else:
                tasks.put(message)

    threading.Thread(target=hear, daemon=True).start()
    tell(ready(session, opening.where))
    task = tasks.get()
    while (make_apart if FILES in task else make)(session, task, cancelled, tell):
        task = tasks.get()


def ready(session: Session, where: str) -> Message:
    """What a worker says that can take a task."""
    return {"ready": ", ".join(filter(None, (str(session.device), where)))}


def main() -> int:
    """As a process, until the server ends; the exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the server gets it too, and stops its workers
    return run_worker(work, lambda opening: os._exit(0))
