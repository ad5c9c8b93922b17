"""Frames per second as an exact fraction. Needs no torch."""

from __future__ import annotations

from fractions import Fraction

from ltxpack.errors import UsageError

NTSC = (24, 30, 48, 60, 120)
SLOWEST, FASTEST = Fraction(1, 1000), Fraction(1000)
MAX_DENOMINATOR = 1_000_000


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
