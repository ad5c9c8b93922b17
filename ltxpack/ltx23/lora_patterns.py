"""PEFT's rank_pattern and alpha_pattern: the value that they give to a module. Untrusted.

PEFT takes regular expressions. The first one wins that matches a module's name, or the part after one of its dots, to
the end. Here a pattern must be a plain name, because no expression of a stranger is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ltxpack.errors import AdapterError

# Longer than any name of a module.
MAX_PATTERN = 512
# The most different places of dots in a file's patterns: a name is compared once for each. One pattern for each linear
# of the published transformer makes 42.
MAX_MASKS = 128
_PLAIN = re.compile(r"(\^?)([A-Za-z0-9_-]+(?:\\?\.[A-Za-z0-9_-]+)*)\$?")

Mask = tuple[int, ...]
"""The places of a pattern's unescaped dots, each of which matches any one character, as in a regular expression."""


class Patterns:
    """A table of patterns: names, or endings of them that begin after a dot, with ``^`` before a whole name.

    Raises AdapterError for any richer pattern, naming it.
    """

    def __init__(self, table: Mapping[str, float], name: str = "", file: Path | None = None) -> None:
        self.name = name
        self._count = len(table)
        self._known: dict[str, list[tuple[int, str, float]]] = {}
        # (whole name only, length) -> places of dots -> the text with dots there -> number, pattern and value
        self._entries: dict[tuple[bool, int], dict[Mask, dict[str, tuple[int, str, float]]]] = {}
        for number, (pattern, value) in enumerate(table.items()):
            plain = _PLAIN.fullmatch(pattern)
            if plain is None or len(pattern) > MAX_PATTERN:
                raise AdapterError(
                    f"{name} has a pattern that is no plain module name", file=file, found=pattern[:80],
                    expected="a module's name or an ending of it, such as attn1.to_q",
                    next=f"write plain module names in {name}",
                )  # fmt: skip
            text = plain[2].replace("\\.", "\0")
            mask = tuple(i for i, letter in enumerate(text) if letter == ".")
            masks = self._entries.setdefault((bool(plain[1]), len(text)), {})
            masks.setdefault(mask, {}).setdefault(text.replace("\0", "."), (number, pattern, value))
        if sum(map(len, self._entries.values())) > MAX_MASKS:
            raise AdapterError(f"{name} has too many patterns of different forms", file=file, expected=MAX_MASKS)

    def __bool__(self) -> bool:
        return self._count > 0

    def find(self, names: Sequence[str], default: float | None) -> float | None:
        """The value for a module that may be called any of ``names`` in the model that PEFT wrapped."""
        return min(self._matches(names), key=lambda entry: entry[0], default=(0, "", default))[2]

    def values(self, names: Sequence[str]) -> set[float | None]:
        """The values of all matching patterns: PEFT sorts patterns when it saves them, so the first may be another."""
        return {value for _, _, value in self._matches(names)}

    def unused(self, modules: Iterable[Sequence[str]]) -> list[str]:
        """The patterns that match none of ``modules``, each given by its names."""
        used = {number for names in modules for number, _, _ in self._matches(names)}
        entries = [entry for masks in self._entries.values() for table in masks.values() for entry in table.values()]
        return [pattern for number, pattern, _ in sorted(entries) if number not in used]

    def _matches(self, names: Sequence[str]) -> Iterator[tuple[int, str, float | None]]:
        for name in names:
            if name not in self._known:
                self._known[name] = list(self._entries_of(name))
            yield from self._known[name]

    def _entries_of(self, name: str) -> Iterator[tuple[int, str, float]]:
        for at in (0, *(i + 1 for i, letter in enumerate(name) if letter == ".")):
            for whole in (True, False) if at == 0 else (False,):
                for mask, table in self._entries.get((whole, len(name) - at), {}).items():
                    text = list(name[at:])
                    for place in mask:
                        text[place] = "."
                    if (entry := table.get("".join(text))) is not None:
                        yield entry
