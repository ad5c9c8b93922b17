"""Cuts a latent video into tiles for decoding: the official layout, or larger tiles if memory allows.

Only sizes and positions, so that a plan needs no torch. Lengths are in latents. Source: spec 06, section 5. Larger
tiles decode less twice, but pixels near a seam differ from the official ones, so they are on request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

OFFICIAL, FAST = "official", "fast"
DECODES = (OFFICIAL, FAST)
LONG_SIDE = 24
SHORTEST_SIDE = 3
SPATIAL_OVERLAP = 2
FRAMES = 10
FRAME_OVERLAP = 3
# In time every tile but the first begins one latent earlier: that latent decodes to one frame only, as the first of a
# clip does, and the frame gets weight 0.
LEADS = (1, 0, 0)
# Full-size tensors of the decoder's last stage alive at its peak, counted on the meta device.
LIVE_TENSORS = 4.5
# The present group, its tail, and two copies on the way to the range [0, 1].
FRAME_COPIES = 4
# Convolutions cannot count this many elements in one tensor.
TOO_MANY = 2**31


@dataclass(frozen=True, slots=True)
class Cut:
    """The longest tile along one axis and how far neighbours overlap."""

    length: int
    overlap: int


class Tiling(NamedTuple):
    frames: Cut
    height: Cut
    width: Cut


def auto_tiling(height: int, width: int) -> Tiling:
    """The official layout: 80 frames, 768 pixels on the long side, the short side in proportion.

    The short side is rounded half to even. It does not depend on the memory of the device.
    """
    longest = max(height, width)

    def side(length: int) -> Cut:
        return Cut(max(SHORTEST_SIDE, round(LONG_SIDE * length / longest)), SPATIAL_OVERLAP)

    return Tiling(Cut(FRAMES, FRAME_OVERLAP), side(height), side(width))


def split(length: int, cut: Cut, lead: int = 0) -> list[slice]:
    """Tiles of ``cut.length`` that cover ``length``, each overlapping the next; the last may be shorter.

    Every tile but the first begins ``lead`` earlier.
    """
    stride, count = cut.length - cut.overlap, AxisTiles.of(length, cut).count
    starts = [number * stride for number in range(count)]
    return [slice(start - lead if start else 0, min(start + cut.length, length)) for start in starts]


@dataclass(frozen=True, slots=True)
class AxisTiles:
    """The tiles along one axis: their number, the latents of the longest, and those of all together."""

    cut: Cut
    count: int
    longest: int
    decoded: int

    @classmethod
    def of(cls, length: int, cut: Cut, lead: int = 0) -> AxisTiles:
        """The counts for :func:`split`. It makes no list of tiles: a plan may have an unsound size."""
        stride = cut.length - cut.overlap
        count = max(1, -(-(length - cut.overlap) // stride))
        middle = cut.length + lead if count > 2 else 0
        last = length - (count - 1) * (stride - lead) if count < 3 else 0
        longest = max(min(length, cut.length), middle, last)
        return cls(cut, count, longest, length + (count - 1) * (cut.overlap + lead))


@dataclass(frozen=True, slots=True)
class Tiles:
    """The number of tiles, and the latents (f, h, w) of the largest."""

    count: int
    largest: tuple[int, ...]

    @classmethod
    def of(cls, grid: Iterable[int], tiling: Tiling) -> Tiles:
        """The tiles of latents of (f, h, w)."""
        axes = list(map(AxisTiles.of, grid, tiling, LEADS))
        return cls(math.prod(axis.count for axis in axes), tuple(axis.longest for axis in axes))


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """The sizes of one latent in the video decoder: ``width`` channels at each of ``places`` positions of the last
    stage, which takes most memory, and ``values`` numbers in the decoded frames.
    """

    width: int
    places: int
    values: int

    def largest_tile(self, available: int, itemsize: int) -> int:
        """The most latents of a tile that can be decoded in ``available`` bytes.

        The peak is a convolution of the last stage: its output, its input, and the input before padding.
        """
        count = self.width * self.places
        return int(min(available // (LIVE_TENSORS * count * itemsize), (TOO_MANY - 1) // count))


def tiling_within(grid: tuple[int, int, int], decoder: DecoderSizes, itemsize: int, available: int) -> Tiling:
    """The largest tiles in which latents of (f, h, w) can be decoded with ``available`` bytes free.

    It subtracts the frames' own bytes first. The official tiles are the smallest, even if they do not fit.
    """
    left = available - FRAME_COPIES * math.prod(grid) * decoder.values * itemsize
    return large_tiling(*grid, decoder.largest_tile(left, itemsize))


def large_tiling(length: int, height: int, width: int, most: int) -> Tiling:
    """The layout that decodes the fewest latents in tiles of at most ``most`` latents; sizes in latents.

    Overlaps are the official ones, so that seams stay as soft. If the official tiles are larger than ``most``, the
    result is the official layout.
    """
    official = auto_tiling(height, width)
    axes = [
        [AxisTiles.of(size, cut, lead) for cut in _cuts(size, usual)]
        for size, usual, lead in zip((length, height, width), official, LEADS, strict=True)
    ]
    fitting = (layout for layout in product(*axes) if math.prod(axis.longest for axis in layout) <= most)

    def cost(layout: tuple[AxisTiles, ...]) -> tuple[int, int]:
        return math.prod(axis.decoded for axis in layout), math.prod(axis.count for axis in layout)

    best = min(fitting, key=cost, default=None)
    return Tiling(*(axis.cut for axis in best)) if best else official


def _cuts(length: int, official: Cut) -> list[Cut]:
    """The official cut of an axis and every even one into longer tiles."""
    even = (-(-(length + (count - 1) * official.overlap) // count) for count in range(1, length + 1))
    return [Cut(size, official.overlap) for size in sorted({official.length, *even}) if size >= official.length]
