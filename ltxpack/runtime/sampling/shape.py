"""Video and audio as one value, and the arithmetic of sizes in pixels and latents, and of frame rates (spec 04).

Needs no torch, so a plan can use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic, TypeVar

from ltxpack.errors import UsageError
from ltxpack.ltx23.classes import AUDIO_FACTOR, SPATIAL_FACTOR, TEMPORAL_FACTOR

# The limits of the video file: the longest side that x264 takes, and a bound of FFmpeg's on the area of a picture with
# a margin of 128 pixels on both axes.
MAX_SIDE, MARGIN, MAX_AREA = 16384, 128, 2**28
# Floating point could not count more frames.
MAX_FRAMES = 2**31

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class AV(Generic[T]):
    """A value for video and one for audio: the sampler treats both alike almost everywhere."""

    video: T
    audio: T

    def map(self, function: Callable[..., U], *others: AV[Any]) -> AV[U]:
        """``function`` applied to the video parts, then to the audio parts (draw order of the noise)."""
        return AV(
            function(self.video, *(other.video for other in others)),
            function(self.audio, *(other.audio for other in others)),
        )


VIDEO_CHANNELS = 128

AUDIO_CHANNELS = 8
AUDIO_BINS = 16
AUDIO_SAMPLE_RATE = 16000
AUDIO_HOP = 160
# The longest video that the model was trained for: so many seconds, and the pixel frames before them.
LONGEST_SECONDS, LONGEST_FRAMES = 20, 4
AUDIO_LATENTS_PER_SECOND = AUDIO_SAMPLE_RATE / AUDIO_HOP / AUDIO_FACTOR

# The frame rates of a video file.
NTSC = (24, 30, 48, 60, 120)
SLOWEST, FASTEST = Fraction(1, 1000), Fraction(1000)
MAX_DENOMINATOR = 1_000_000


@dataclass(frozen=True)
class VideoShape:
    """The size of a video in pixels, and in latents.

    Raises UsageError unless height and width are positive multiples of 32, frames is 8k+1 and fps is positive.
    """

    frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        check_sizes(self.height, self.width, SPATIAL_FACTOR)
        if self.frames < 1 or self.frames % TEMPORAL_FACTOR != 1:
            below = max(1, (self.frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1)
            fitting, better = "a multiple of 8, plus 1", f"choose --num-frames {below} or {below + TEMPORAL_FACTOR}"
            raise UsageError("wrong number of frames", expected=fitting, found=self.frames, next=better)
        if self.frames > MAX_FRAMES:
            raise UsageError(
                "too many frames", expected=f"at most {MAX_FRAMES}", found=self.frames, next="choose fewer"
            )
        if not (math.isfinite(self.fps) and self.fps > 0 and math.isfinite(self.frames / self.fps)):
            raise UsageError("wrong frame rate", expected="a number above 0", found=self.fps, next="choose --fps 24")
        if self.audio_length < 1:
            raise UsageError(
                "too short for any sound",
                expected=f"at least {0.5 / AUDIO_LATENTS_PER_SECOND} seconds",
                found=f"{self.frames} frames at {self.fps} per second",
                next="choose more --num-frames or a smaller --fps",
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        """(f, h, w) of the video latents."""
        return ((self.frames - 1) // TEMPORAL_FACTOR + 1, self.height // SPATIAL_FACTOR, self.width // SPATIAL_FACTOR)

    @property
    def longest(self) -> int:
        """The most frames that the model was trained for at this rate."""
        return int(LONGEST_SECONDS * self.fps + LONGEST_FRAMES)

    @property
    def tokens(self) -> int:
        """Video tokens, without appended keyframes."""
        return math.prod(self.grid)

    @property
    def tokens_per_frame(self) -> int:
        """Video tokens of one latent frame, and of one image."""
        return math.prod(self.grid[1:])

    @property
    def audio_length(self) -> int:
        """Ta, the audio tokens: 25 per second, halves rounded to even."""
        return round(self.frames / self.fps * AUDIO_LATENTS_PER_SECOND)

    @property
    def latent_shapes(self) -> AV[tuple[int, ...]]:
        """[1, 128, f, h, w] and [1, 8, Ta, 16]."""
        return AV((1, VIDEO_CHANNELS, *self.grid), (1, AUDIO_CHANNELS, self.audio_length, AUDIO_BINS))

    def divided(self, by: int) -> VideoShape:
        """The shape with height and width divided. Raises UsageError unless both are multiples of 32 times ``by``."""
        check_sizes(self.height, self.width, SPATIAL_FACTOR * by)
        return VideoShape(self.frames, self.height // by, self.width // by, self.fps)


def check_sizes(height: int, width: int, factor: int) -> None:
    """Raises UsageError unless ``height`` and ``width`` are multiples of ``factor`` that a video file can have."""
    for name, value in (("height", height), ("width", width)):
        if value > MAX_SIDE:
            expected = f"at most {MAX_SIDE} pixels, which x264 takes"
            raise UsageError(f"too large a {name}", expected=expected, found=value, next=f"choose --{name} {MAX_SIDE}")
        if value < factor or value % factor:
            below = max(factor, value // factor * factor)
            better = f"choose --{name} {below} or {below + factor}"
            raise UsageError(f"wrong {name}", expected=f"a multiple of {factor}", found=value, next=better)
    highest = ((MAX_AREA - 1) // (width + MARGIN) - MARGIN) // factor * factor
    if height > highest:
        expected = f"at most {width}x{highest}, which FFmpeg takes"
        found = f"{width}x{height}"
        raise UsageError("too large a picture", expected=expected, found=found, next=f"choose --height {highest}")


def frame_rate(fps: float | Fraction | str) -> Fraction:
    """Frames per second as an exact fraction: 23.976 is 24000/1001, and so for its NTSC relatives.

    Takes a number or its text, also ``24000/1001``. Raises UsageError unless it is a positive finite rate.
    """
    try:
        exact = fps if isinstance(fps, Fraction) else Fraction(str(fps).strip())
    except (ValueError, ZeroDivisionError):
        exact = Fraction(0)
    if not SLOWEST <= exact <= FASTEST:
        expected = f"a number from {SLOWEST} to {FASTEST}; 23.976 is taken for 24000/1001"
        raise UsageError("not a frame rate", expected=expected, found=fps, next="choose --fps 24")
    for nominal in NTSC:
        ntsc = Fraction(nominal * 1000, 1001)
        # A quarter of the step to the whole number: 23.98 is meant, 23.99 is not.
        if abs(exact - ntsc) < (nominal - ntsc) / 4:
            return ntsc
    return exact.limit_denominator(MAX_DENOMINATOR)
