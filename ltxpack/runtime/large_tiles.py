"""Cutting a latent video into fewer, larger tiles where memory allows: less is decoded twice.

Pure arithmetic, as ``tiles``. Pixels near a seam differ from the official ones, so it has to be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from ltxpack.runtime.tiles import Cut, Span, Tiling, auto_tiling, split, split_frames


def large_tiling(length: int, height: int, width: int, most: int) -> Tiling:
    """The layout that decodes the fewest latents in tiles of at most ``most`` latents; sizes in latents.

    With the official overlaps, so that seams stay as soft. Where even the official tiles are larger than ``most``,
    the official layout.
    """
    official = auto_tiling(height, width)
    axes = (
        _layouts(length, official.frames, split_frames),
        _layouts(height, official.height, split),
        _layouts(width, official.width, split),
    )
    fitting = [layout for layout in product(*axes) if math.prod(axis.longest for axis in layout) <= most]
    if not fitting:
        return official
    return Tiling(*(axis.cut for axis in min(fitting, key=_cost)))


@dataclass(frozen=True, slots=True)
class _Layout:
    """One way to cut an axis: the latents decoded in all, in the longest tile, and the number of tiles."""

    cut: Cut
    decoded: int
    longest: int
    tiles: int


def _layouts(length: int, official: Cut, spans_of: Callable[[int, Cut], list[Span]]) -> list[_Layout]:
    """The official cut of an axis and every even one into longer tiles."""
    even = (-(-(length + (count - 1) * official.overlap) // count) for count in range(1, length + 1))
    found = []
    for size in sorted({official.length, *(size for size in even if size > official.length)}):
        spans = [span.stop - span.start for span in spans_of(length, Cut(size, official.overlap))]
        found.append(_Layout(Cut(size, official.overlap), sum(spans), max(spans), len(spans)))
    return found


def _cost(layout: tuple[_Layout, ...]) -> tuple[int, int]:
    """The latents decoded, then the number of tiles."""
    return math.prod(axis.decoded for axis in layout), math.prod(axis.tiles for axis in layout)
