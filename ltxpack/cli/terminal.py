"""Results, notes and progress on a terminal: results go to stdout, everything else to stderr.

The standard streams never end a job: a full log disk, a closed terminal or a reader that left stops no work. They drop
what they cannot write: results, notes, progress bars, warnings of libraries. At its end the command asks whether a
result was lost.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from ltxpack.errors import printable
from ltxpack.files.typed import at_home
from ltxpack.files.units import human_bytes
from ltxpack.manifest import is_overlay
from ltxpack.reporter import Reporter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from tqdm import tqdm

# Errors of a reader that left: it has what it wants.
READER_GONE = frozenset({errno.EPIPE, errno.ECONNRESET})
PLAINER = {"…": "..."}
REPLACED = "ltxpack-replaced"
Command = TypeVar("Command", bound=Callable[..., Any])


class PathType(click.Path):
    """The name of a file or folder, which may not be empty; no shell expands the ~ in ``--output=~/a.mp4``."""

    def __init__(self, *, exists: bool = False, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(exists=exists, file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(at_home(value), param, ctx)


class TerminalReporter(Reporter):
    """Notes on stderr, one progress bar at a time with rate and time left."""

    def __init__(self, verbose: bool = False) -> None:
        self._verbose = verbose
        self._bar: tqdm[Any] | None = None

    def note(self, message: str) -> None:
        self._say(message)

    def detail(self, message: str) -> None:
        if self._verbose:
            self._say(message)

    def warn(self, message: str) -> None:
        self._say(f"warning: {message}")

    def begin(self, label: str, total: int, unit: str) -> None:
        """Start a bar; outside a terminal print one line instead."""
        from tqdm import tqdm

        self.end()
        if not sys.stderr.isatty():
            self._say(label)
            return
        scaled = unit == "B"
        self._bar = tqdm(
            total=total, desc=label, unit=unit, unit_scale=scaled, unit_divisor=1000, dynamic_ncols=True, leave=False
        )

    def advance(self, amount: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(amount)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, message: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        click.echo(printable(message), err=True)


def say_error(message: str) -> None:
    click.echo(f"error: {printable(message)}", err=True)


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=1, ensure_ascii=True))


def print_plan(plan: dict[str, Any], as_json: bool, *, bounds: tuple[str, ...] = ()) -> None:
    """Print a plan as JSON, or one line a file. The size of a file whose name ends in ``bounds`` is an upper bound."""
    if as_json:
        print_json(plan)
        return
    width = max((len(file["action"]) for file in plan["files"]), default=0)
    bounded = [file for file in plan["files"] if bounds and file["path"].endswith(bounds)]
    for file in plan["files"]:
        most = "at most " if file in bounded else ""
        click.echo(printable(f"{file['action']:<{width}}  {most + human_bytes(file['bytes']):>9}  {file['path']}"))
    for missing in plan["missing"]:
        click.echo(printable(f"missing: {missing}"))
    linked = plan["total_bytes"] - plan.get("written_bytes", plan["total_bytes"])
    links = f", {human_bytes(linked)} of them links to existing files" if linked else ""
    most = "at most " if bounded else ""
    click.echo(f"{len(plan['files'])} files, {most}{human_bytes(plan['total_bytes'])}{links}")


verbose_option = click.option("-v", "--verbose", is_flag=True, help="Print more details of the work.")
plan_option = click.option("--plan", "plan_only", is_flag=True, help="Only say what the command would write.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def usual_overlay(given: Path | None) -> Path:
    """``given``; without it the current folder if it is an overlay, else ``out``."""
    return given or (Path() if is_overlay(Path()) else Path("out"))


class SteadyFile(io.RawIOBase):
    """The open file ``fd``, which accepts every byte. ``lost``: the first error that lost some of them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write ``data``, or drop it; returns its whole length either way."""
        left = memoryview(data).cast("B")
        total = len(left)
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:  # another program made the pipe non-blocking
                select.select([], [self._fd], [])
            except OSError as error:
                self.lost = self.lost or error
                break
        return total


def hold_streams() -> SteadyFile | None:
    """Make the process's own stdout and stderr steady until it ends; returns the file of stdout.

    The streams replace a letter that their encoding lacks. Returns None if Python code has replaced stdout.
    """
    _open_closed()
    codecs.register_error(REPLACED, _replaced)
    if sys.stderr is sys.__stderr__:
        sys.stderr, _ = _steady(sys.stderr, 2)
    if sys.stdout is not sys.__stdout__:
        return None
    sys.stdout, file = _steady(sys.stdout, 1)
    return file


def lost_result(stdout: SteadyFile | None) -> OSError | None:
    """The error that lost output of ``stdout``; None if nothing is lost, or if the reader left."""
    sys.stdout.flush()
    if stdout is None or stdout.lost is None or stdout.lost.errno in READER_GONE:
        return None
    return stdout.lost


def _steady(stream: TextIO | None, fd: int) -> tuple[TextIO, SteadyFile]:
    file = SteadyFile(fd)
    encoding = stream.encoding if stream is not None else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, REPLACED, line_buffering=True), file


def _open_closed() -> None:
    """Open the null device in place of each closed standard stream.

    Otherwise a file of ours would get the stream's number, and with it the output of libraries.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """A handler of encoding errors: an undecodable byte of a file name stays that byte, a letter becomes ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return PLAINER.get(letter, ascii(letter)[1:-1]), error.start + 1
