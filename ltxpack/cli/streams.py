"""Standard streams that never end a job: a full log disk, a closed terminal or a reader that left stops no work.

The streams drop what they cannot write: results, notes, progress bars, warnings of libraries. At its end the command
asks whether a result was lost.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Errors of a reader that left: it has what it wants.
READER_GONE = frozenset({errno.EPIPE, errno.ECONNRESET})
PLAINER = {"…": "..."}
REPLACED = "ltxpack-replaced"


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
