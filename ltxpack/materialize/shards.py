"""Shards by their names, ``STEM-00001-of-00003.safetensors``: which belong together, and which of them are missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
MAX_SHARDS = 1000


@dataclass(frozen=True)
class Shards:
    """One set of shards, in order: the names that are there, and those that are not."""

    there: tuple[str, ...]
    missing: tuple[str, ...]


def shards_of(name: str, names: Iterable[str]) -> Shards | None:
    """The set of shards that ``name`` belongs to among ``names``; None for a file that is no shard."""
    found = SHARD.fullmatch(name)
    count = int(found["count"]) if found else 0
    if found is None or not 0 < int(found["number"]) <= count <= MAX_SHARDS:
        return None
    wanted = [f"{found['stem']}-{number:05d}-of-{found['count']}.safetensors" for number in range(1, count + 1)]
    there = set(names)
    return Shards(tuple(each for each in wanted if each in there), tuple(each for each in wanted if each not in there))
