"""Strengths and LoRAs in the spelling of other tools: prints the command to type here, before any file is read."""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from decimal import Decimal

import click

from ltxpack.cli import terminal
from ltxpack.errors import UsageError
from ltxpack.manifest import RULES
from ltxpack.strength import Strength

STRENGTH, ADD, LORA = "--strength", "--add", "--lora"

# A corrected word may need another correction: a:1:1. This bounds the rounds.
MOST_ROUNDS = 9

Word = tuple[str | None, str | None]
"""A flag with its value, a flag alone, or an argument: (None, value)."""

# Flag -> what is wrong with what the user wrote, and the right spelling.
_TOLD = {
    STRENGTH: ("each --strength takes one number, with a point", "--strength 0.25 --strength 0.5"),
    ADD: ("--add needs a file and a strength with = between them", "--add FILE=S, such as --add style.safetensors=0.8"),
    LORA: ("--strength gives the strength of the main LoRA", "--lora FILE --strength S"),
}  # fmt: skip
_ONE_STRENGTH = ("one file holds one strength", "one --strength")
_PLAIN = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_LOOSE = re.compile(r"(?P<number>[+-]?(?:\d+[.,]?\d*|[.,]\d+))\s*(?P<percent>%?)")
# A strength behind a file. A name may hold these signs too: a path that exists as typed is a file alone.
_BY_BLOCK = re.compile(r"(?P<file>.+?)(?:=(?=[^=]*\Z)|:(?=[+-]?[\d.]+@))(?P<strength>[^/]*@[^/]*)")
_BEHIND = re.compile(r"(?P<file>.+?)(?:\s*[=:]\s*|(?<=\.safetensors)[\s,;]+)(?P<strength>[+-]?[\d.,]+\s*%?)")


def _stack(ctx: click.Context, param: click.Parameter, typed: tuple[str, ...]) -> tuple[tuple[str, Strength], ...]:
    from ltxpack.lora_bake import parse_added

    return tuple(map(parse_added, typed))


def _blocks(ctx: click.Context, param: click.Parameter, typed: str | None) -> tuple[int, ...] | None:
    from ltxpack.lora_bake import parse_blocks

    return None if typed is None else parse_blocks(typed)


# The options of a bake, by the names of its fields in lora_bake's BakeOptions.
_OPTIONS = (
    click.option(LORA, metavar="FILE", help="Main LoRA instead of the overlay's distilled one."),
    click.option(
        ADD, "added", multiple=True, metavar="FILE=S", callback=_stack,
        help="Stack a LoRA below the main one; repeatable. FILE=S@0-11,30:T: T in these blocks.",
    ),
    click.option(
        "--rule", type=click.Choice(RULES), default=RULES[0], show_default=True,
        help="fp32 rounds once; official repeats the official bf16 arithmetic bit for bit.",
    ),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
        help="The device that computes the sums.",
    ),
    click.option("--allow-unmatched", is_flag=True, help="Leave out keys of a LoRA that match nothing."),
    click.option(
        "--keep-blocks", metavar="N,N|none", callback=_blocks,
        help="Blocks that stay in bf16. [default: 0,1,46,47 of 48]",
    ),
    click.option(
        "--activations", type=terminal.PathType(),
        help="For fp8: take input scales from this file of ltxpack run --save-activations.",
    ),
)  # fmt: skip


def lora_options(command: terminal.Command) -> terminal.Command:
    """Adds the options of a bake that bake-lora and export share."""
    return functools.reduce(lambda made, option: option(made), reversed(_OPTIONS), command)


class StrengthType(click.ParamType[Strength]):
    """A strength: a number, or a number with others for some blocks."""

    name = "S"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Strength:
        """``value`` as a Strength. Raises UsageError for wrong blocks."""
        if isinstance(value, Strength):
            return value
        if "@" in str(value):
            return Strength.parse(str(value))
        try:
            return Strength.of(float(str(value)))
        except ValueError:
            self.fail(f"{value!r} is not a number such as 0.5.", param, ctx)


