"""One file of an overlay, read from several threads: through the system's page cache, or past it (O_DIRECT).

Past it, a read costs next to no processor time and is as fast as the disk, and what others have in the cache stays
there. Through it, the next process finds the bytes in memory, and what is there already comes faster than any disk.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ltxpack.errors import LtxpackError, OverlayError, quoted
from ltxpack.files.page_cache import PageCache

# Through the page cache, past it, or through it for what is there and past it for the rest.
CACHED, DIRECT, AUTO = "cached", "direct", "auto"
READS = (AUTO, CACHED, DIRECT)
# What a read past the cache begins and ends on, in the file and in memory.
ALIGN = 4096
O_DIRECT: int = getattr(os, "O_DIRECT", 0)
NOT_DIRECT = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
# The most buffers the system fills in one call (IOV_MAX).
VIEWS_PER_READ = 1024


class SourceFile:
    """An open file, read the way ``reads`` says: one of READS. Afterwards ``past_cache`` says whether anything is read
    past the page cache, which not every filesystem allows.

    Everything here raises OverlayError for a file that cannot be read or is shorter than it was.
    """

    def __init__(self, path: Path, reads: str = CACHED) -> None:
        self.path = path
        self._direct = -1
        try:
            self._plain = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise changed(path, "readable", error.strerror) from None
        if reads != CACHED and O_DIRECT:
            with contextlib.suppress(OSError):
                self._direct = os.open(path, os.O_RDONLY | O_DIRECT)
        self.past_cache = self._direct >= 0
        self._cache = PageCache(self._plain) if self.past_cache and reads == AUTO else None

    def close(self) -> None:
        """Close it; nothing may be reading."""
        if self._cache is not None:
            self._cache.close()
        os.close(self._plain)
        if self._direct >= 0:
            os.close(self._direct)

    def scatter(self, views: Sequence[memoryview], start: int) -> None:
        """Fill ``views``, none of them empty, one after the other with what follows ``start``, through the cache."""
        left = deque(views)
        while left:
            try:
                count = os.preadv(self._plain, list(itertools.islice(left, VIEWS_PER_READ)), start)
            except OSError as error:
                raise changed(self.path, "readable", error.strerror) from None
            if count == 0:
                raise changed(self.path, f"more than {start} bytes", "no more")
            start += count
            while left and count >= len(left[0]):
                count -= len(left.popleft())
            if count:
                left[0] = left[0][count:]

    def gather(self, memory: memoryview, start: int, nbytes: int) -> None:
        """Fill ``memory[start % ALIGN :]`` with ``nbytes`` bytes from ``start`` on, past the cache.

        ``memory`` begins on a page and has room for the range rounded out to ALIGN. What cannot be read past the
        cache is read through it, and with AUTO what is there as a whole.
        """
        lead = start % ALIGN
        if nbytes and self._cache is not None and self._cache.holds(start, nbytes):
            self.scatter([memory[lead : lead + nbytes]], start)
            return
        first, needed = start - lead, lead + nbytes
        got = max(lead, self._past_cache(memory[: -(-needed // ALIGN) * ALIGN], first, needed))
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
                    raise changed(self.path, "readable", error.strerror) from None
                self.past_cache = False
                break
            if count == 0:
                break
            got += count
        return got


def changed(path: Path, expected: object, found: object) -> LtxpackError:
    """What is raised for a file that is not as the manifest states it."""
    # A manifest marks the overlay's own folder.
    overlay = next((folder for folder in path.parents if (folder / "ltxpack.json").is_file()), path.parent)
    return OverlayError(
        "changed since the overlay was written",
        file=path,
        expected=expected,
        found=found,
        next=f"ltxpack verify {quoted(overlay)}",
    )
