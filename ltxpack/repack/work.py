"""What will be written, as frozen values made before any byte moves. Pure: no file is touched here.

An item names its place in the overlay (``path``: relative, with ``/``) and knows its size in advance.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from blake3 import blake3

from ltxpack.errors import UnsupportedError
from ltxpack.files.tensorfile import TensorInfo, build_header, tensor_nbytes
from ltxpack.manifest import FileRecord

PT_FORMAT: Mapping[str, str] = MappingProxyType({"format": "pt"})
CASTS = frozenset({("F32", "BF16"), ("F16", "BF16"), ("F64", "BF16")})


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor to be written as ``dtype``, from ``nbytes`` bytes of ``source_dtype`` at ``start`` in ``source``.

    ``dtype`` other than ``source_dtype`` means a cast (round to nearest even); only those in CASTS are known.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Path
    start: int
    nbytes: int
    source_dtype: str

    @property
    def size(self) -> int:
        """Bytes it takes in the file written."""
        return tensor_nbytes(self.dtype, self.shape)

    @property
    def is_cast(self) -> bool:
        """Whether its bytes change on the way."""
        return self.dtype != self.source_dtype


def piece(name: str, info: TensorInfo, source: Path, dtype: str | None = None) -> Piece:
    """``info`` of the file ``source``, to be written as ``name``; ``dtype`` None keeps its own.

    Raises UnsupportedError for a cast that is not one to BF16.
    """
    dtype = dtype or info.dtype
    if dtype != info.dtype and (info.dtype, dtype) not in CASTS:
        raise UnsupportedError(
            "has a dtype that cannot be stored here", file=source, tensor=info.name, expected=dtype, found=info.dtype
        )
    return Piece(name, dtype, info.shape, source, info.start, info.nbytes, info.dtype)


@dataclass(frozen=True)
class WriteShard:
    """A safetensors file made of pieces, in this order."""

    path: str
    pieces: tuple[Piece, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: PT_FORMAT)

    @functools.cached_property
    def header(self) -> bytes:
        """The file's first bytes."""
        return build_header(((piece.name, piece.dtype, piece.shape) for piece in self.pieces), self.metadata)

    @functools.cached_property
    def size(self) -> int:
        """The whole file in bytes."""
        return len(self.header) + sum(piece.size for piece in self.pieces)


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
            for part in item.pieces:
                needed[part.source] = max(needed.get(part.source, 0), part.start + part.nbytes)
    return needed


def fingerprint(items: Sequence[Item], extra: Mapping[str, Any] | None = None) -> str:
    """Tells one plan from another, for resume: the items, and size and time of every source as it is now.

    ``extra``: what else decides the bytes (rule, strengths, …), as JSON values. Stays in the staging folder; it is
    never part of an overlay.
    """
    hasher = blake3()
    for path in sorted(sources(items)):
        status = path.stat()
        hasher.update(json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns]).encode())
    for item in items:
        hasher.update(json.dumps([type(item).__name__, _described(item)], default=str, sort_keys=True).encode())
    hasher.update(json.dumps(extra or {}, sort_keys=True).encode())
    return hasher.hexdigest()


def _described(item: Item) -> Any:
    if isinstance(item, WriteShard):
        return [item.path, sorted(item.metadata.items()), [dataclasses.astuple(part) for part in item.pieces]]
    if isinstance(item, WriteBytes):
        return [item.path, blake3(item.data).hexdigest()]
    return dataclasses.astuple(item)


def numel(shape: tuple[int, ...]) -> int:
    """Elements of a tensor."""
    return math.prod(shape)
