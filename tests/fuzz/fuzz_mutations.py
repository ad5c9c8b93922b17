"""Turns valid files into hostile ones: a JSON document changed at one place, or bytes changed anywhere.

Written for safetensors headers, index files, configs and manifests. Knows nothing of ltxpack.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

# Values as JSON text, so that what Python would not write can be put in too.
ODD_TOKENS = (
    *("null", "true", "false", "0", "-1", "-0", "1", "1.5", "-0.0", "1e308", "1e999", "NaN", "Infinity", "-Infinity"),
    *(
        "2147483648",
        "1000000000",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551616",
        "9" * 400,
        "9" * 4400,
    ),
    *('""', '"x"', '"\\u0000"', '"\\ud800"', '"\\u202e"', '"\\n"', '"../../x"', '"/etc/passwd"', '"a\\\\b"', '"C:x"'),
    *('"%s"' % ("x" * 5000), '"F8_E4M3"', '"I64"', '"BF16"', '"x.safetensors"', '"' + "../" * 40 + '"', '"\U0001f600"'),
    *("[]", "{}", "[[]]", '{"a": 1}', "[0, 1]", "[1, 0]", "[" * 100 + "]" * 100, "[" + "0, " * 2000 + "0]"),
    '{"a": ' * 100 + "0" + "}" * 100,
)
ODD_KEYS = (
    *("", "x", "__metadata__", "dtype", "..", "../x", "/x", "a/b", "a\\b", "a\0b", "\ud800", "\u202e", "x" * 2000),
    *("auto_map", "$ref", "__class__", "base", "config", "weight_map", "lora_alpha", "format"),
)


class Pairs(list[tuple[str, Any]]):
    """An object as it stands in the text: a key may stand there twice."""


class Token(str):
    """A value as JSON text."""


def mutate(data: bytes, rng: random.Random) -> bytes:
    """``data`` with something wrong in it: mostly inside its JSON, else any bytes. May be given what it returned."""
    start, end = _json_span(data)
    if end > start and rng.random() < 0.8:
        document = _load(data[start:end])
        if document is not None:
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                document = _changed(document, rng)
            text = _dump(document).encode("utf-8", "surrogatepass")
            head = data[:start]
            if start == 8:
                length = len(text) if rng.random() < 0.95 else rng.choice((0, 1, len(text) + 1, 2**40, 2**64 - 1))
                head = length.to_bytes(8, "little")
            return head + text + data[end:]
    return _bytes_changed(data, rng)


def _json_span(data: bytes) -> tuple[int, int]:
    """Where the JSON stands: the header of a safetensors file, or all of it."""
    if data[:1] in (b"{", b"["):
        return 0, len(data)
    length = int.from_bytes(data[:8], "little")
    return (8, 8 + length) if 8 + length <= len(data) else (0, 0)


def _load(text: bytes) -> Any:
    try:
        return json.loads(text, object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return None


def _dump(value: Any) -> str:
    if isinstance(value, Token):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{_text(key)}:{_dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dump, value)) + "]"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=any("\ud800" <= letter <= "\udfff" for letter in value))


def _containers(document: Any) -> Iterator[list[Any]]:
    if isinstance(document, list):
        yield document
        for item in document:
            yield from _containers(item[1] if isinstance(document, Pairs) else item)


def _changed(document: Any, rng: random.Random) -> Any:
    """The document with one entry of one of its containers changed in place."""
    filled = [container for container in _containers(document) if container]
    if not filled or rng.random() < 0.01:
        return Token(rng.choice(ODD_TOKENS))
    # Deep containers are many; the few above them count as much.
    container = rng.choice(filled[:4] if rng.random() < 0.2 else filled)
    place = rng.randrange(len(container))
    key, value = container[place] if isinstance(container, Pairs) else (None, container[place])
    change = rng.choice(CHANGES)
    change(container, place, key, value, rng)
    return document


def _put(container: list[Any], place: int, key: str | None, value: Any) -> None:
    container[place] = value if key is None else (key, value)


def _odd_value(container: list[Any], place: int, key: str | None, value: Any, rng: random.Random) -> None:
    _put(container, place, key, Token(rng.choice(ODD_TOKENS)))


def _near_value(container: list[Any], place: int, key: str | None, value: Any, rng: random.Random) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _odd_value(container, place, key, value, rng)
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        letters = rng.choice(("", "/", "..", "\0", "é", "9", value))
        return _put(container, place, key, value[:at] + letters + value[at + rng.randrange(2) :])
    return _put(container, place, key, rng.choice((value + 1, value - 1, 2 * value, -value, value * 10**6, str(value))))


def _gone(container: list[Any], place: int, key: str | None, value: Any, rng: random.Random) -> None:
    del container[place]


def _twice(container: list[Any], place: int, key: str | None, value: Any, rng: random.Random) -> None:
    container.insert(rng.randrange(len(container) + 1), container[place])


def _other_key(container: list[Any], place: int, key: str | None, value: Any, rng: random.Random) -> None:
    if key is None:
        return _twice(container, place, key, value, rng)
    at = rng.randrange(len(key) + 1)
    near = key[:at] + rng.choice(("x", "/", ".", "\0", "", ".weight")) + key[at + rng.randrange(2) :]
    return _put(container, place, rng.choice((*ODD_KEYS, near, near, near, near, near, near)), value)


def _swapped(container: list[Any], place: int, key: str | None, value: Any, rng: random.Random) -> None:
    other = rng.randrange(len(container))
    if key is None:
        container[place], container[other] = container[other], value
    else:
        other_key, other_value = container[other]
        container[place], container[other] = (key, other_value), (other_key, value)


def _more(container: list[Any], place: int, key: str | None, value: Any, rng: random.Random) -> None:
    odd = Token(rng.choice(ODD_TOKENS))
    container.insert(place, odd if key is None else (rng.choice(ODD_KEYS), odd))


Change = Callable[[list[Any], int, str | None, Any, random.Random], None]
CHANGES: tuple[Change, ...] = (
    *(_odd_value, _odd_value, _odd_value, _near_value, _near_value, _near_value),
    *(_gone, _twice, _other_key, _swapped, _more),
)


def _bytes_changed(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    length = min(len(data) - at, rng.choice((0, 1, 1, 2, 8, 64, len(data))))
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 64))) + data[at:]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[: at + length] + data[at:]
        case _:
            noise = bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at : at + max(1, length // 8)])
            return data[:at] + noise + data[at + len(noise) :]
