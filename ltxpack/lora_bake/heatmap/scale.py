"""The colours of a coverage page: relative change -> colour, on one logarithmic scale for all pages.

The scale is fixed so that two pages can be laid side by side: the same colour is the same ‖ΔW‖/‖W‖ on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

# 0.01 % to 100 %: below, a change drowns in bf16's rounding; above, the weight is more LoRA than base.
LOW, HIGH = -4, 0
BINS_PER_DECADE = 10
# Indigo to yellow by magenta, evenly lighter from stop to stop (OKLCH lightness 0.26 to 0.95, hue 275 to 465).
RAMP = ("#190070", "#4a008a", "#7f078e", "#b21e80", "#de3a66", "#ff603e", "#ff9b46", "#ffc962", "#fff465")


def place(change: float) -> float:
    """Where ``change`` stands on the scale: 0 at its lower end, 1 at its upper; beyond them if out of range."""
    return (math.log10(change) - LOW) / (HIGH - LOW) if change > 0 else -math.inf


def within(change: float) -> float:
    """:func:`place`, held to [0, 1]."""
    return min(max(place(change), 0.0), 1.0)


def colour(change: float | None) -> str:
    """``#rrggbb``; out of range the nearer end's. None, a change from zero, has the upper end's."""
    position = (1.0 if change is None else within(change)) * (len(RAMP) - 1)
    lower = min(int(position), len(RAMP) - 2)
    pairs = zip(_channels(RAMP[lower]), _channels(RAMP[lower + 1]), strict=True)
    return "#" + "".join(f"{round(start + (end - start) * (position - lower)):02x}" for start, end in pairs)


def histogram(changes: Iterable[float | None]) -> list[int]:
    """How many of ``changes`` fall into each bin of the scale; those out of range are in none."""
    counts = [0] * (BINS_PER_DECADE * (HIGH - LOW))
    for change in changes:
        if change is not None and 0 <= place(change) <= 1:
            counts[min(int(place(change) * len(counts)), len(counts) - 1)] += 1
    return counts


def bin_middle(index: int) -> float:
    """The change in the middle of a bin."""
    return float(10 ** (LOW + (index + 0.5) / BINS_PER_DECADE))


def _channels(stop: str) -> tuple[int, int, int]:
    return int(stop[1:3], 16), int(stop[3:5], 16), int(stop[5:7], 16)
