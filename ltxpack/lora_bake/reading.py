"""The bytes of an adapter file: read in blocks, and hashed to know it by content. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ltxpack.errors import FormatError
from ltxpack.files.hashing import hash_file

BLOCK = 8 * 1024 * 1024


def hash_adapter(weights: Path, config: Path | None) -> str:
    """blake3 of the weights, and of a PEFT configuration if there is one. Raises SourceError or FormatError."""
    return with_config(hash_file(weights), config)


def blocks(fd: int, start: int, end: int, path: Path) -> Iterator[memoryview]:
    """The bytes from ``start`` to ``end``, BLOCK at a time; a view is valid until the next. Raises FormatError."""
    buffer = bytearray(max(0, min(BLOCK, end - start)))
    for offset in range(start, end, BLOCK):
        view = memoryview(buffer)[: min(BLOCK, end - offset)]
        fill(fd, view, offset, path)
        yield view


def fill(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """All of ``view`` from ``offset``. Raises FormatError if the file ends before."""
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if got <= 0:
            raise FormatError("became shorter while it was read", file=path)
        done += got


def with_config(digest: str, config: Path | None) -> str:
    """A PEFT configuration decides the scale, so it is part of what the adapter is."""
    if config is None:
        return digest
    return hash_file(config, before=bytes.fromhex(digest))
