"""Parses JSON from outside and counts its values first, so that no document costs seconds or gigabytes. Knows no files.

A comma precedes every value but the first of its container, and a bracket opens every container. So two counts bound
the result of a parser. Commas and brackets inside strings count too, which errs on the safe side.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from ltxpack.errors import clipped

MAX_DEPTH = 64
LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Limits:
    """Limits of a document. A header of 50,000 tensors, eight times the real one, fits the default."""

    values: int = 400_000
    containers: int = 150_000


USUAL = Limits()


class JsonFault(ValueError):
    """The reason for refusing a text; the words follow the name of its file."""


def parse(data: bytes, limits: Limits = USUAL, *, any_number: bool = False) -> Any:
    """Parse JSON as serde_json does (no NaN, no lone surrogates), without duplicate keys, at most 64 levels deep.

    It refuses integers beyond 64 bits and floats beyond a double. With ``any_number`` it takes every number that Python
    takes: libraries write "no limit" as 10**30 and Infinity. Raises JsonFault.
    """
    refuse_crowded(data, limits)
    checks: dict[str, Any] = {"parse_int": _integer, "parse_float": _float, "parse_constant": _constant}
    try:
        text = data.decode("utf-8")
        document = json.loads(text, object_pairs_hook=_object, **({} if any_number else checks))
        if LONE_SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise JsonFault(f"is nested deeper than {MAX_DEPTH}") from None
    except UnicodeError:
        raise JsonFault("is not UTF-8 text") from None
    except ValueError as error:
        raise JsonFault(f"is not sound JSON: {clipped(str(error), 120)}") from None
    if _too_deep(document):
        raise JsonFault(f"is nested deeper than {MAX_DEPTH}")
    return document


def refuse_crowded(data: bytes, limits: Limits = USUAL) -> None:
    """Raise JsonFault if ``data`` (one document or many) exceeds ``limits``."""
    if data.count(b",") > limits.values or data.count(b"[") + data.count(b"{") > limits.containers:
        raise JsonFault(
            f"has too many values to be sound: more than {limits.values}, or {limits.containers} lists and objects"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {clipped(ascii(twice), 120)} is twice in one object")
    return found


def _integer(text: str) -> int | float:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**64:
        raise ValueError("an integer is beyond 64 bits")
    return -0.0 if text == "-0" else value


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is beyond a double")
    return value


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _too_deep(document: Any) -> bool:
    layer = [document]
    for _ in range(MAX_DEPTH + 1):
        layer = [node for node in layer if isinstance(node, (dict, list))]
        if not layer:
            return False
        layer = [item for node in layer for item in (node.values() if isinstance(node, dict) else node)]
    return True
