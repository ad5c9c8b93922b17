"""The files that will be written, as frozen values made before any byte moves, and which tensor goes into which shard.

Pure: no source is read here. An item names its place in the overlay (``path``: relative, with ``/``) and knows its size
in advance. Shard names and index follow diffusers (spec 01, section 5): one file without an index, or
``-0000i-of-0000n`` with one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from blake3 import blake3

from ltxpack.errors import FormatError, UsageError
from ltxpack.files.tensorfile import DTYPE_BITS, build_header
from ltxpack.manifest import FileRecord
from ltxpack.repack.tensors import ShardEntry, TensorSpec

PT_FORMAT: Mapping[str, str] = MappingProxyType({"format": "pt"})
DEFAULT_STEM = "diffusion_pytorch_model"
DEFAULT_MAX_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class WriteShard:
    """A safetensors file made of ``entries``, in this order."""

    path: str
    entries: tuple[ShardEntry, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: PT_FORMAT)

    @property
    def tensors(self) -> Iterator[TensorSpec]:
        """Its tensors in the order of the file."""
        return (tensor for entry in self.entries for tensor in entry.tensors)

    @functools.cached_property
    def header(self) -> bytes:
        """The file's first bytes."""
        return build_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors), self.metadata)

    @functools.cached_property
    def size(self) -> int:
        """The whole file in bytes."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class CopyFile:
    """A file taken over as it is: reflinked, hard-linked or copied."""

    path: str
    source: Path
    size: int


@dataclass(frozen=True)
class WriteBytes:
    """A small file from memory."""

    path: str
    data: bytes

    @property
    def size(self) -> int:
        """The whole file in bytes."""
        return len(self.data)


@dataclass(frozen=True)
class LinkFile:
    """A relative symlink inside the overlay to a file whose record is known; ``target`` as stored in the link."""

    path: str
    target: str
    size: int
    blake3: str

    def record(self) -> FileRecord:
        """How the manifest lists it."""
        return FileRecord(self.path, self.size, self.blake3, self.target)


Item = WriteShard | CopyFile | WriteBytes | LinkFile


def sources(items: Iterable[Item]) -> dict[Path, int]:
    """Every file the items read → bytes it must have at least."""
    needed: dict[Path, int] = {}
    for item in items:
        if isinstance(item, CopyFile):
            needed[item.source] = max(needed.get(item.source, 0), item.size)
        elif isinstance(item, WriteShard):
            for source in (source for entry in item.entries for source in entry.producer.ranges):
                needed[source.path] = max(needed.get(source.path, 0), source.start + source.nbytes)
    return needed


def fingerprint(items: Sequence[Item], extra: Mapping[str, Any] | None = None) -> str:
    """Tells one plan from another, for resume: the items, and size and time of every source as it is now.

    ``extra``: what else decides the bytes (rule, strengths, …), as JSON values. The fingerprint stays in the staging
    folder; it is never part of an overlay.
    """
    hasher = blake3()
    for path in sorted(sources(items)):
        status = path.stat()
        hasher.update(json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns]).encode())
    for item in items:
        hasher.update(repr(item).encode())
    hasher.update(json.dumps(extra or {}, sort_keys=True).encode())
    return hasher.hexdigest()


def assign_shards(
    entries: Sequence[ShardEntry], max_shard_size: int, folder: str, stem: str = DEFAULT_STEM
) -> tuple[WriteShard | WriteBytes, ...]:
    """Shards of at most ``max_shard_size`` tensor bytes each, then the index if there are several.

    Entries are taken in the given order; an entry larger than the limit has a shard to itself. ``folder`` is relative
    to the overlay ("" for its root). Raises UsageError for a limit below 1, FormatError for a name used twice.
    """
    if max_shard_size < 1:
        raise UsageError("a shard must hold at least one byte", expected="1 or more", found=max_shard_size)
    _refuse_twice(entries)
    groups = _split_by_size(entries, max_shard_size)
    count = len(groups)
    endings = [""] if count == 1 else [f"-{number:05d}-of-{count:05d}" for number in range(1, count + 1)]
    names = [f"{stem}{ending}.safetensors" for ending in endings]
    prefix = f"{folder}/" if folder else ""
    shards = tuple(WriteShard(prefix + name, _aligned_order(group)) for name, group in zip(names, groups, strict=True))
    if count == 1:
        return shards
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard.tensors}
    total = sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    data = (json.dumps(index, indent=2, ensure_ascii=True) + "\n").encode()
    return (*shards, WriteBytes(f"{prefix}{stem}.safetensors.index.json", data))


def _split_by_size(entries: Iterable[ShardEntry], limit: int) -> list[list[ShardEntry]]:
    """Consecutive runs of at most ``limit`` bytes (a larger entry is a run of its own); at least one run."""
    groups: list[list[ShardEntry]] = [[]]
    used = 0
    for entry in entries:
        if groups[-1] and used + entry.nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += entry.nbytes
    return groups


def _aligned_order(entries: Iterable[ShardEntry]) -> tuple[ShardEntry, ...]:
    """Wider dtypes first, else the given order: readers that map the file need offsets that fit the dtype."""
    return tuple(sorted(entries, key=lambda entry: -DTYPE_BITS[entry.tensors[0].dtype]))


def _refuse_twice(entries: Sequence[ShardEntry]) -> None:
    seen: set[str] = set()
    for entry in entries:
        for tensor in entry.tensors:
            if tensor.name in seen:
                raise FormatError("is in one folder twice", file=entry.producer.ranges[0].path, tensor=tensor.name)
            seen.add(tensor.name)
