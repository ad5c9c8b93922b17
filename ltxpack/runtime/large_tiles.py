"""Cutting a latent video into fewer, larger tiles where memory allows: less is decoded twice.

Pure arithmetic, as ``tiles``. Pixels near a seam differ from the official ones, so it has to be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from ltxpack.runtime.tiles import Cut, Span, Tiling, auto_tiling, split, split_frames

OFFICIAL, FAST = "official", "fast"
DECODES = (OFFICIAL, FAST)
# Full-size tensors of the decoder's last stage alive at its largest moment, counted on the meta device.
LIVE_TENSORS = 4.5
# The group under way, its tail, and two on the way to the range [0, 1].
FRAME_COPIES = 4
# Nothing may have as many elements, which convolutions cannot count.
TOO_MANY = 2**31


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """What a latent becomes in the video decoder: ``width`` channels in ``places`` places of the last stage, where
    most memory goes, and ``values`` numbers in the decoded frames.
    """

    width: int
    places: int
    values: int

    def largest_tile(self, available: int, itemsize: int) -> int:
        """How many latents a tile may have that is decoded in ``available`` bytes.

        Its largest moment is a convolution of the last stage: the output, the input, and that before it was padded.
        """
        count = self.width * self.places
        return int(min(available // (LIVE_TENSORS * count * itemsize), (TOO_MANY - 1) // count))


def tiling_within(grid: tuple[int, int, int], decoder: DecoderSizes, itemsize: int, available: int) -> Tiling:
    """The largest tiles in which latents of (f, h, w) can be decoded with ``available`` bytes free.

    What the frames themselves take is left out first. Not less than the official tiles even where these do not fit.
    """
    left = available - FRAME_COPIES * math.prod(grid) * decoder.values * itemsize
    return large_tiling(*grid, decoder.largest_tile(left, itemsize))


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
