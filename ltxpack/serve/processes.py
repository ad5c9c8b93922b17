"""Workers as processes of this machine, which speak JSON, an object a line, through their standard input and output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ltxpack.serve.jobs import Job
from ltxpack.serve.links import Died, Message, Opening, WorkerLink

COMMAND = (sys.executable, "-m", "ltxpack.imports", "ltxpack.serve.worker")
API_KEY = "LTXPACK_API_KEY"
# Seconds until a process must have ended.
END = 10.0


class ProcessLink(WorkerLink):
    """A process that runs ``command``."""

    def __init__(self, opening: Opening, command: Sequence[str]) -> None:
        environment = {name: value for name, value in os.environ.items() if name != API_KEY}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        # The signals of a terminal are for the server, which stops its workers.
        self._process = subprocess.Popen([*command], env=environment, start_new_session=True, **pipes)
        # Only one thread at a time writes to the process.
        self._writing = threading.Lock()
        self._ready = False
        self._send(vars(opening))

    def make(self, job: Job, output: Path, pictures: Path) -> None:
        self._send({**vars(job.task), "id": job.id, "output": str(output), "pictures": str(pictures)})

    def cancel(self, job_id: str) -> None:
        self._send({"cancel": job_id})

    def messages(self) -> Iterator[Message]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self._ready |= "ready" in message
            yield message
        raise self._died()

    def check(self) -> None:
        if self._process.poll() is not None:
            raise self._died()

    def end(self) -> None:
        if not self._ready:
            self._process.kill()  # it would look at its input only when everything is imported
        with self._writing:
            try:
                if self._process.stdin is not None:
                    self._process.stdin.close()
            except (OSError, ValueError):
                pass

    def close(self) -> None:
        self.end()
        try:
            self._process.wait(END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _died(self) -> Died:
        return Died(f"the worker {self._process.pid} has ended")

    def _send(self, message: Mapping[str, Any]) -> None:
        """Say ``message``; a process that has ended is told by its answers."""
        assert self._process.stdin is not None
        with self._writing:
            try:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
            except (OSError, ValueError):
                pass
