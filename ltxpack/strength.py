"""What a LoRA is multiplied by: one number, or other numbers in some blocks. How it is typed, and how a name says it.

``0.8@0-11,30:0.5`` is 0.5 in the blocks 0 to 11 and 30, and 0.8 in everything else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal

from ltxpack.errors import UsageError

# Beyond it weights leave what bfloat16 holds, whatever the LoRA and its alpha.
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
    """``value``, but in the ``blocks``, which are in order, do not overlap, and all differ from it."""

    value: float
    blocks: tuple[BlockRun, ...] = ()

    @classmethod
    def of(cls, strength: float | Strength) -> Strength:
        """Raises UsageError for a number that the sums, which are float32, cannot use, or a block named twice."""
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
                advice = f"write 0@{group}:{value} for these blocks alone, {value}@{group}:0 for all but these"
                raise UsageError("a strength names blocks without theirs", expected=_EXPECTED, found=text, next=advice)
            runs += [replace(run, strength=_number(number, text)) for run in _runs(blocks, text)]
        return cls.of(cls(_number(value, text), tuple(runs)))

    @property
    def numbers(self) -> tuple[float, ...]:
        """All of them, that of most blocks first."""
        return (self.value, *(run.strength for run in self.blocks))

    def at(self, block: int | None) -> float:
        """The strength in ``block``, or outside all blocks."""
        inside = (run.strength for run in self.blocks if block is not None and run.first <= block <= run.last)
        return next(inside, self.value)

    def within(self, count: int) -> Strength:
        """Without the blocks that a model of ``count`` blocks does not have."""
        there = (replace(run, last=min(run.last, count - 1)) for run in self.blocks if run.first < count)
        return replace(self, blocks=tuple(there))

    def __str__(self) -> str:
        groups = (f"@{','.join(runs)}:{format_strength(number)}" for number, runs in self._groups().items())
        return format_strength(self.value) + "".join(groups)

    @property
    def in_name(self) -> str:
        """As a bake's name says it: ``0.8_0-11_30at0.5``."""
        groups = (f"_{'_'.join(runs)}at{format_strength(number)}" for number, runs in self._groups().items())
        return format_strength(self.value) + "".join(groups)

    def _groups(self) -> dict[float, list[str]]:
        """Strength -> its blocks, in the order of their first ones."""
        found: dict[float, list[str]] = {}
        for run in self.blocks:
            found.setdefault(run.strength, []).append(str(run))
        return found


def format_strength(strength: float) -> str:
    """The shortest decimal that reads back as ``strength``: no exponent, no trailing zeros (1.0 -> ``1``)."""
    if strength == 0:
        return "0"
    text = format(Decimal(repr(float(strength))), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def check_strength(strength: float) -> float:
    """``strength`` if the sums, which are float32, can use it. Raises UsageError."""
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
            problem, advice = (
                "a strength names no blocks where it should",
                "write blocks like 0-11,30, the smaller first",
            )
            raise UsageError(problem, expected=_EXPECTED, found=whole, next=advice)
        runs.append(BlockRun(first, last, 0.0))
    return runs


def _merged(runs: Iterable[BlockRun]) -> tuple[BlockRun, ...]:
    """Neighbours of one strength as one."""
    found: list[BlockRun] = []
    for run in runs:
        if found and found[-1].last + 1 == run.first and found[-1].strength == run.strength:
            found[-1] = replace(found[-1], last=run.last)
        else:
            found.append(run)
    return tuple(found)
