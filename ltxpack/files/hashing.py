"""The blake3 of files, by which they are known by content: of one file, or of files as their reads pass by."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blake3 import blake3

from ltxpack.errors import SourceError
from ltxpack.files.direct import DIRECT_FROM
from ltxpack.files.reader import PlannedRead, RangeReader, file_ranges
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


class HashCheck:
    """The blake3 of ``files``, whose reads pass by file after file and in order; on ``thread``, which must be one."""

    def __init__(self, files: Collection[Path], thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._begun: list[Future[None]] = []
        self._hashers = {path: blake3(max_threads=blake3.AUTO) for path in files}

    def begin(self, read: PlannedRead[Any], views: Sequence[memoryview]) -> Future[None] | None:
        """Begin to hash ``read``, if its file is one of ``files``. ``views`` must stay until that is done."""
        if read.file not in self._hashers:
            return None
        self._begun.append(self._thread.submit(self._update, self._hashers[read.file], views))
        return self._begun[-1]

    def digests(self) -> dict[Path, str]:
        """The hash of each file, as hex digits, when all reads have passed."""
        for each in self._begun:
            each.result()
        return {path: hasher.hexdigest() for path, hasher in self._hashers.items()}

    def _update(self, hasher: blake3, views: Sequence[memoryview]) -> None:
        for view in views:
            hasher.update(view)
