"""How values are written into coverage.html: names escaped and breakable, figures in fields of fixed width."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

MAX_VALUES = 8
MAX_NAME = 200
FROM_ZERO = "from zero"

_SEGMENTS = re.compile(r"(?<=[./])")
_WORDS = re.compile(r"(?<=[_+-])")
# A segment up to this length stays in one line: to_gate_logits, embeddings_connector.
_MAX_SEGMENT = 32


def text(value: object) -> str:
    """``value``, escaped for text and for a quoted attribute."""
    return html.escape(str(value), quote=True)


def name(value: object) -> str:
    """A name, escaped, that a browser may break after a dot, in a long segment after a word, or if it must anywhere."""
    parts = []
    for segment in _SEGMENTS.split(str(value)):
        parts += _WORDS.split(segment) if len(segment) > _MAX_SEGMENT else [segment]
    return "<wbr>".join(text(part) for part in parts)


def clipped(value: str) -> str:
    """A name that someone else chose, its middle left out if it is very long."""
    return value if len(value) <= MAX_NAME else f"{value[: MAX_NAME // 2]} … {value[-MAX_NAME // 2 :]}"


def fixed(value: str, width: int) -> str:
    """``value`` (ASCII) after as many blanks as make it ``width`` long: a browser shows one at most."""
    return f"{value:>{width}}"


def percent(change: float | None) -> str:
    """A change in percent to three digits, in a field of fixed width."""
    return fixed("none" if change is None else f"{100 * change:.3g} %", 11)


def brief(change: float | None) -> str:
    """A change in percent without its sign, as short as a column is narrow; a field of fixed width."""
    return fixed(_brief(change), 7)


def values(found: Iterable[str], ends: Sequence[str] = ()) -> str:
    """A list; if it is long its ends (``ends`` says how they are written) and how many there are."""
    listed = list(found)
    if len(listed) > MAX_VALUES:
        ends = ends or listed
        return text(f"{ends[0]} … {ends[-1]} ({len(listed)} different)")
    return text(", ".join(listed) or "none")


def targets(count: int) -> str:
    """A count of targets in words."""
    return f"{count:,} target{'' if count == 1 else 's'}" if count else "none"


def and_others(count: int) -> str:
    """What a LoRA has besides linears: biases and norms."""
    return f" and {count:,} other tensor{'' if count == 1 else 's'}" if count else ""


def _brief(change: float | None) -> str:
    if change is None:
        return "&infin;"
    if change == 0:
        return "0"
    if change < 1e-4:
        return "&lt;.01"
    if change >= 10:
        return "&gt;999"
    return f"{100 * change:.{2 if change < 0.01 else 1 if change < 0.1 else 0}f}"
