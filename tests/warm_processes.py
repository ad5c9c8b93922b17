"""Processes that are forks of one that has imported what they run: a fresh interpreter takes seconds for it.

A process that is started for real is the point of some tests; the others take these.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import torch
from support import FORKS, Done


def _carried_out(command: list[str], streams: list[Connection | None], environment: dict[str, str], at: str) -> None:
    """``python COMMAND…`` in this process, which is one of its own."""
    for number, stream in enumerate(streams):
        opened = os.open(os.devnull, os.O_RDWR) if stream is None else stream.fileno()
        os.dup2(opened, number)
        os.close(opened) if stream is None else stream.close()
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 (until the process ends)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(at)
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests run under nohup
    kind, name, *arguments = command
    sys.argv = [name, *arguments]
    if kind == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind.endswith(".py"):
        sys.argv = command
        runpy.run_path(kind, run_name="__main__")
    else:
        assert kind == "-c"
        exec(compile(name, "<code>", "exec"), {"__name__": "__main__"})


class WarmProcess:
    """What our code uses of ``subprocess.Popen`` for a command of this interpreter."""

    def __init__(
        self,
        command: Sequence[str | Path],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        **streams: int | None,
    ) -> None:
        """``streams``: PIPE for ``stdin``, ``stdout`` and ``stderr``; nothing is read or written otherwise."""
        assert command[0] == sys.executable and set(streams) <= {"stdin", "stdout", "stderr"}
        theirs: list[Connection | None] = []
        ours: list[BinaryIO | None] = []
        for name in ("stdin", "stdout", "stderr"):
            reader, writer = FORKS.Pipe(duplex=False)
            written = name == "stdin"
            kept, given = (writer, reader) if written else (reader, writer)
            piped = streams.get(name) == subprocess.PIPE
            theirs.append(given if piped else None)
            ours.append(os.fdopen(os.dup(kept.fileno()), "wb" if written else "rb") if piped else None)
            kept.close()
            if not piped:
                given.close()
        self.stdin, self.stdout, self.stderr = ours
        arguments = ([*map(str, command[1:])], theirs, dict(env or os.environ), str(cwd or Path.cwd()))
        # The exit status comes through a pipe, once: a second thread that reads it at the same time would get 255.
        self._looking = threading.Lock()
        self._process = FORKS.Process(target=_carried_out, args=arguments)
        self._process.start()
        for stream in theirs:
            if stream is not None:
                stream.close()
        assert self._process.pid is not None
        self.args, self.pid = command, self._process.pid

    @property
    def returncode(self) -> int | None:
        with self._looking:
            return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        ended = connection.wait([self._process.sentinel], timeout)
        code = self.returncode
        if not ended or code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it writes until it ends; both streams must be pipes."""
        assert self.stdout is not None and self.stderr is not None
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            out, err = pool.map(lambda stream: stream.read().decode(), (self.stdout, self.stderr))
        self.wait(timeout)
        return out, err

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def run(command: Sequence[str | Path], cwd: Path | None = None, **_: object) -> Done:
    """``subprocess.run`` of a command whose output is wanted."""
    process = WarmProcess(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    return Done(process.wait(), out, err)


# In place of the module ``subprocess`` in a module that starts processes.
WARM = SimpleNamespace(
    Popen=WarmProcess,
    run=run,
    PIPE=subprocess.PIPE,
    DEVNULL=subprocess.DEVNULL,
    TimeoutExpired=subprocess.TimeoutExpired,
)
