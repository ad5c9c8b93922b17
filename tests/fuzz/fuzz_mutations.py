"""Turns valid files into hostile ones: a JSON document changed at one place, or bytes changed anywhere.

Written for safetensors headers, index files, configs and manifests. Knows nothing of ltxpack.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any

# Values as JSON text, so that what Python would not write can be put in too.
ODD_TOKENS = (
    *("null", "true", "false", "0", "-1", "-0", "1", "1.5", "-0.0", "1e308", "1e999", "NaN", "Infinity", "-Infinity"),
    *("2147483648", "1000000000", "9223372036854775807", "9223372036854775808", "18446744073709551616"),
    *("9" * 400, "9" * 4400),
    *('""', '"x"', '"\\u0000"', '"\\ud800"', '"\\u202e"', '"\\n"', '"../../x"', '"/etc/passwd"', '"a\\\\b"', '"C:x"'),
    *('"%s"' % ("x" * 5000), '"F8_E4M3"', '"I64"', '"BF16"', '"x.safetensors"', '"' + "../" * 40 + '"', '"\U0001f600"'),
    *("[]", "{}", "[[]]", '{"a": 1}', "[0, 1]", "[1, 0]", "[" * 100 + "]" * 100, "[" + "0, " * 2000 + "0]"),
    '{"a": ' * 100 + "0" + "}" * 100,
)
ODD_KEYS = (
    *("", "x", "__metadata__", "dtype", "..", "../x", "/x", "a/b", "a\\b", "a\0b", "\ud800", "\u202e", "x" * 2000),
    *("auto_map", "$ref", "__class__", "base", "config", "weight_map", "lora_alpha", "format"),
)
SURROGATE = re.compile("[\ud800-\udfff]")


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
    return encode_basestring_ascii(value) if SURROGATE.search(value) else encode_basestring(value)


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
    _change(container, rng.randrange(len(container)), rng)
    return document


def _change(container: list[Any], place: int, rng: random.Random) -> None:
    """Another value or key at ``place``, or an entry more or less."""
    pairs = isinstance(container, Pairs)
    key, value = container[place] if pairs else ("", container[place])
    change = rng.randrange(11)
    if change < 6:
        value = Token(rng.choice(ODD_TOKENS)) if change < 3 else _near(value, rng)
        container[place] = (key, value) if pairs else value
    elif change == 6:
        del container[place]
    elif change == 7 or (change == 8 and not pairs):
        container.insert(rng.randrange(len(container) + 1), container[place])
    elif change == 8:
        near = _spliced(key, ("x", "/", ".", "\0", "", ".weight"), rng)
        container[place] = (rng.choice((*ODD_KEYS, *[near] * 6)), value)
    elif change == 9:
        other = rng.randrange(len(container))
        other_key, other_value = container[other] if pairs else ("", container[other])
        container[place] = (key, other_value) if pairs else other_value
        container[other] = (other_key, value) if pairs else value
    else:
        odd = Token(rng.choice(ODD_TOKENS))
        container.insert(place, (rng.choice(ODD_KEYS), odd) if pairs else odd)


def _near(value: Any, rng: random.Random) -> Any:
    """A value like ``value``; an odd one in the place of what has none."""
    if isinstance(value, str):
        return _spliced(value, ("", "/", "..", "\0", "é", "9", value), rng)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Token(rng.choice(ODD_TOKENS))
    return rng.choice((value + 1, value - 1, 2 * value, -value, value * 10**6, str(value)))


def _spliced(text: str, letters: tuple[str, ...], rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(letters) + text[at + rng.randrange(2) :]


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
