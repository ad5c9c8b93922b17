"""Reads and writes files past the page cache (O_DIRECT) where that helps, through it elsewhere. Knows no tensors.

Past the cache a read or write takes almost no processor time, is as fast as the disk, and leaves the cache to others.
Network and FUSE filesystems accept the flag too, but then they stop reading ahead and become several times slower. On
them everything goes through the cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import mmap
import os
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ltxpack.errors import SourceError
from ltxpack.files.tensorfile import Stamp, open_source, stamp_of, truncated

# AUTO reads through the page cache what is in it, and past it the rest.
CACHED, DIRECT, AUTO = "cached", "direct", "auto"
READS = (AUTO, CACHED, DIRECT)
# As DIRECT, for files that the next run wants in the page cache: bytes that are read through it stay there.
DIRECT_KEPT = "direct, kept"
# A transfer past the cache begins and ends on a multiple of this, in the file and in memory.
ALIGN = 4096
BUFFER = 4 * 1024 * 1024
# Below this a file goes through the page cache: opening for O_DIRECT would cost more than it saves.
DIRECT_FROM = 1024 * 1024
NOT_DIRECT = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})
# The most buffers the system fills in one call (IOV_MAX).
VIEWS_PER_READ = 1024
MOUNTS = Path("/proc/self/mountinfo")
PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 * 1024 * 1024
MAP_FAILED = ctypes.c_void_p(-1).value
# The byte by which mincore says that a page is in memory.
IN_MEMORY = b"\x01"
THROUGH_CACHE = re.compile(r"fuse.*|nfs.*|cifs|smb.*|9p|virtiofs|ceph|afs")


def aligned_buffer(size: int) -> memoryview:
    """Zeroed memory of ``size`` bytes, rounded up to whole pages, that starts on a page; freed with its last view.

    It consists of huge pages as far as they fit: a disk reads into one in one go, and the system allocates, pins and
    unpins one page instead of 512. Raises MemoryError.
    """
    size = max(PAGE, round_up(size, PAGE))
    huge = size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    try:
        memory = mmap.mmap(-1, size + (HUGE_PAGE if huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes of host memory: {error.strerror}") from None
    if not huge:
        return memoryview(memory)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    return memoryview(memory)[start : start + size]


def round_up(size: int, unit: int = ALIGN) -> int:
    return -(-size // unit) * unit


def why_cached(path: Path) -> str:
    """Why files at ``path``, which need not exist, go through the page cache: the kind of filesystem, or ""."""
    try:
        table = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
    kind, options = _filesystem(table, os.path.realpath(path))
    kinds = [kind]
    if kind == "overlay":
        layers = re.findall(r"(?:lowerdir|upperdir)=([^,]*)", options)
        kinds = [_filesystem(table, layer)[0] for layer in ":".join(layers).split(":") if layer]
    slow = next((kind for kind in kinds if THROUGH_CACHE.fullmatch(kind)), None)
    return f"{slow} is faster that way" if slow else ""


def _filesystem(table: str, path: str) -> tuple[str, str]:
    """Kind and options of the filesystem of the real ``path``; ``table`` is the text of /proc/self/mountinfo."""
    longest, found = "", ("", "")
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4])
        # Of two mounts at one point the later one covers the other.
        if len(point) >= len(longest) and (path + "/").startswith(point.rstrip("/") + "/"):
            kind, _, *options = after.split(" ")
            longest, found = point, (kind, " ".join(options))
    return found


class DirectReader:
    """An open file for several threads; ``reads`` is one of READS or DIRECT_KEPT.

    ``past_cache``: whether anything is read past the page cache; ``why``: the reason if not. All methods raise
    SourceError for a file that cannot be read and FormatError for one that ends too early.
    """

    def __init__(self, path: Path, reads: str = CACHED) -> None:
        self.path = path
        self._reads = reads
        self._direct = -1
        self.why = "as asked" if reads == CACHED else why_cached(path)
        self._file = open_source(path)
        self._plain = self._file.fileno()
        if not self.why:
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                self.why = f"O_DIRECT: {error.strerror}"
        self.past_cache = self._direct >= 0
        self._cache = PageCache(self._plain) if self.past_cache and reads == AUTO else None

    @property
    def stamp(self) -> Stamp:
        return stamp_of(self._plain)

    def close(self) -> None:
        """No thread may be reading."""
        if self._cache is not None:
            self._cache.close()
        self._file.close()
        if self._direct >= 0:
            os.close(self._direct)

    def scatter(self, views: Sequence[memoryview], start: int) -> None:
        """Fill ``views``, none of them empty, one after the other with the bytes from ``start`` on, through the cache.

        With DIRECT the cache drops them again.
        """
        left = deque(views)
        position = start
        while left:
            try:
                count = os.preadv(self._plain, list(itertools.islice(left, VIEWS_PER_READ)), position)
            except OSError as error:
                raise self._unreadable(error) from None
            if count == 0:
                raise truncated(self.path, position + sum(map(len, left)), position)
            position += count
            while left and count >= len(left[0]):
                count -= len(left.popleft())
            if count:
                left[0] = left[0][count:]
        if self._reads == DIRECT:
            os.posix_fadvise(self._plain, start, position - start, os.POSIX_FADV_DONTNEED)

    def gather(self, memory: memoryview, start: int, nbytes: int) -> None:
        """Fill ``memory[start % ALIGN :]`` with ``nbytes`` bytes from ``start`` on, past the cache.

        ``memory`` begins on a page and has room for the range rounded out to ALIGN. Bytes that cannot be read past the
        cache are read through it, and so, with AUTO, is a range that is completely in the cache.
        """
        lead = start % ALIGN
        if nbytes and self._cache is not None and self._cache.holds(start, nbytes):
            self.scatter([memory[lead : lead + nbytes]], start)
            return
        first, needed = start - lead, lead + nbytes
        got = max(lead, self._past_cache(memory[: round_up(needed)], first, needed))
        if got < needed:
            self.scatter([memory[got:needed]], first + got)

    def _past_cache(self, memory: memoryview, first: int, needed: int) -> int:
        """How many bytes from ``first`` on are in ``memory``: ``needed`` or more, unless the system would not go on."""
        got = 0
        while self.past_cache and got < needed and got % ALIGN == 0:
            try:
                count = os.preadv(self._direct, [memory[got:]], first + got)
            except OSError as error:
                if error.errno not in NOT_DIRECT:
                    raise self._unreadable(error) from None
                self.past_cache, self.why = False, f"O_DIRECT: {error.strerror}"
                break
            if count == 0:
                break
            got += count
        return got

    def _unreadable(self, error: OSError) -> SourceError:
        return SourceError(f"cannot be read: {error.strerror}", file=self.path)


class PageCache:
    """Says which bytes of an open file are in memory (mincore); from any thread, until :meth:`close`.

    Unknown bytes count as absent: those added after opening, and other users' files, which mincore reports as cached.
    """

    def __init__(self, fd: int) -> None:
        stat = os.fstat(fd)
        self._size = stat.st_size
        self._address: int | None = None
        if self._size and os.geteuid() in (0, stat.st_uid):
            # Nothing may read from this mapping: the file may be cut meanwhile.
            address = _libc().mmap(None, self._size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
            self._address = None if address == MAP_FAILED else address

    def holds(self, start: int, nbytes: int) -> bool:
        """Whether all ``nbytes`` bytes from ``start`` on are in memory."""
        end = start + nbytes
        if self._address is None or end > self._size:
            return False
        first = start - start % PAGE
        pages = ctypes.create_string_buffer(-(-(end - first) // PAGE))
        if _libc().mincore(self._address + first, end - first, pages) != 0:
            return False
        return not pages.raw.strip(IN_MEMORY)

    def close(self) -> None:
        """Unmap the file; no thread may be in :meth:`holds`."""
        if self._address is not None:
            _libc().munmap(self._address, self._size)
            self._address = None


@functools.cache
def _libc() -> ctypes.CDLL:
    """The C library, because Python's own mmap does not give its address."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return libc


