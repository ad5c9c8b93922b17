"""The files to write and the sources of their bytes, as frozen values made before any byte moves.

Pure: this module reads no source. An item names its place in the overlay (``path``: relative, with ``/``) and knows its
size in advance. A ``TensorSpec`` describes a tensor; a producer makes its bytes: a copied range or a cast to bfloat16.
Other rooms add producers of their own. A producer may make several tensors at once and may read all of its sources
before it yields a byte, as a quantised weight and its scale need. Shard names and index follow diffusers (spec 01,
section 5): one file without an index, or ``-0000i-of-0000n`` with one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from blake3 import blake3

from ltxpack.errors import UnsupportedError, UsageError
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import DTYPE_BITS, TensorInfo, build_header, tensor_nbytes
from ltxpack.manifest import FileRecord

if TYPE_CHECKING:
    import numpy as np

PT_FORMAT: Mapping[str, str] = MappingProxyType({"format": "pt"})
DEFAULT_STEM = "diffusion_pytorch_model"
INDEX_ENDING = ".safetensors.index.json"
DEFAULT_MAX_SHARD_SIZE = 5_000_000_000
Buffer = memoryview | bytes | bytearray
STEP = 256 * 1024
# The dtypes that can be cast.
NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
QUIET_NAN = 0x7FC0


# The tensors of a shard


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as the file stores it; ``dtype`` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


class Producer(Protocol):
    """Makes the bytes of tensors. A frozen dataclass: its fields and the sources' content determine the bytes."""

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The ranges that it reads, in this order."""

    def make(self, data: Iterator[memoryview]) -> Iterator[Buffer]:
        """Yield the bytes of its tensors in their order.

        ``data`` gives the bytes of ``ranges`` in parts of at most 4 MB; a part stays valid until the producer asks for
        the next one. Within a range every part but the last is a multiple of 8 bytes long.
        """


@dataclass(frozen=True, slots=True)
class Copied:
    """The bytes of ``source``, unchanged."""

    source: Range

    @property
    def ranges(self) -> tuple[Range, ...]:
        return (self.source,)

    def make(self, data: Iterator[memoryview]) -> Iterator[Buffer]:
        return data


@dataclass(frozen=True, slots=True)
class Cast:
    """The values of ``source``, stored as ``dtype``, rounded to bfloat16 (to nearest, ties to even, as torch does it).

    float64 goes through float32. NaN and infinity stay.
    """

    source: Range
    dtype: str
    name: str

    @property
    def ranges(self) -> tuple[Range, ...]:
        return (self.source,)

    def make(self, data: Iterator[memoryview]) -> Iterator[Buffer]:
        """Raises UnsupportedError if a finite value has no finite bfloat16."""
        return map(self._rounded, data)

    def _rounded(self, data: memoryview) -> Buffer:
        import numpy as np

        values = np.frombuffer(data, dtype=NUMPY_DTYPES[self.dtype])
        out = np.empty(len(values), dtype="<u2")
        for start in range(0, len(values), STEP):
            part = values[start : start + STEP]
            rounded = round_to_bfloat16(part)
            infinite = (rounded & 0x7FFF) == 0x7F80
            if bool(infinite.any()) and len(lost := part[infinite & np.isfinite(part)]):
                problem, most, path = "holds a value too large for bfloat16", "at most 3.39e38", self.source.path
                raise UnsupportedError(problem, file=path, tensor=self.name, expected=most, found=float(lost[0]))
            out[start : start + STEP] = rounded
        return memoryview(out.view("u1").data)


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """Adjacent tensors of a shard, and the producer of their bytes."""

    tensors: tuple[TensorSpec, ...]
    producer: Producer

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def stored_tensor(name: str, info: TensorInfo, source: Path, dtype: str | None = None) -> ShardEntry:
    """The tensor ``info`` of ``source``, stored as ``name``; a float of another dtype is cast if ``dtype`` is BF16."""
    range_ = Range(source, info.start, info.nbytes)
    producer = Copied(range_) if dtype in (None, info.dtype) else Cast(range_, info.dtype, name)
    return ShardEntry((TensorSpec(name, dtype or info.dtype, info.shape),), producer)


def round_to_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits (uint16) of ``values`` (any float dtype) rounded to bfloat16."""
    import numpy as np

    with np.errstate(over="ignore"):
        bits = values.astype("<f4").view("<u4")
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded: np.ndarray[Any, Any] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    rounded[nan] = QUIET_NAN
    return rounded


# The files


@dataclass(frozen=True)
class WriteShard:
    """A safetensors file made of ``entries``, in this order."""

    path: str
    entries: tuple[ShardEntry, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: PT_FORMAT)

    @property
    def tensors(self) -> Iterator[TensorSpec]:
        return (tensor for entry in self.entries for tensor in entry.tensors)

    @functools.cached_property
    def header(self) -> bytes:
        return build_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors), self.metadata)

    @functools.cached_property
    def size(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class CopyFile:
    """A file that the overlay takes unchanged: reflinked, hard-linked or copied."""

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
        return len(self.data)


# The plan holds a relative symlink inside the overlay as its own record, because its target is known.
LinkFile = FileRecord
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
    """Identifies a plan, for resume: a hash of the items, and of the present size and time of every source.

    ``extra``: other inputs of the bytes (rule, strengths, …), as JSON values. No overlay holds a fingerprint.
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

    Entries keep the given order; an entry larger than the limit has a shard to itself. ``folder`` is relative to the
    overlay ("" for its root). No name may occur twice. Raises UsageError for a limit below 1.
    """
    if max_shard_size < 1:
        raise UsageError("a shard must hold at least one byte", expected="1 or more", found=max_shard_size)
    groups = _split_by_size(entries, max_shard_size)
    count = len(groups)
    endings = [""] if count == 1 else [f"-{number:05d}-of-{count:05d}" for number in range(1, count + 1)]
    names = [f"{stem}{ending}.safetensors" for ending in endings]
    prefix = f"{folder}/" if folder else ""
    for group in groups:
        # Wider dtypes first, otherwise in the given order: readers that map the file need aligned offsets.
        group.sort(key=lambda entry: -DTYPE_BITS[entry.tensors[0].dtype])
    shards = tuple(WriteShard(prefix + name, tuple(group)) for name, group in zip(names, groups, strict=True))
    if count == 1:
        return shards
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard.tensors}
    total = sum(entry.nbytes for entry in entries)
    return (*shards, WriteBytes(f"{prefix}{stem}{INDEX_ENDING}", index_bytes(weight_map, total)))


def index_bytes(weight_map: Mapping[str, str], total: int) -> bytes:
    """The index of shards with ``total`` bytes of tensors: tensor name -> file name."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=True) + "\n").encode()


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
