r"""PEFT's ``rank_pattern`` and ``alpha_pattern``: which entry of such a table holds for a module. Untrusted.

PEFT matches ``(.*\.)?(PATTERN)$`` with every module's name, and the first pattern that matches wins. Nearly all are
plain names; those are looked up, a dot in them being a dot. The others may use a part of regular expressions:
characters, ``.``, ``\d`` and its like, classes, alternatives, one level of groups, and ``*``, ``+``, ``?`` behind one
character. All of a table's become one automaton of positions (Glushkov's), which reads a name once and never goes
back. Its work is counted, and bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from ltxpack.errors import AdapterError

MAX_PATTERNS = 50_000
MAX_EXPRESSIONS = 100
MAX_LENGTH = 512
MAX_REPEATS = 4
MAX_POSITIONS = 4096
# Fifty expressions take 200,000 steps over all modules of the 22B transformer, a third of a microsecond each.
MAX_STEPS = 1_000_000
# What else is counted, in steps: looking up one plain ending; a transition and a state not met before.
_ENDING, _TRANSITION, _STATE = 2, 10, 100
# The edges of a name are read like characters, by positions that read nothing else.
_START, _END = "start", "end"

_PLAIN = re.compile(r"(\^?)([A-Za-z0-9_-]+(?:\\?\.[A-Za-z0-9_-]+)*)\$?")
_TOKEN = re.compile(
    r"(?:(?P<letter>[^\\.\[\](){}*+?|^$\s]|\\[^A-Za-z0-9\s])"
    r"|(?P<class>\.|\\[dDsSwW]|\[\^?(?:[A-Za-z0-9]-[A-Za-z0-9]|[A-Za-z0-9_.!]|\\[dDsSwW.-])+-?\])"
    r")(?P<repeat>[*+?]?)\??"
    r"|(?P<group>\((?:\?:)?)|(?P<close>\)(?![*+?{]))|(?P<bar>\|)|(?P<start>\A\^)|(?P<end>\$\Z)"
)

_Value = TypeVar("_Value")


class PatternTable(Generic[_Value]):
    """The values of one field, by pattern. Raises AdapterError for a pattern that is not matched here."""

    def __init__(self, table: Mapping[str, _Value], name: str = "", file: Path | None = None) -> None:
        self._name, self._file = name, file
        self._values = list(table.values())
        self._plain: dict[str, int] = {}
        self._expressions = Automaton()
        self._lookups = 0
        if len(table) > MAX_PATTERNS:
            self._refuse("has too many patterns", f"at most {MAX_PATTERNS}", str(len(table)))
        for number, pattern in enumerate(table):
            plain = _PLAIN.fullmatch(pattern)
            if plain is not None and len(pattern) <= MAX_LENGTH:
                self._plain.setdefault(plain[1] + plain[2].replace("\\", ""), number)
            else:
                self._add(number, pattern)

    def __bool__(self) -> bool:
        return bool(self._values)

    @property
    def steps(self) -> int:
        """The work done so far."""
        return _ENDING * self._lookups + self._expressions.steps

    def find(self, module: str, default: _Value | None) -> _Value | None:
        """The value for ``module``, or ``default``. Raises AdapterError if matching becomes too much work."""
        none = len(self._values)
        first = min(self._plain.get(ending, none) for ending in _endings(module))
        self._lookups += module.count(".") + 2
        if self._expressions:
            first = min(first, self._expressions.first(module, none))
        if self.steps > MAX_STEPS:
            self._refuse("takes too much work to match", f"at most {MAX_STEPS} steps for all modules", "more")
        return self._values[first] if first < none else default

    def _add(self, number: int, pattern: str) -> None:
        try:
            self._expressions.add(number, pattern)
        except ValueError as error:
            expected = rf"a module's name, or one with . \. \d [a-z] (a|b) and up to {MAX_REPEATS} of * + ?"
            self._refuse(f"has a pattern that is not matched here: {error}", expected, pattern[:80])

    def _refuse(self, problem: str, expected: str, found: str) -> NoReturn:
        raise AdapterError(
            f"{self._name} {problem}", file=self._file, expected=expected, found=found,
            next=f"write plain module names in {self._name}",
        )  # fmt: skip


def _endings(module: str) -> Iterator[str]:
    """What a plain pattern may be: all of the name, as such and from its start, and what follows each dot."""
    yield "^" + module
    at = 0
    while True:
        yield module[at:]
        at = module.find(".", at) + 1
        if at == 0:
            return


@dataclass(frozen=True)
class _Part:
    """A piece of an expression: the positions it may begin and end with (as bits), and whether it may be empty."""

    first: int = 0
    last: int = 0
    empty: bool = True

    def __or__(self, other: _Part) -> _Part:
        return _Part(self.first | other.first, self.last | other.last, self.empty or other.empty)


@dataclass(eq=False)
class _State:
    """``reach``: the positions that may read the next character; ``number``: what has matched if the name ends here."""

    reach: int
    number: int | None
    after: dict[str, _State] = field(default_factory=dict)


class Automaton:
    """Expressions of the subset, matched together. A position is one character (or class) of one of them.

    States are made when a name first needs them. ``steps`` is the work done so far.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._follow: list[int] = []
        self._letters: dict[str, int] = {}
        self._classes: dict[re.Pattern[str], int] = {}
        self._starts = 0
        self._ends: dict[int, int] = {}
        self._readers: dict[str, int] = {}
        self._states: dict[tuple[int, int | None], _State] = {}
        self._begin: _State | None = None

    def __bool__(self) -> bool:
        return bool(self._ends)

    def add(self, number: int, pattern: str) -> None:
        """One expression more; of those that match, the one with the lowest number counts. Raises ValueError."""
        if len(self._ends) == MAX_EXPRESSIONS:
            raise ValueError(f"more than {MAX_EXPRESSIONS} of the patterns are no plain names")
        if len(pattern) > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH}")
        part = self._read(pattern)
        self._starts |= part.first
        self._ends[number] = part.last

    def first(self, name: str, none: int) -> int:
        """The lowest number of the expressions that match ``name`` or what follows one of its dots, else ``none``."""
        if self._begin is None:
            self._begin = self._next(_State(self._starts, None), _START)
        state = self._begin
        self.steps += len(name)
        for letter in name:
            state = state.after.get(letter) or self._next(state, letter)
            if self.steps > MAX_STEPS:
                return none
        return none if state.number is None else state.number

    def _read(self, pattern: str) -> _Part:
        """``pattern`` as a part; a stack of two levels holds the branches that are done and the one being read."""
        levels = [[_Part(empty=False), _Part()]]
        at, repeats = 0, 0
        while at < len(pattern):
            token = _TOKEN.match(pattern, at)
            if token is None:
                raise ValueError(f"{pattern[at : at + 10]!r} is beyond the expressions known here")
            at = token.end()
            level = levels[-1]
            if token.lastgroup in ("repeat", "start", "end"):
                repeats += bool(token["repeat"])
                level[1] = self._then(level[1], self._one(token))
            elif token["group"] and len(levels) == 1:
                levels.append([_Part(empty=False), _Part()])
            elif token["bar"]:
                level[:] = [level[0] | level[1], _Part()]
            elif token["close"] and len(levels) == 2:
                levels.pop()
                levels[-1][1] = self._then(levels[-1][1], level[0] | level[1])
            else:
                raise ValueError("groups stand within groups, or do not match")
        if repeats > MAX_REPEATS or len(levels) == 2:
            raise ValueError("a group is not closed" if len(levels) == 2 else f"more than {MAX_REPEATS} of * + ?")
        return levels[0][0] | levels[0][1]

    def _one(self, token: re.Match[str]) -> _Part:
        """A position more, for one character, class or edge."""
        if len(self._follow) == MAX_POSITIONS:
            raise ValueError(f"all patterns together are longer than {MAX_POSITIONS}")
        bit = 1 << len(self._follow)
        self._follow.append(bit if token["repeat"] in ("*", "+") else 0)
        if token["class"]:
            try:
                known = re.compile(token["class"])
            except re.error as error:
                raise ValueError(f"{token['class']}: {error}") from None
            self._classes[known] = self._classes.get(known, 0) | bit
        else:
            letter = token["letter"][-1] if token["letter"] else str(token.lastgroup)
            self._letters[letter] = self._letters.get(letter, 0) | bit
        return _Part(bit, bit, token["repeat"] in ("*", "?"))

    def _then(self, one: _Part, other: _Part) -> _Part:
        for position in _bits(one.last):
            self._follow[position] |= other.first
        return _Part(
            one.first | (other.first if one.empty else 0),
            other.last | (one.last if other.empty else 0),
            one.empty and other.empty,
        )

    def _next(self, state: _State, letter: str) -> _State:
        """The state after ``letter``, worked out once."""
        if letter not in self._readers:
            self._readers[letter] = self._reading(letter)
        hit = state.reach & self._readers[letter]
        reach = self._starts if letter in (".", _START) else 0
        self.steps += _TRANSITION + hit.bit_count()
        for position in _bits(hit):
            reach |= self._follow[position]
        ended = hit | (reach & self._letters.get(_END, 0))
        number = next((number for number, last in self._ends.items() if ended & last), None)
        if (reach, number) not in self._states:
            self.steps += _STATE
            self._states[reach, number] = _State(reach, number)
        found = state.after[letter] = self._states[reach, number]
        return found

    def _reading(self, letter: str) -> int:
        """The positions that read ``letter``; Python's own classes say which."""
        reading = self._letters.get(letter, 0)
        if letter not in (_START, _END):
            self.steps += len(self._classes)
            for known, positions in self._classes.items():
                reading |= positions if known.fullmatch(letter) else 0
        return reading


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
