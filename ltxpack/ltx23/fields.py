"""How a table of config fields is applied to a checkpoint's config; it knows no field names.

A config is untrusted and may be of another generation of the model. So each field is either taken over (and
checked), or has the one value that this version converts, or is listed as having no effect on the result.
Anything else is a problem, and all problems are gathered before one error names them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MAX_DIMENSION = 1 << 20
MAX_REPEATS = 1000
MAX_LIST = 64
RESAMPLINGS = 4

# Parameters of a resampling block besides ``multiplier``, each with the only value LTX-2.3 has.
_FIXED_PARAMETERS: Mapping[str, Any] = {"residual": False, "inject_noise": False}

REQUIRED: Final = object()
SAME: Final = object()


class Words(str):
    """What was found, as words instead of a value."""

    __slots__ = ()


ABSENT: Final = Words("no such field")


class UnfitError(Exception):
    """A value that a rule refuses: what was expected, what was found, and where below the field."""

    def __init__(self, expected: str, found: object, where: str = "") -> None:
        super().__init__(expected)
        self.expected, self.found, self.where = expected, found, where


Check = Callable[[Any], Any]


@dataclass(frozen=True)
class Field:
    """``check`` returns the value the targets ``to`` get, or raises UnfitError. ``absent``: the value to assume."""

    check: Check
    to: tuple[str, ...] = ()
    absent: Any = REQUIRED


@dataclass(frozen=True)
class Problem:
    """One field that cannot be converted."""

    field: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, found {self.found}"


@dataclass
class Problems:
    """The problems found so far."""

    found: list[Problem] = field(default_factory=list)

    def add(self, name: str, expected: str, found: object) -> None:
        """Note that field ``name`` does not fit."""
        self.found.append(Problem(name, expected, found if isinstance(found, Words) else shown(found)))


def take(check: Check, *to: str, absent: Any = REQUIRED) -> Field:
    """A field whose value is taken over."""
    return Field(check, to, absent)


def only(value: Any, *to: str, becomes: Any = SAME, optional: bool = False) -> Field:
    """A field with one value that this version converts. An ``optional`` field that is absent means that value."""

    def check(found: Any) -> Any:
        if not same(found, value):
            raise UnfitError(shown(value), found)
        return value if becomes is SAME else becomes

    return Field(check, to, value if optional else REQUIRED)


def same_name(component: str, check: Check, *names: str) -> dict[str, Field]:
    """Fields that are taken over under their own names."""
    return {name: take(check, f"{component}.{name}") for name in names}


def each_only(value: Any, *names: str, optional: bool = False) -> dict[str, Field]:
    """Fields that must have one value and that become nothing."""
    return {name: only(value, optional=optional) for name in names}


def no_effect(*names: str) -> dict[str, Field]:
    """Fields that do not change the result, whatever they hold."""
    return dict.fromkeys(names, Field(lambda found: found, (), None))


def apply_table(
    section: str, config: Mapping[str, Any], table: Mapping[str, Field], problems: Problems
) -> dict[str, Any]:
    """The target fields that ``table`` makes of ``config``; what does not fit goes to ``problems``.

    ``config`` may nest; the table names leaves by dotted path (``model.params.ddconfig.ch``).
    """
    leaves = flatten(config)
    for name in sorted(leaves.keys() - table.keys()):
        problems.add(f"{section}.{name}", "no such field (unknown to this version)", leaves[name])
    taken: dict[str, Any] = {}
    for name, rule in table.items():
        if name not in leaves and rule.absent is REQUIRED:
            problems.add(f"{section}.{name}", _expectation(rule), ABSENT)
            continue
        try:
            value = rule.check(leaves.get(name, rule.absent))
        except UnfitError as unfit:
            problems.add(f"{section}.{name}{unfit.where}", unfit.expected, unfit.found)
            continue
        taken.update(dict.fromkeys(rule.to, value))
    return taken


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
            raise UnfitError(f"a whole number from {low} to {high}", found)
        return int(number)

    return check


dimension = whole(1, MAX_DIMENSION)
repeats = whole(1, MAX_REPEATS)


def positive(found: Any) -> float:
    """A finite number above 0."""
    number = _number(found)
    if number is None or number <= 0:
        raise UnfitError("a number above 0", found)
    return float(number)


def or_none(check: Check) -> Check:
    """``check``, or null as it is."""
    return lambda found: None if found is None else check(found)


def flag(true: Any, false: Any) -> Check:
    """true or false, each with what it becomes."""

    def check(found: Any) -> Any:
        if not isinstance(found, bool):
            raise UnfitError("true or false", found)
        return true if found else false

    return check


def list_of(check: Check, length: int | None = None) -> Check:
    """A list of values that each pass ``check``: ``length`` of them, or 1 to 64."""
    size = f"{length}" if length else f"1 to {MAX_LIST}"

    def check_list(found: Any) -> list[Any]:
        if not isinstance(found, list) or not (len(found) == length if length else 0 < len(found) <= MAX_LIST):
            raise UnfitError(f"a list of {size} values", found)
        values = []
        for position, item in enumerate(found):
            try:
                values.append(check(item))
            except UnfitError as unfit:
                raise UnfitError(unfit.expected, unfit.found, f"[{position}]{unfit.where}") from None
        return values

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
            raise UnfitError(f"a list of {count} blocks", found)
        names, values = [], []
        for position, block in enumerate(found):
            where = f"[{position}]"
            if not (isinstance(block, list) and len(block) == 2 and isinstance(block[1], dict)):
                raise UnfitError("a block: [name, {parameters}]", block, where)
            name, parameters = block
            wanted = ["res_x"] if position % 2 == 0 else sorted(kinds)
            if name not in wanted:
                raise UnfitError(" or ".join(wanted), name, where)
            names.append(kinds.get(name, name))
            values.append(_only_number(parameters, "multiplier" if position % 2 else "num_layers", where))
        return Blocks(tuple(values[::2]), tuple(names[1::2]), tuple(values[1::2]))

    return check


def _only_number(parameters: Mapping[str, Any], wanted: str, where: str) -> int:
    """The parameter ``wanted``; any other must have its fixed value."""
    for name, value in parameters.items():
        if name == wanted or (name in _FIXED_PARAMETERS and same(value, _FIXED_PARAMETERS[name])):
            continue
        expected = shown(_FIXED_PARAMETERS[name]) if name in _FIXED_PARAMETERS else "no such parameter"
        raise UnfitError(expected, value, f"{where}.{name}")
    if wanted not in parameters:
        raise UnfitError("a whole number", ABSENT, f"{where}.{wanted}")
    try:
        return int(whole(0 if wanted == "num_layers" else 1, MAX_REPEATS)(parameters[wanted]))
    except UnfitError as unfit:
        raise UnfitError(unfit.expected, unfit.found, f"{where}.{wanted}") from None


def _number(found: Any) -> float | int | None:
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return found if isinstance(found, int) or math.isfinite(found) else None


def _expectation(rule: Field) -> str:
    try:
        rule.check(REQUIRED)
    except UnfitError as unfit:
        return unfit.expected
    return "a value"
