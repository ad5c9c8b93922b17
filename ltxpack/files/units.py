"""Sizes and times for people: output in decimal units (GB); input in decimal or binary ones (GiB)."""

from __future__ import annotations

import re

from ltxpack.errors import UsageError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
MAX_SIZE = 2**62
_DURATION = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([smhd])\s*", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str, name: str, *, least: int = 1, next: str | None = None) -> int:
    """``5GB``, ``500 MB``, ``2GiB`` or plain bytes, as bytes.

    Raises UsageError that names ``name`` (a flag or a variable) for other texts and for sizes below ``least``.
    """
    match = _SIZE.fullmatch(text)
    if match is not None:
        number, power, binary = match.groups()
        size = float(number) * (1024 if binary else 1000) ** _POWERS[(power or "").lower()]
        if least <= size <= MAX_SIZE:
            return int(size)
    raise UsageError(f"{name} is not a size", expected="a size such as 5GB, 500MB or 2GiB", found=text, next=next)


def parse_duration(text: str, name: str, *, least: float = 0) -> float:
    """``90m``, ``24h`` or ``7d``, as seconds.

    Raises UsageError that names ``name`` for other texts and for times below ``least``.
    """
    match = _DURATION.fullmatch(text)
    if match is not None:
        seconds = float(match[1]) * _SECONDS[match[2].lower()]
        if seconds >= least:
            return seconds
    wanted = f"a time of {human_seconds(least)} or more such as 90m, 24h or 7d"
    raise UsageError(f"{name} is no such time", expected=wanted, found=text, next=f"choose {name} 24h")


def human_bytes(count: float) -> str:
    """``count`` bytes in the decimal unit that fits: ``46.1 GB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def gigabytes(count: float) -> str:
    """``count`` bytes in GB, for figures that a reader compares: ``0.5 GB``."""
    return f"{count / 1e9:.1f} GB"


def human_seconds(seconds: float) -> str:
    """``seconds`` in the unit that fits: ``3 s``, ``12 min``, ``8.1 h``."""
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
