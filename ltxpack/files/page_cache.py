"""Which bytes of a file the system has in its page cache (mincore)."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os

PAGE = mmap.PAGESIZE
FAILED = ctypes.c_void_p(-1).value
# The byte of a page that is in memory.
THERE = b"\x01"


class PageCache:
    """Says which bytes of an open file are in memory; from any thread, until :meth:`close`.

    What is unknown counts as absent: files of other users (mincore would report all their pages as cached), and bytes
    added after opening.
    """

    def __init__(self, fd: int) -> None:
        stat = os.fstat(fd)
        self._size = stat.st_size
        self._address = _mapped(fd, self._size) if os.geteuid() in (0, stat.st_uid) else None

    def holds(self, start: int, nbytes: int) -> bool:
        """Whether all ``nbytes`` bytes from ``start`` on are in memory."""
        end = start + nbytes
        if self._address is None or end > self._size:
            return False
        first = start - start % PAGE
        pages = ctypes.create_string_buffer(-(-(end - first) // PAGE))
        if _libc().mincore(self._address + first, end - first, pages) != 0:
            return False
        return not pages.raw.strip(THERE)

    def close(self) -> None:
        """Give the mapping back; no thread may be asking."""
        if self._address is not None:
            _libc().munmap(self._address, self._size)
            self._address = None


def _mapped(fd: int, size: int) -> int | None:
    """The address of the whole file in memory, never to be read from: the file may be cut meanwhile."""
    if size == 0:
        return None
    address: int | None = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    return None if address == FAILED else address


@functools.cache
def _libc() -> ctypes.CDLL:
    """The C library: Python's own mapping does not tell its address."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return libc
