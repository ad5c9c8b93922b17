"""Applies a table of config fields to a checkpoint's config. Knows no field names.

A config is untrusted and may belong to another generation of the model. So a table takes each field over after a check,
or allows the one value that this version converts, or lists the field as without effect. Anything else is a problem;
the caller gathers all problems, and one error names them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

MAX_DIMENSION = 1 << 20
MAX_REPEATS = 1000
MAX_LIST = 64
RESAMPLINGS = 4

SAME: Final = object()
# The value of an absent field. Every check refuses it.
ABSENT: Final = object()


class UnfitError(Exception):
    """A field that cannot be converted: its path, the expected value, and the found one as JSON."""

    def __init__(self, field: str, expected: str, found: object) -> None:
        super().__init__(field, expected, found)
        self.field, self.expected, self.value, self.found = field, expected, found, shown(found)

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, found {self.found}"


Check = Callable[[Any], Any]


@dataclass(frozen=True)
class Field:
    """``check`` returns the value for the targets ``to``, or raises UnfitError.

    ``absent``: the value of an absent field.
    """

    check: Check
    to: tuple[str, ...] = ()
    absent: Any = ABSENT


def take(check: Check, *to: str, absent: Any = ABSENT) -> Field:
    """A field whose value the target takes."""
    return Field(check, to, absent)


def only(value: Any, *to: str, becomes: Any = SAME, optional: bool = False) -> Field:
    """A field with one value that this version converts. An absent ``optional`` field has that value."""

    def check(found: Any) -> Any:
        if not same(found, value):
            raise UnfitError("", shown(value), found)
        return value if becomes is SAME else becomes

    return Field(check, to, value if optional else ABSENT)


def same_name(component: str, check: Check, *names: str) -> dict[str, Field]:
    """Fields that the target takes under their own names."""
    return {name: take(check, f"{component}.{name}") for name in names}


def each_only(value: Any, *names: str, optional: bool = False) -> dict[str, Field]:
    """Fields that must have ``value`` and have no target."""
    return {name: only(value, optional=optional) for name in names}


def no_effect(*names: str) -> dict[str, Field]:
    """Fields that do not change the result, whatever their value."""
    return dict.fromkeys(names, Field(lambda found: found, (), None))


def apply_table(
    section: str, config: Mapping[str, Any], table: Mapping[str, Field], problems: list[UnfitError]
) -> dict[str, Any]:
    """The target fields of ``config`` by ``table``; adds misfits to ``problems``.

    ``config`` may nest; the table names leaves by dotted path (``model.params.ddconfig.ch``).
    """
    leaves = flatten(config)
    problems += (
        UnfitError(f"{section}.{name}", "no such field (unknown to this version)", leaves[name])
        for name in sorted(leaves.keys() - table.keys())
    )
    taken: dict[str, Any] = {}
    for name, rule in table.items():
        try:
            value = _checked(rule.check, leaves.get(name, rule.absent), f"{section}.{name}")
            taken.update(dict.fromkeys(rule.to, value))
        except UnfitError as unfit:
            problems.append(unfit)
    return taken


def _checked(check: Check, found: Any, where: str) -> Any:
    """The result of ``check`` for ``found``, the value of the field ``where``."""
    try:
        return check(found)
    except UnfitError as unfit:
        raise UnfitError(where + unfit.field, unfit.expected, unfit.value) from None


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one mapping by dotted path. An empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    waiting = [("", config)]
    while waiting:
        prefix, mapping = waiting.pop()
        for name, value in mapping.items():
            if isinstance(value, Mapping) and value:
                waiting.append((f"{prefix}{name}.", value))
            else:
                leaves[prefix + name] = value
    return leaves


def shown(value: object) -> str:
    """``value`` as JSON, cut to a readable length."""
    if value is ABSENT:
        return "no such field"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = str(type(value))
    return text if len(text) <= 120 else text[:117] + "..."


def same(found: Any, value: Any) -> bool:
    """JSON equality: numbers by value, but true is not 1."""
    if isinstance(found, bool) or isinstance(value, bool):
        return found is value
    if isinstance(found, list) and isinstance(value, list):
        return len(found) == len(value) and all(map(same, found, value))
    return bool(found == value)


def whole(low: int, high: int) -> Check:
    """Whole numbers from ``low`` to ``high`` (``2.0`` is read as 2)."""

    def check(found: Any) -> int:
        number = _number(found)
        if number is None or number != int(number) or not low <= number <= high:
            raise UnfitError("", f"a whole number from {low} to {high}", found)
        return int(number)

    return check


dimension = whole(1, MAX_DIMENSION)
repeats = whole(1, MAX_REPEATS)


def positive(found: Any) -> float:
    """A finite number above 0."""
    number = _number(found)
    if number is None or number <= 0:
        raise UnfitError("", "a number above 0", found)
    return float(number)


def or_none(check: Check) -> Check:
    """``check``, which also lets null pass."""
    return lambda found: None if found is None else check(found)


def flag(true: Any, false: Any) -> Check:
    """true or false, each with its target value."""

    def check(found: Any) -> Any:
        if not isinstance(found, bool):
            raise UnfitError("", "true or false", found)
        return true if found else false

    return check


def list_of(check: Check, length: int | None = None) -> Check:
    """A list of values that each pass ``check``: ``length`` of them, or 1 to 64."""
    size = f"{length}" if length else f"1 to {MAX_LIST}"

    def check_list(found: Any) -> list[Any]:
        if not isinstance(found, list) or not (len(found) == length if length else 0 < len(found) <= MAX_LIST):
            raise UnfitError("", f"a list of {size} values", found)
        return [_checked(check, item, f"[{position}]") for position, item in enumerate(found)]

    return check_list


@dataclass(frozen=True)
class Blocks:
    """``layers`` (one more than resamplings), ``kinds`` and ``multipliers`` of the resamplings; in listed order."""

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    multipliers: tuple[int, ...]


def block_list(kinds: Mapping[str, str]) -> Check:
    """Check for ``[["res_x", {"num_layers": n}], [<a name in kinds>, {"multiplier": m}], …, ["res_x", …]]``."""

    def check(found: Any) -> Blocks:
        count = 2 * RESAMPLINGS + 1
        if not isinstance(found, list) or len(found) != count:
            raise UnfitError("", f"a list of {count} blocks", found)
        steps = [_block({"res_x": "res_x"}, "num_layers", 0), _block(kinds, "multiplier", 1)]
        blocks = [_checked(steps[position % 2], block, f"[{position}]") for position, block in enumerate(found)]
        names, numbers = zip(*blocks, strict=True)
        return Blocks(numbers[::2], names[1::2], numbers[1::2])

    return check


def _block(names: Mapping[str, str], number: str, low: int) -> Check:
    """Check for ``[<a name in names>, {<number>: n}]``. Other parameters must have the only value LTX-2.3 has."""
    table = {number: take(whole(low, MAX_REPEATS), number)}
    table |= each_only(False, "residual", "inject_noise", optional=True)

    def check(found: Any) -> tuple[str, int]:
        if not (isinstance(found, list) and len(found) == 2 and isinstance(found[1], dict)):
            raise UnfitError("", "a block: [name, {parameters}]", found)
        name, parameters = found
        if not isinstance(name, str) or name not in names:
            raise UnfitError("", " or ".join(sorted(names)), name)
        problems: list[UnfitError] = []
        taken = apply_table("", parameters, table, problems)
        if problems:
            raise problems[0]
        return names[name], taken[number]

    return check


def _number(found: Any) -> float | int | None:
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return found if isinstance(found, int) or math.isfinite(found) else None
