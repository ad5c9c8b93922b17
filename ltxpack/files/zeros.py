"""Finds long stretches of zeros in files, which an unfinished download with preallocated space leaves.

The check costs some microseconds for 4 MB: it compares a whole block only if the block begins with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ltxpack.files.reader import Range

BLOCK = 64 * 1024
# Sound weights have shorter stretches of zeros: biases, the rows of unused tokens.
LONG = 1024 * 1024
_PROBE, _ZEROS = bytes(64), bytes(BLOCK)


class ZeroStretches:
    """The blocks of zeros in the bytes that pass :meth:`watch`, by file."""

    def __init__(self) -> None:
        self._blocks: dict[Path, list[tuple[int, int]]] = {}

    def watch(self, ranges: Sequence[Range], data: Iterable[memoryview]) -> Iterator[memoryview]:
        """Pass on ``data``, the bytes of ``ranges`` in order, and note its blocks of zeros."""
        for (path, start, _), view in zip(ranges, data, strict=True):
            for at in range(0, len(view), BLOCK):
                if view[at]:
                    continue
                block = view[at : at + BLOCK]
                if block[: len(_PROBE)] == _PROBE[: len(block)] and bytes(block) == _ZEROS[: len(block)]:
                    self._blocks.setdefault(path, []).append((start + at, start + at + len(block)))
            yield view

    def long(self) -> Iterator[Range]:
        """The stretches of at least ``LONG`` bytes, with adjacent blocks joined."""
        for path, blocks in self._blocks.items():
            start = end = -1
            for first, last in [*sorted(blocks), (-1, -1)]:
                if first < 0 or first > end:
                    if end - start >= LONG:
                        yield Range(path, start, end - start)
                    start = first
                end = max(end, last)
