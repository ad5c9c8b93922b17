"""What many tests use: comparison in relative L2 and reading safetensors whole."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import parity
import pytest
import torch
from safetensors.torch import load_file

from ltxpack.cli import main
from ltxpack.reporter import SilentReporter

waited_fsync = os.fsync


def unwaited_fsync(fd: Any) -> None:
    """``os.fsync`` without its wait for the disk, a third of the suite's time: no test cuts the power.

    It is asked for as often as ever, and of an open file. The fixture ``fsync_waits`` and programs that are started
    for real have the true one.
    """
    os.fstat(fd if isinstance(fd, int) else fd.fileno())


os.fsync = unwaited_fsync
REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "tests" / "data"
# Seconds that no machine takes, however busy it is, for what a test waits for: whoever waits longer hangs.
HANG = 600.0
# What the fixture ``mount`` gives.
Mount = Callable[..., None]
# Forks from a process that has imported everything that is installed: a kill costs no import, and none falls on one.
FORKS = multiprocessing.get_context("forkserver")
_IMPORTED = "pytest torch safetensors.torch jsonschema ltxpack.cli ltxpack.materialize ltxpack.lora_bake.stream"
_OF_RUNS = "ltxpack.runtime.run ltxpack.runtime.lines ltxpack.runtime.parallel.team"
# The modules that ``import_libraries`` needs, by their own names: each takes seconds.
_LIBRARIES = "diffusers.pipelines.ltx2.pipeline_ltx2 transformers.models.gemma3.modeling_gemma3"
_OTHERS = "ltxpack.demo.checkpoint ltxpack.serve.server"
FORKS.set_forkserver_preload([*_IMPORTED.split(), *_OF_RUNS.split(), *_LIBRARIES.split(), *_OTHERS.split()])


def golden_folders() -> list[Path]:
    """Every full golden fixture: a folder holding ``fixture_params.json`` and ``golden/``.

    Looked for in ``LTXPACK_GOLDEN`` (a fixture, or a folder of fixtures), else in ``../shared/golden``.
    """
    named = os.environ.get("LTXPACK_GOLDEN")
    root = Path(named) if named else REPOSITORY.parent / "shared" / "golden"
    if named and not root.is_dir():
        raise FileNotFoundError(f"LTXPACK_GOLDEN names {root}, which is not a folder")
    candidates = [root, *sorted(root.iterdir())] if root.is_dir() else []
    found = [path for path in candidates if (path / "fixture_params.json").is_file() and (path / "golden").is_dir()]
    if root.is_dir() and not found:
        raise FileNotFoundError(f"{root} holds no golden fixture (fixture_params.json and golden/)")
    return found


def dying_at(kill_at: int, *names: str) -> Iterator[int]:
    """Has this process killed before the ``kill_at``-th call of these functions of ``os``; counts the calls from 1."""
    calls = itertools.count(1)

    def watched(real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    for name in names:
        setattr(os, name, functools.partial(watched, getattr(os, name)))
    return calls


@functools.cache
def _recorded(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def load(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Recorded ones are kept, so that ``relative_l2`` knows which one it met."""
    if path.parent.name != "golden":
        return load_file(path)
    tensors = dict(_recorded(path))
    parity.remember(path, tensors)
    return tensors


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder; no name is in two of them."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load(path)
        assert not part.keys() & tensors.keys()
        tensors |= part
    return tensors


def relative_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    """``|found - expected| / |expected|`` in float64, infinite for another shape or NaN; noted by ``parity``."""
    error = distance(found, expected)
    parity.note(expected, error)
    return error


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """:func:`relative_l2` without a note of it: for tests that want two things to differ."""
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.double() - expected.double()).norm()
    scale = expected.double().norm()
    ratio = (difference / scale if scale > 0 else difference).item()
    return float("inf") if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class Done:
    """A finished command."""

    returncode: int
    stdout: str
    stderr: str


def ltxpack(*arguments: str | Path, cwd: Path | None = None) -> Done:
    """The command line as the console script runs it, in this process (importing torch anew takes seconds)."""
    return done(main, "ltxpack", *arguments, cwd=cwd)


def benchmark(script: ModuleType, *arguments: str | Path) -> Done:
    """A script of the folder benchmarks, in this process."""
    return done(script.main, str(script.__file__), *arguments)


def done(run: Callable[[], object], *arguments: str | Path, cwd: Path | None = None) -> Done:
    """``run``, called as the main function of a program with these arguments, its name first."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [*map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or Path.cwd()),
    ):
        try:
            sys.exit(run())
        except SystemExit as stop:
            message = stop.code if isinstance(stop.code, str) else ""
            return Done(1 if message else int(stop.code or 0), out.getvalue(), err.getvalue() + message)


def refused(done: Done, status: int) -> str:
    """The message of a command that must have failed with ``status`` in one clear error."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
    return done.stderr


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative path: its content, or where a link leads."""
    return {
        path.relative_to(folder).as_posix(): b"-> %a" % str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No file opens with O_DIRECT from now on; returns the list of those that were refused it."""
    real, refused = os.open, []

    def opened(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", opened)
    return refused


def in_fresh_process(code: str, *arguments: str | Path) -> tuple[Any, int]:
    """Runs ``code`` in another interpreter: its ``answer``, through JSON, and its peak memory in bytes."""
    # Not getrusage, which would count the process that started it too.
    ending = "\nimport json; print(json.dumps([answer, open('/proc/self/status').read()]))"
    command = [sys.executable, "-c", textwrap.dedent(code) + ending, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 0, done.stderr[-2000:]
    answer, status = json.loads(done.stdout.splitlines()[-1])
    return answer, 1024 * int(status.partition("VmHWM:")[2].split()[0])


def alive(pid: int) -> bool:
    """Whether there is such a process that has not ended; nobody may have waited for it yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def until(found: Callable[[], Any], every: float = 0.02) -> Any:
    """What ``found`` gives, once that is something; asked again after ``every`` seconds."""
    end = time.monotonic() + HANG
    while not (value := found()):
        assert time.monotonic() < end, "that did not come"
        time.sleep(every)
    return value


class Notes(SilentReporter):
    """Keeps what is told, in order and by kind; ``phases``: label, unit, what was announced and what came of it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.notes: list[str] = []
        self.details: list[str] = []
        self.warnings: list[str] = []
        self.phases: list[list[Any]] = []
        self.open = self.advanced = 0

    def note(self, message: str) -> None:
        self.said.append(message)
        self.notes.append(message)

    def detail(self, message: str) -> None:
        self.said.append(message)
        self.details.append(message)

    def warn(self, message: str) -> None:
        self.said.append(message)
        self.warnings.append(message)

    def begin(self, label: str, total: int, unit: str) -> None:
        self.open += 1
        self.phases.append([label, unit, total, 0])

    def advance(self, amount: int = 1) -> None:
        self.advanced += amount
        if self.phases:
            self.phases[-1][3] += amount

    def end(self) -> None:
        self.open -= 1

    @property
    def begun(self) -> list[str]:
        """The labels of the phases."""
        return [phase[0] for phase in self.phases]
