"""A stream that takes nothing more ends no command: full disks, readers that left, closed terminals, other letters."""

from __future__ import annotations

import multiprocessing.connection
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from materialize import tiny_source
from support import FORKS, HANG, ltxpack

from ltxpack.cli import main
from ltxpack.cli.terminal import TerminalReporter, hold_streams


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def reader_gone() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    terminal, ours = pty.openpty()
    os.close(terminal)
    return ours


def closed() -> int:
    return -1


BROKEN = [full, reader_gone, closed_terminal, closed]


def run_with(out: Callable[[], int], err: Callable[[], int], arguments: list[str]) -> None:
    """The command line in a process of its own whose standard streams are these."""
    for fd, kind in ((1, out), (2, err)):
        opened = kind()
        if opened < 0:
            os.close(fd)
        else:
            os.dup2(opened, fd)
    sys.argv = ["ltxpack", *arguments]
    main()


def status(target: Callable[..., None], *arguments: object) -> int | None:
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(HANG)
    return process.exitcode


@pytest.mark.parametrize("broken", BROKEN)
def test_work_is_done_whatever_becomes_of_the_streams(broken: Callable[[], int], tmp_path: Path) -> None:
    """Only a result that a full disk or a terminal did not take is a failure, and only at the end."""
    source, out = tiny_source.make_source(tmp_path / "source"), tmp_path / "out"
    lost = 1 if broken in (full, closed_terminal) else 0
    assert status(run_with, broken, broken, ["materialize", str(source), str(out)]) == lost
    assert ltxpack("verify", out).returncode == 0
    again = tmp_path / "again"
    assert status(run_with, devnull, broken, ["materialize", str(source), str(again)]) == 0
    assert ltxpack("verify", again).returncode == 0
    assert status(run_with, broken, devnull, ["bake-lora", str(tmp_path), "--strength", "1"]) == 1, "its own failure"


def devnull() -> int:
    return os.open(os.devnull, os.O_WRONLY)


def shown_on_a_terminal_that_closes() -> None:
    terminal, ours = pty.openpty()
    os.dup2(ours, 2)
    os.close(ours)
    hold_streams()
    reporter = TerminalReporter()
    reporter.begin("work", 100, "B")
    reporter.advance(1)
    os.close(terminal)
    for _ in range(5):
        time.sleep(0.15)  # so that the bar is drawn again
        reporter.advance(1)
    reporter.note("told to nobody")
    reporter.end()


def test_a_bar_outlives_its_terminal() -> None:
    assert status(shown_on_a_terminal_that_closes) == 0


def many_lines_through_a_pipe_that_does_not_wait(writer: multiprocessing.connection.Connection) -> None:
    os.set_blocking(writer.fileno(), False)
    os.dup2(writer.fileno(), 1)
    writer.close()
    hold_streams()
    print("x" * 99, *["y" * 99] * 9999, sep="\n")  # more than a pipe holds


def test_a_pipe_that_does_not_wait_gets_every_line() -> None:
    reader, writer = FORKS.Pipe(duplex=False)
    got: list[bytes] = []

    def read() -> None:
        while data := os.read(reader.fileno(), 65536):
            got.append(data)

    process = FORKS.Process(target=many_lines_through_a_pipe_that_does_not_wait, args=(writer,))
    process.start()
    writer.close()
    thread = threading.Thread(target=read)
    thread.start()
    thread.join(HANG)
    process.join(HANG)
    assert process.exitcode == 0
    assert len(b"".join(got)) == 1_000_000


def typed(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """``command`` by a shell, ``ltxpack`` in it as this interpreter runs it."""
    shell = f'ltxpack() {{ "{sys.executable}" -m ltxpack "$@"; }}\n{command}'
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", shell], cwd=folder, env=usual | environment, capture_output=True, check=False, timeout=HANG
    )


def test_a_lost_result_is_told_in_a_sentence(demo: Path) -> None:
    done = typed("ltxpack inspect --json overlay >/dev/full", demo)
    assert done.returncode == 1
    told = done.stderr.decode()
    assert "error: the result could not be printed: No space left on device" in told
    assert "Traceback" not in told and "Exception ignored" not in told


@pytest.mark.parametrize("command", ["2>&1 | head -1; exit ${PIPESTATUS[0]}", "2>/dev/full", ">&-", ">&- 2>&- <&-"])
def test_what_a_shell_does_with_streams(command: str, demo: Path) -> None:
    done = typed(f"ltxpack inspect overlay {command}", demo)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_letters_that_an_encoding_lacks_are_replaced(encoding: str, demo: Path, tmp_path: Path) -> None:
    done = typed(f"ltxpack plan '{demo}/overlay'", tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    ending = {"latin-1": b'"..."', "cp1252": b'"\x85"'}.get(encoding, '"…"'.encode())
    assert done.stdout.splitlines()[-1].endswith(ending)


def test_a_file_name_of_any_bytes_is_printed_as_it_is(demo: Path, tmp_path: Path) -> None:
    name = b"\xff\xe9"
    (tmp_path / os.fsdecode(name)).symlink_to(demo / "overlay")
    done = typed("ltxpack verify $'\\xff\\xe9'", tmp_path, LC_ALL="C.UTF-8")
    assert done.stdout == name + b": every file as written\n"
