"""The factor of a LoRA: one number, or other numbers in some blocks. Parses it, and writes it into names.

``0.8@0-11,30:0.5`` is 0.5 in the blocks 0 to 11 and 30, and 0.8 in everything else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal

from ltxpack.errors import UsageError

# Larger strengths take weights out of the range of bfloat16, whatever the LoRA and its alpha.
MAX_STRENGTH = 1e18

_EXPECTED = "S, or S@BLOCKS:S such as 0.8@0-11,30:0.5"
_RUN = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class BlockRun:
    """The strength of the blocks ``first`` to ``last``, both included."""

    first: int
    last: int
    strength: float

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Strength:
    """``value``, except in the ``blocks``, which are in order, do not overlap, and all differ from ``value``."""

    value: float
    blocks: tuple[BlockRun, ...] = ()

    @classmethod
    def of(cls, strength: float | Strength) -> Strength:
        """Raises UsageError for a number that float32 sums cannot use, or a block that occurs twice."""
        given = strength if isinstance(strength, Strength) else cls(strength)
        value = check_strength(given.value)
        ordered = sorted(given.blocks, key=lambda run: run.first)
        for before, run in itertools.pairwise(ordered):
            if run.first <= before.last:
                advice = "name each block once"
                raise UsageError("a strength names a block twice", found=f"block {run.first}", next=advice)
        runs = [replace(run, strength=check_strength(run.strength)) for run in ordered]
        return cls(value, _merged(run for run in runs if run.strength != value))

    @classmethod
    def parse(cls, text: str) -> Strength:
        """``S``, or ``S@BLOCKS:S`` with any number of ``@BLOCKS:S``; BLOCKS like ``0-11,30``. Raises UsageError."""
        value, *groups = text.split("@")
        runs = []
        for group in groups:
            blocks, colon, number = group.rpartition(":")
            if not colon:
                named = group or "0-11"
                advice = f"write 0@{named}:{value} for these blocks alone, {value}@{named}:0 for all but these"
                raise UsageError(
                    "a strength names blocks without a number", expected=_EXPECTED, found=text, next=advice
                )
            runs += [replace(run, strength=_number(number, text)) for run in _runs(blocks, text)]
        return cls.of(cls(_number(value, text), tuple(runs)))

    @property
    def numbers(self) -> tuple[float, ...]:
        """All numbers: the one outside the blocks, then those of the blocks."""
        return (self.value, *(run.strength for run in self.blocks))

    @property
    def idle(self) -> bool:
        """Whether a LoRA at this strength adds nothing."""
        return not any(self.numbers)

    def at(self, block: int | None) -> float:
        """The strength in ``block``, or outside all blocks."""
        inside = (run.strength for run in self.blocks if block is not None and run.first <= block <= run.last)
        return next(inside, self.value)

    def within(self, count: int) -> Strength:
        """The strength without blocks that a model of ``count`` blocks lacks."""
        there = (replace(run, last=min(run.last, count - 1)) for run in self.blocks if run.first < count)
        return replace(self, blocks=tuple(there))

    def __str__(self) -> str:
        return self._spelled("@", ",", ":")

    @property
    def in_name(self) -> str:
        """The spelling in a bake's name: ``0.8_0-11_30at0.5``."""
        return self._spelled("_", "_", "at")

    def _spelled(self, before: str, between: str, of: str) -> str:
        """The value, then each other strength after its blocks, in the order of the first block of each."""
        groups: dict[float, list[str]] = {}
        for run in self.blocks:
            groups.setdefault(run.strength, []).append(str(run))
        others = (f"{before}{between.join(runs)}{of}{format_strength(by)}" for by, runs in groups.items())
        return format_strength(self.value) + "".join(others)


def format_strength(strength: float) -> str:
    """The shortest decimal that reads back as ``strength``: no exponent, no trailing zeros (1.0 -> ``1``)."""
    if strength == 0:
        return "0"
    text = format(Decimal(repr(float(strength))), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def check_strength(strength: float) -> float:
    """``strength`` if float32 sums can use it. Raises UsageError."""
    if not abs(strength) <= MAX_STRENGTH:
        most, advice = f"one of at most {MAX_STRENGTH:g}", "choose another, such as 0.5"
        raise UsageError("a strength must be a finite number", expected=most, found=strength, next=advice)
    return 0.0 if strength == 0 else strength


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        advice = "write numbers with a point, such as 0.5"
        raise UsageError("a strength is not a number", expected=_EXPECTED, found=whole, next=advice) from None


def _runs(blocks: str, whole: str) -> list[BlockRun]:
    runs = []
    for part in blocks.split(","):
        found = _RUN.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            advice = "write blocks like 0-11,30, the smaller first"
            raise UsageError("a strength names no blocks after its @", expected=_EXPECTED, found=whole, next=advice)
        runs.append(BlockRun(first, last, 0.0))
    return runs


def _merged(runs: Iterable[BlockRun]) -> tuple[BlockRun, ...]:
    """The runs, with neighbours of equal strength joined."""
    found: list[BlockRun] = []
    for run in runs:
        if found and found[-1].last + 1 == run.first and found[-1].strength == run.strength:
            found[-1] = replace(found[-1], last=run.last)
        else:
            found.append(run)
    return tuple(found)
