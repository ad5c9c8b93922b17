"""Names of bakes, and the ``--add FILE=S`` argument. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from ltxpack.errors import UsageError
from ltxpack.manifest import BAKE_NAME, RESERVED_BAKE_NAMES

MAX_NAME_LENGTH = 200
# Beyond it weights leave what bfloat16 holds, whatever the LoRA and its alpha.
MAX_STRENGTH = 1e18

_FOREIGN = re.compile(r"[^A-Za-z0-9._+-]+")


def format_strength(strength: float) -> str:
    """The shortest decimal that reads back as ``strength``: no exponent, no trailing zeros (1.0 -> ``1``)."""
    if strength == 0:
        return "0"
    text = format(Decimal(repr(float(strength))), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def check_strength(strength: float) -> float:
    """``strength`` if the sums, which are float32, can use it. Raises UsageError."""
    if not abs(strength) <= MAX_STRENGTH:
        raise UsageError(
            "a strength must be a finite number",
            expected=f"one of at most {MAX_STRENGTH:g}",
            found=strength,
            next="choose another, such as 0.5",
        )
    return 0.0 if strength == 0 else strength


def parse_added(text: str) -> tuple[str, float]:
    """``FILE=S`` split at the last ``=``. Raises UsageError."""
    file, equals, number = text.rpartition("=")
    if not equals or not file:
        raise UsageError("--add needs a file and a strength", expected="FILE=S", found=text)
    try:
        strength = float(number)
    except ValueError:
        raise UsageError("the strength of --add is not a number", expected="FILE=S", found=text) from None
    return file, check_strength(strength)


def lora_name(stem: str) -> str:
    """A file's stem with what a bake's name may not hold replaced by ``-``."""
    return _FOREIGN.sub("-", stem).strip("-.") or "lora"


def bake_name(main: tuple[str, float], added: Sequence[tuple[str, float]]) -> str:
    """``distilled-0.5+style-0.8``: the main LoRA, then the added ones in order of application."""
    name = "+".join(f"{lora}-{format_strength(strength)}" for lora, strength in (main, *added))
    if len(name) > MAX_NAME_LENGTH:
        raise UsageError("the bake's name would be too long", found=name[:80] + "…", next="give it one with --name")
    return name


def check_bake_name(name: str) -> str:
    """``name`` if a bake may have it. Raises UsageError."""
    if not BAKE_NAME.fullmatch(name) or name in RESERVED_BAKE_NAMES or len(name) > MAX_NAME_LENGTH:
        reserved = ", ".join(sorted(RESERVED_BAKE_NAMES))
        raise UsageError(
            "is not a name for a bake",
            file=name,
            expected=f"letters, digits, . _ + - ({MAX_NAME_LENGTH} at most), and not {reserved}",
        )
    return name
