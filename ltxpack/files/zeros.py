"""Long stretches of zeros in what is read: what a preallocated download leaves that did not finish.

The check costs some microseconds for 4 MB, as only a block that begins with zeros is compared whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ltxpack.files.reader import Range, Watch

BLOCK = 64 * 1024
# Weights have shorter stretches of zeros in earnest: biases, the rows of tokens that are never used.
LONG = 1024 * 1024
_PROBE, _ZEROS = bytes(64), bytes(BLOCK)


class ZeroStretches:
    """The blocks of zeros in all that passes :meth:`watch`, by file."""

    def __init__(self) -> None:
        self._blocks: dict[Path, list[tuple[int, int]]] = {}

    def watch(self, ranges: Sequence[Range], data: Iterable[memoryview]) -> Iterator[memoryview]:
        """``data``, the bytes of ``ranges`` one after the other, looked through as it passes."""
        for (path, start, _), view in zip(ranges, data, strict=True):
            for at in range(0, len(view), BLOCK):
                if view[at]:
                    continue
                block = view[at : at + BLOCK]
                if block[: len(_PROBE)] == _PROBE[: len(block)] and bytes(block) == _ZEROS[: len(block)]:
                    self._blocks.setdefault(path, []).append((start + at, start + at + len(block)))
            yield view

    def watching(self, path: Path) -> Watch:
        """:meth:`watch` for another name of ``path``."""
        return lambda ranges, data: self.watch([each._replace(path=path) for each in ranges], data)

    def long(self) -> Iterator[Range]:
        """The stretches of ``LONG`` bytes and more, blocks that follow one another in a file joined."""
        for path, blocks in self._blocks.items():
            start = end = -1
            for first, last in [*sorted(blocks), (-1, -1)]:
                if first < 0 or first > end:
                    if end - start >= LONG:
                        yield Range(path, start, end - start)
                    start = first
                end = max(end, last)
