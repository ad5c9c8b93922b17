"""Files read and written past the page cache (O_DIRECT) where the system allows it, through it where not.

Knows neither tensors nor hashes. A DirectFile belongs to one thread at a time.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
from pathlib import Path

ALIGN = 4096
BUFFER = 4 * 1024 * 1024
# Below this a file is written through the page cache: opening for O_DIRECT would cost more than it saves.
DIRECT_FROM = 1024 * 1024
NOT_DIRECT = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})
O_DIRECT: int = getattr(os, "O_DIRECT", 0)


def aligned_buffer(size: int) -> memoryview:
    """Zeroed memory of at least ``size`` bytes that starts on a page; given back when the last view is gone."""
    size = max(ALIGN, round_up(size))
    if not hasattr(mmap, "MAP_PRIVATE"):
        return memoryview(mmap.mmap(-1, size))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= BUFFER:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def round_up(size: int) -> int:
    """``size`` up to a multiple of ALIGN."""
    return -(-size // ALIGN) * ALIGN


def round_down(size: int) -> int:
    """``size`` down to a multiple of ALIGN."""
    return size // ALIGN * ALIGN


class DirectFile:
    """One open file. ``direct``: whether the next byte goes past the page cache; ``why``: what forbade it, or ""."""

    def __init__(self, path: Path, *, write: bool, direct: bool = True) -> None:
        """Open ``path`` for reading, or for writing if it is empty. Raises OSError."""
        flags = os.O_CLOEXEC | (os.O_RDWR if write else os.O_RDONLY)
        self.path = path
        self.direct = direct and O_DIRECT != 0
        self.why = "" if self.direct else "O_DIRECT is not to be had here" if direct else "O_DIRECT was not asked for"
        try:
            fd = os.open(path, flags | (O_DIRECT if self.direct else 0))
        except OSError as error:
            if not self.direct or error.errno not in NOT_DIRECT:
                raise
            self.direct, self.why = False, f"O_DIRECT: {error.strerror}"
            fd = os.open(path, flags)
        self._file = io.FileIO(fd, "r+b" if write else "rb")
        if not write and not self.direct:
            self._advise("POSIX_FADV_SEQUENTIAL", 0, 0)

    def read(self, memory: memoryview, start: int, nbytes: int) -> memoryview:
        """``nbytes`` bytes from offset ``start``, somewhere in the page-aligned ``memory``; short only at the end.

        ``memory`` must hold the range rounded out to ALIGN. The view's address equals ``start`` modulo ALIGN.
        """
        lead = start % ALIGN
        if self.direct:
            try:
                got = self._fill(memory[: round_up(lead + nbytes)], start - lead, lead + nbytes)
                return memory[lead : max(lead, min(got, lead + nbytes))]
            except OSError as error:
                self._leave_direct(error)
        got = self._fill(memory[lead : lead + nbytes], start, nbytes)
        self._advise("POSIX_FADV_DONTNEED", start, nbytes)
        return memory[lead : lead + got]

    def append(self, memory: memoryview) -> None:
        """Write page-aligned ``memory`` at the current end. Only the last append may be no multiple of ALIGN."""
        if self.direct and len(memory) % ALIGN:
            whole = round_down(len(memory))
            self._append(memory[:whole])
            self._leave_direct(None)
            self._append(memory[whole:])
            return
        self._append(memory)

    def sync(self) -> None:
        """Everything written is on the disk when this returns."""
        os.fsync(self._file.fileno())
        if not self.direct:
            self._advise("POSIX_FADV_DONTNEED", 0, 0)

    def close(self) -> None:
        """Close the file; what was written stays."""
        self._file.close()

    def _fill(self, memory: memoryview, offset: int, needed: int) -> int:
        self._file.seek(offset)
        got = 0
        while got < needed:
            count = self._file.readinto(memory[got:])
            if not count:
                break
            got += count
            if self.direct and got % ALIGN and got < needed:
                # Past an unaligned end there is nothing; an unaligned start would be refused.
                break
        return got

    def _append(self, memory: memoryview) -> None:
        done = 0
        while done < len(memory):
            try:
                done += self._file.write(memory[done:]) or 0
            except OSError as error:
                if not self.direct:
                    raise
                self._leave_direct(error)
            if self.direct and done % ALIGN and done < len(memory):
                self._leave_direct(None)

    def _leave_direct(self, error: OSError | None) -> None:
        """Go on through the page cache; ``error`` is why, None if what follows is merely not aligned."""
        import fcntl

        if error is not None:
            if error.errno not in NOT_DIRECT:
                raise error
            self.why = f"O_DIRECT: {error.strerror}"
        flags = fcntl.fcntl(self._file.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags & ~O_DIRECT)
        self.direct = False

    def _advise(self, advice: str, offset: int, length: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, length, getattr(os, advice))
