"""A worker: the process that makes the videos of a server on one device, one after another.

It reads tasks from its standard input and answers on its standard output, a JSON object a line. It ends with the
server: when its input does.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ltxpack.errors import LtxpackError, UsageError
from ltxpack.reporter import Reporter
from ltxpack.runtime.libraries import import_libraries
from ltxpack.runtime.request import Request
from ltxpack.runtime.run import write_video
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.text.length import tell_cut
from ltxpack.serve.links import fault_of
from ltxpack.serve.refusal import told
from ltxpack.serve.task import request_of

Say = Callable[[Mapping[str, Any]], None]
# Shares of the progress: stages count by what they compute, which is most of it.
TEXT, DECODE = 0.05, 0.05


class Cancelled(Exception):
    """Nobody wants the video any more."""


class Inbox:
    """What the server says, in order. Its end ends the process, also in the middle of work."""

    def __init__(self) -> None:
        self.cancelled: set[str] = set()
        self._tasks: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> dict[str, Any]:
        """The next task, once it is there."""
        return self._tasks.get()

    def _read(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "cancel" in message:
                self.cancelled.add(message["cancel"])
            else:
                self._tasks.put(message)
        os._exit(0)


class JobReporter(Reporter):
    """Tells the server how far a job is, and ends it at the next step once it is cancelled."""

    def __init__(self, job_id: str, request: Request, cancelled: set[str], say: Say) -> None:
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


def make(session: Session, task: Mapping[str, Any], cancelled: set[str], say: Say) -> bool:
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


def main() -> int:
    """Until the server ends; the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # The server gets them too, and stops its workers.
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What libraries print must not look like an answer.
    os.dup2(2, 1)

    def say(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    inbox = Inbox()
    opening = inbox.next()
    try:
        session = Session(Path(opening["overlay"]), SessionSettings(**opening["settings"]), WorkerNotes(say))
        session.process_ends, session.residency.processes = True, opening["sharers"]
        if session.device.type == "cuda":
            torch.cuda.set_device(session.device)
    except LtxpackError as error:
        say(fault_of(error))
        return 1
    import_libraries()
    say({"ready": str(session.device)})
    while make(session, inbox.next(), inbox.cancelled, say):
        pass
    return 1


class WorkerNotes(Reporter):
    """What is told outside of jobs."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def note(self, message: str) -> None:
        self._say({"note": message})

    def warn(self, message: str) -> None:
        self._say({"note": f"warning: {message}"})


if __name__ == "__main__":
    sys.exit(main())
