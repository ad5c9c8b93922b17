"""The blake3 of a file, by which it is known by content."""

from __future__ import annotations

import os
from pathlib import Path

from blake3 import blake3

from ltxpack.errors import SourceError
from ltxpack.files.direct import DIRECT_FROM
from ltxpack.files.reader import RangeReader, file_ranges
from ltxpack.files.tensorfile import open_source
from ltxpack.reporter import Reporter


def hash_file(
    path: Path, reporter: Reporter | None = None, *, before: bytes = b"", cached: bool = False, direct: bool = True
) -> str:
    """blake3 of ``before`` and then all of the file, as hex digits, at disk speed.

    ``cached`` reads through the page cache and leaves the file there, for a load that follows. Advances ``reporter``
    by the bytes read. Raises SourceError, or FormatError for a file that becomes shorter meanwhile.
    """
    size = regular_size(path)
    hasher = blake3(before, max_threads=blake3.AUTO if cached else 1)
    if cached:
        try:
            hasher.update_mmap(path)
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}", file=path) from None
        if reporter is not None:
            reporter.advance(size)
        return hasher.hexdigest()
    with RangeReader(file_ranges(path, size), direct=direct and size >= DIRECT_FROM) as reader:
        for data in reader:
            hasher.update(data)
            if reporter is not None:
                reporter.advance(len(data))
    return hasher.hexdigest()


def regular_size(path: Path) -> int:
    """Bytes of the file at ``path``. Raises AbsentError, or SourceError for what is no readable regular file."""
    with open_source(path) as file:
        return os.fstat(file.fileno()).st_size