class DirectWriter:
    """An empty file that is written front to back, by one thread at a time.

    ``direct``: whether the next byte goes past the page cache; ``why``: the reason if not. All methods raise OSError.
    """

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        self.why = why_cached(path) if direct else "as asked"
        self.direct = not self.why
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags | (os.O_DIRECT if self.direct else 0))
        except OSError as error:
            if not self.direct or error.errno not in NOT_DIRECT:
                raise
            self.direct, self.why = False, f"O_DIRECT: {error.strerror}"
            self._fd = os.open(path, flags)

    def append(self, memory: memoryview) -> None:
        """Write page-aligned ``memory`` at the end. Its size is a multiple of ALIGN, except in the last call."""
        done = 0
        while done < len(memory):
            whole = (len(memory) - done) // ALIGN * ALIGN
            if self.direct and (whole == 0 or done % ALIGN):
                self._leave_direct()
            try:
                done += os.write(self._fd, memory[done : done + whole] if self.direct else memory[done:])
            except OSError as error:
                if not self.direct or error.errno not in NOT_DIRECT:
                    raise
                self.why = f"O_DIRECT: {error.strerror}"
                self._leave_direct()

    def sync(self) -> None:
        """Flush all written bytes to the disk."""
        os.fsync(self._fd)
        if not self.direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; the written bytes stay. A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _leave_direct(self) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False
