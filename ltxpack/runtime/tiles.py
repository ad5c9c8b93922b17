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


def span_count(length: int, cut: Cut) -> int:
    """How many spans :func:`split` and :func:`split_frames` make."""
    return 1 if length <= cut.length else -(-(length - cut.overlap) // (cut.length - cut.overlap))


def split(length: int, cut: Cut) -> list[Span]:
    """Spans of ``cut.length`` that cover ``length``, each overlapping the next; the last may be shorter."""
    stride, count = cut.length - cut.overlap, span_count(length, cut)
    if count == 1:
        return [Span(0, length)]
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
        cuts = (tiling.frames, tiling.height, tiling.width)
        # Not by listing them: a plan is asked for before a size is known to be sound.
        count = prod(map(span_count, grid, cuts))
        rows, columns = min(height, tiling.height.length), min(width, tiling.width.length)
        return cls(count, (_longest_frames(length, tiling.frames), rows, columns))


def _longest_frames(length: int, cut: Cut) -> int:
    """The longest of :func:`split_frames`: a middle one if there is one, else the first or the last."""
    count = span_count(length, cut)
    if count == 1:
        return length
    if count == 2:
        return max(cut.length, length - (cut.length - cut.overlap) + 1)
    return cut.length + 1
