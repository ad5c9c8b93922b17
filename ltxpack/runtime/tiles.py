"""How each axis of a latent video is cut for decoding: sizes and places alone, so that a plan needs no torch.

Lengths are in latents. Source: spec 06, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

LONG_SIDE = 24
SHORTEST_SIDE = 3
SPATIAL_OVERLAP = 2
FRAMES = 10
FRAME_OVERLAP = 3


@dataclass(frozen=True, slots=True)
class Cut:
    """The longest tile along one axis and how far neighbours overlap."""

    length: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.length:
            raise ValueError(f"an overlap of {self.overlap} does not fit tiles of {self.length} latents")


@dataclass(frozen=True, slots=True)
class Tiling:
    """How each axis is cut."""

    frames: Cut
    height: Cut
    width: Cut


@dataclass(frozen=True, slots=True)
class Span:
    """One tile along one axis: ``[start, stop)`` and the length of its rising and falling edge."""

    start: int
    stop: int
    rise: int = 0
    fall: int = 0

    @property
    def latents(self) -> slice:
        """The latents this tile decodes."""
        return slice(self.start, self.stop)


def auto_tiling(height: int, width: int) -> Tiling:
    """The official layout: 80 frames, 768 pixels on the long side, the short side in proportion.

    The short side is rounded half to even. It does not depend on the memory of the device.
    """
    longest = max(height, width)

    def side(length: int) -> Cut:
        return Cut(max(SHORTEST_SIDE, round(LONG_SIDE * length / longest)), SPATIAL_OVERLAP)

    return Tiling(Cut(FRAMES, FRAME_OVERLAP), side(height), side(width))


def split(length: int, cut: Cut) -> list[Span]:
    """Spans of ``cut.length`` that cover ``length``, each overlapping the next; the last may be shorter."""
    if length <= cut.length:
        return [Span(0, length)]
    stride = cut.length - cut.overlap
    count = -(-(length - cut.overlap) // stride)
    return [
        Span(
            start=i * stride,
            stop=min(i * stride + cut.length, length),
            rise=cut.overlap if i > 0 else 0,
            fall=cut.overlap if i < count - 1 else 0,
        )
        for i in range(count)
    ]


def split_frames(length: int, cut: Cut) -> list[Span]:
    """As :func:`split`; every span after the first starts one latent earlier.

    That latent decodes to one frame only (the first of a clip does), which gets weight 0.
    """
    first, *rest = split(length, cut)
    return [first, *(Span(span.start - 1, span.stop, span.rise + 1, span.fall) for span in rest)]


@dataclass(frozen=True, slots=True)
class Tiles:
    """How many tiles there are, and the latents (f, h, w) of one that is as large as any."""

    count: int
    largest: tuple[int, int, int]

    @classmethod
    def of(cls, grid: tuple[int, int, int], tiling: Tiling) -> Tiles:
        """Those that latents of (f, h, w) are cut into."""
        length, height, width = grid
        axes = (split_frames(length, tiling.frames), split(height, tiling.height), split(width, tiling.width))
        frames, rows, columns = (max(span.stop - span.start for span in spans) for spans in axes)
        return cls(prod(map(len, axes)), (frames, rows, columns))