class LoraCommand(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raises UsageError, with the command to type, for the spelling of another tool."""
        options = [param for param in self.params if isinstance(param, click.Option)]
        valued = {flag for option in options if not option.is_flag for flag in option.opts}
        written = list(_taken_apart(args, valued))
        meant = _meant(written)
        told, strengths = _TOLD, [word for word in meant if word[0] == STRENGTH]
        [option] = [option for option in options if STRENGTH in option.opts]
        if len(strengths) > 1 and not option.multiple:
            meant = [word for i, word in enumerate(meant) if word[0] != STRENGTH or i == meant.index(strengths[0])]
            told = {**_TOLD, STRENGTH: _ONE_STRENGTH}
        if meant != written:
            wrong = [word for word in written if word not in meant] or written
            problem, expected = told.get(wrong[0][0] or STRENGTH, told[STRENGTH])
            meant += _lacking(meant) if option.required else []
            command = f"ltxpack {self.name} {_typed(meant)}"
            raise UsageError(problem, expected=expected, found=_typed(wrong), next=command)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            if error.param is option:
                told_next = f"\n  next: ltxpack {self.name} {_typed([*written, *_lacking(written)])}"
                raise click.MissingParameter(told_next, ctx, option) from None
            raise


def _lacking(words: Sequence[Word]) -> list[Word]:
    """The missing --strength: 0 if there are only added LoRAs, which are then meant alone."""
    flags = {flag for flag, _ in words}
    return [] if STRENGTH in flags else [(STRENGTH, "0" if ADD in flags and LORA not in flags else "1.0")]


def _typed(words: Sequence[Word]) -> str:
    return shlex.join(part for word in words for part in word if part is not None)


def _taken_apart(words: Sequence[str], valued: set[str]) -> Iterator[Word]:
    """Each flag with its value, and each argument; ``valued`` are the flags that take a value."""
    left = list(words[::-1])
    while left:
        word = left.pop()
        flag, equals, value = word.partition("=")
        if flag in valued:
            yield flag, value if equals else left.pop() if left else None
        elif word.startswith("-") and not _numbers(word):
            yield word, None
        else:
            yield None, word


def _meant(words: Sequence[Word]) -> list[Word]:
    """The words in our spelling, corrected until no correction is left."""
    found = list(words)
    for _ in range(MOST_ROUNDS):
        before, found = found, _corrected(found)
        if found == before:
            break
    return found


def _corrected(words: Sequence[Word]) -> list[Word]:
    """One round of corrections.

    A lone number is the strength of the --add before it if that has none; otherwise it lacks its --strength.
    """
    found: list[Word] = []
    for flag, value in words:
        if flag is not None or not value or not _numbers(value) or os.path.exists(value):  # noqa: PTH110
            found.append((flag, value))
        elif found and found[-1][0] == ADD and found[-1][1] and _file_and_strength(found[-1][1])[1] is None:
            found[-1] = (ADD, f"{found[-1][1]}={value}")
        else:
            found.append((STRENGTH, value))
    given = any(flag == STRENGTH for flag, _ in found)
    return [each for word in found for each in _rewritten(*word, given)]


def _rewritten(flag: str | None, value: str | None, given: bool) -> Iterator[Word]:
    """One word in our spelling. ``given``: the command has a --strength."""
    if not value or flag not in (STRENGTH, ADD, LORA):
        yield flag, value
        return
    if flag == STRENGTH:
        yield from ((STRENGTH, number) for number in _numbers(value) or [value])
        return
    file, strength = _file_and_strength(value)
    if flag == LORA:
        yield LORA, file
        if strength is not None and not given:
            yield STRENGTH, strength
    else:
        unreadable = "=" in value and file == value and not os.path.exists(value)  # noqa: PTH110
        yield ADD, value if unreadable else f"{file}={strength or 1}"


def _file_and_strength(text: str) -> tuple[str, str | None]:
    """The file and the strength in a value of --add or --lora."""
    if os.path.exists(text):  # noqa: PTH110
        return text, None
    if by_block := _BY_BLOCK.fullmatch(text):
        return by_block["file"], by_block["strength"]
    found = _BEHIND.fullmatch(text)
    numbers = _numbers(found["strength"]) if found else []
    return (found["file"].strip(), numbers[0]) if found and len(numbers) == 1 else (text.strip(), None)


def _numbers(text: str) -> list[str]:
    """The numbers of ``text`` if it holds nothing else, in float's spelling: ``0,5`` -> 0.5, ``50%`` -> 0.5."""
    if _PLAIN.fullmatch(text):
        return [text]
    loose = _LOOSE.fullmatch(text.strip())
    if loose:
        number = Decimal(loose["number"].replace(",", "."))
        return [f"{(number / 100 if loose['percent'] else number).normalize():f}"]
    parts = [part for part in re.split(r"[\s,;]+", text.strip("[]() ")) if part]
    found = [_numbers(part) for part in parts] if len(parts) > 1 else []
    return [number for numbers in found for number in numbers] if all(found) else []
