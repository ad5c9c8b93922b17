"""Safetensors headers, byte ranges and index files. Knows no tensor names.

All input is untrusted. This module refuses what the safetensors library refuses, and also duplicate keys, control
characters and path parts in names, headers over 16 MiB, deep nesting, and integers beyond 64 bits. Each is a
FormatError, found in bounded time and memory.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader, FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeGuard

from ltxpack.errors import AbsentError, FormatError, OtherFormatError, SourceError, clipped
from ltxpack.files import bounded_json
from ltxpack.files.foreign import HEAD_BYTES, lookalike

MAX_HEADER_BYTES = 16 * 1024 * 1024
# An index of 50,000 tensors is some 5 MB.
MAX_INDEX_BYTES = 16 * 1024 * 1024
# The limit for a tokenizer.json, which another library parses; Gemma 3's has 33 MB.
MAX_TOKENIZER_BYTES = 128 * 1024 * 1024
MAX_NAME_LENGTH = 1024
INT64_MAX = 2**63 - 1

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

# Torch's and users' names of the dtypes in which weights are loaded, and the dtypes that a run may cast.
DTYPE_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64",
    "I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool", "I8": "int8", "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32")

FETCH_AGAIN = "fetch or copy the file again"

# Size and time of the last change. Some network filesystems give a file another inode each time.
Stamp = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: ``dtype`` as safetensors spells it, ``start`` the absolute offset of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file by its header; ``tensors`` in order of their offsets.

    ``stamp``: that of the file when its header was read; None for a header from elsewhere.
    """

    path: Path
    size: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    stamp: Stamp | None = None


def stamp_of(fd: int) -> Stamp:
    """Of the open file ``fd``: it changes when its content does."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def read_tensorfile(path: str | os.PathLike[str]) -> TensorFile:
    """The header of ``path``, checked against the file's size. Raises SourceError or FormatError."""
    path = Path(path)
    with open_source(path) as file:
        stamp = stamp_of(file.fileno())
        first = file.read(HEAD_BYTES)
        head = first + file.read(max(0, 8 + header_length(first, stamp[0], path) - len(first)))
    return replace(parse_header(head, stamp[0], path), stamp=stamp)


def header_length(first: bytes, file_size: int, path: str | os.PathLike[str]) -> int:
    """Bytes of JSON that follow the first eight bytes. Raises FormatError if no header fits there.

    ``first``: eight bytes or more; ``HEAD_BYTES`` of them are enough to name every other format.
    """
    length = int.from_bytes(first[:8], "little")
    whole = file_size >= 8 and len(first) >= 8
    fits = whole and 2 <= length <= MAX_HEADER_BYTES and 8 + length <= file_size
    # The length of a small header may look like the start of a pickle.
    begins = whole and first[8:9] in (b"{", b"") and length <= MAX_HEADER_BYTES
    other = None if begins else lookalike(first)
    if fits and other is None:
        return length
    refused = functools.partial(FormatError, "is not a safetensors file", file=path, expected="safetensors")
    if not file_size:
        raise FormatError("is empty", file=path, expected="safetensors", found="0 bytes")
    if not any(first):
        raise refused(found="zeros, as from a download that did not finish", next=FETCH_AGAIN)
    if other is not None:
        raise OtherFormatError(
            "is not a safetensors file", file=path, expected="safetensors", found=other.what, next=other.instead
        )
    if not whole or length < 2:
        raise refused(found=f"{file_size} bytes" if not whole else f"a header of {length} bytes")
    if length > MAX_HEADER_BYTES:
        most, found = f"a header of at most {MAX_HEADER_BYTES} bytes", f"{length} bytes"
        claimed = 8 + length <= file_size and first[8:9] in (b"{", b"")
        problem = "has a header that is too large, perhaps a hostile one" if claimed else "is not a safetensors file"
        raise FormatError(problem, file=path, expected=most, found=found)
    raise truncated(path, 8 + length, file_size)


def parse_header(head: bytes, file_size: int, path: str | os.PathLike[str]) -> TensorFile:
    """The file of ``file_size`` bytes that starts with ``head`` (length, JSON, maybe more). Raises FormatError."""
    length = header_length(head[:HEAD_BYTES], file_size, path)
    if len(head) < 8 + length:
        raise truncated(path, 8 + length, len(head))
    document = parse_json(head[8 : 8 + length], path)
    if not isinstance(document, dict):
        raise FormatError("has a header that is not a JSON object", file=path, found=type(document).__name__)
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise FormatError("has metadata that is not an object of strings", file=path, tensor="__metadata__")
    tensors = sorted(
        (_tensor(name, entry, 8 + length, path) for name, entry in document.items()),
        key=lambda info: (info.start, info.nbytes),
    )
    _check_spans(tensors, 8 + length, file_size, path)
    return TensorFile(
        path=Path(path),
        size=file_size,
        tensors=MappingProxyType({info.name: info for info in tensors}),
        metadata=MappingProxyType(metadata),
    )


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON (padded to 8 bytes) of a file holding ``(name, dtype, shape)`` in this order, without gaps.

    The same input always gives the same bytes. Raises FormatError for what ``parse_header`` would refuse.
    """
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        check_name(name, "header")
        if name in document:
            raise FormatError("is twice in one file", tensor=name)
        start, end = end, end + tensor_nbytes(dtype, shape)
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError("header would be too large", expected=f"at most {MAX_HEADER_BYTES} bytes", found=len(text))
    return len(text).to_bytes(8, "little") + text


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises FormatError for an unknown dtype, an overflow or a broken byte."""
    if dtype not in DTYPE_BITS:
        raise FormatError("unknown dtype", expected=", ".join(DTYPE_BITS), found=_short(dtype))
    count = 1
    for dim in shape:
        count *= dim
        if count > INT64_MAX:
            raise FormatError("has a shape whose size overflows 64 bits", found=_short(list(shape)))
    bits = count * DTYPE_BITS[dtype]
    if bits > INT64_MAX or bits % 8:
        raise FormatError("has a size that is not a whole number of bytes", found=f"{dtype} {_short(list(shape))}")
    return bits // 8


def check_name(name: str, path: str | os.PathLike[str]) -> None:
    """Refuse (FormatError) a tensor name that is empty, too long, unprintable or looks like a path."""
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        problem = "a tensor name is empty, too long, or has control characters"
    elif "/" in name or "\\" in name or ".." in name:
        problem = "a tensor name has path parts"
    else:
        return
    raise FormatError(problem, file=path, found=ascii(_short(name)))


def read_index(path: str | os.PathLike[str]) -> Mapping[str, str]:
    """A ``*.safetensors.index.json``: tensor name → name of a file in the same folder. Raises FormatError."""
    document = read_json(path, MAX_INDEX_BYTES)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise FormatError("is not a shard index", file=path, expected="an object with weight_map")
    for name, value in weight_map.items():
        check_name(name, path)
        if not isinstance(value, str) or not plain_file_name(value) or not value.endswith(".safetensors"):
            raise FormatError(
                "names a shard that is not a plain .safetensors file name in its own folder",
                file=path, tensor=name, found=_short(value),
            )  # fmt: skip
    return MappingProxyType(weight_map)


def plain_file_name(name: str) -> bool:
    """Whether ``name`` names a file in its own folder and nothing else."""
    return 0 < len(name) <= 255 and name.isprintable() and not set(name) & set("/\\:") and name not in (".", "..")


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_HEADER_BYTES, *, any_number: bool = False) -> Any:
    """The JSON document in ``path``. Raises SourceError if it cannot be read, FormatError if it is not sound."""
    with open_source(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise FormatError("is too large", file=path, expected=f"at most {max_bytes} bytes", found=f"{size} bytes")
        data = file.read(size)
    return parse_json(data, path, any_number=any_number)


def parse_json(data: bytes | str, path: str | os.PathLike[str], *, any_number: bool = False) -> Any:
    """JSON within the bounds of ``bounded_json``. Only the error uses ``path``. Raises FormatError."""
    try:
        data = data.encode(errors="surrogatepass") if isinstance(data, str) else data
        return bounded_json.parse(data, any_number=any_number)
    except bounded_json.JsonFault as fault:
        raise FormatError(str(fault), file=path) from None


def open_source(path: Path) -> BinaryIO:
    """Open ``path`` for reading if it is a regular file: a pipe would block. Raises AbsentError or SourceError.

    Reads of the file raise SourceError too, as of a faulty disk.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise AbsentError("does not exist", file=path) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError:
        raise SourceError("is not a path", file=ascii(_short(str(path)))) from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise SourceError("is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file", file=path)
    # A larger buffer would have the system read ahead what others read past the page cache.
    return BufferedReader(_NamedFile(path, fd), status.st_blksize)


class _NamedFile(FileIO):
    """The open file ``path``, whose errors name it."""

    def __init__(self, path: Path, fd: int) -> None:
        super().__init__(fd)
        self._path = path

    def readinto(self, buffer: Any, /) -> int:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise _unreadable(self._path, error) from None

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise _unreadable(self._path, error) from None


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"cannot be read: {error.strerror}", file=path)


@contextmanager
def tensor_reader(path: Path) -> Iterator[Callable[[TensorInfo], bytes]]:
    """What gives the bytes of one small tensor of ``path``. Raises AbsentError or SourceError."""
    with open_source(path) as file:
        yield lambda info: os.pread(file.fileno(), info.nbytes, info.start)


def regular_size(path: Path) -> int:
    """Size of the file at ``path``. Raises AbsentError, or SourceError if it is not a readable regular file."""
    with open_source(path) as file:
        return os.fstat(file.fileno()).st_size


def _tensor(name: str, entry: Any, base: int, path: str | os.PathLike[str]) -> TensorInfo:
    check_name(name, path)
    fault = functools.partial(FormatError, file=path, tensor=name)
    if not isinstance(entry, dict):
        raise fault("is not described by an object", found=_short(entry))
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise fault("has no dtype", found=_short(dtype))
    if not isinstance(shape, list) or not all(_is_size(dim) for dim in shape):
        raise fault("has a shape that is not a list of sizes", found=_short(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise fault("has no sound data_offsets", found=_short(offsets))
    start, end = offsets
    try:
        nbytes = tensor_nbytes(dtype, tuple(shape))
    except FormatError as error:
        raise fault(error.problem, expected=error.expected, found=error.found) from None
    if end - start != nbytes:
        expected = f"{nbytes} bytes for {dtype} {_short(shape)}"
        raise fault("shape and byte range differ", expected=expected, found=f"{end - start} bytes")
    return TensorInfo(name, dtype, tuple(shape), base + start, nbytes)


def _check_spans(tensors: list[TensorInfo], base: int, file_size: int, path: str | os.PathLike[str]) -> None:
    """The tensors, in order of offset, must fill the file from ``base`` to its end."""
    end = base
    for info in tensors:
        if info.start != end:
            problem = "overlaps another tensor" if info.start < end else "leaves a gap before it"
            raise FormatError(
                problem, file=path, tensor=info.name, expected=f"offset {end - base}", found=info.start - base
            )
        end += info.nbytes
    if end > file_size:
        raise truncated(path, end, file_size)
    if end < file_size:
        raise FormatError(
            "has bytes after its last tensor", file=path, expected=f"{end} bytes", found=f"{file_size} bytes"
        )


def truncated(path: str | os.PathLike[str], needed: int, found: int) -> FormatError:
    """The error for a file of ``found`` bytes that must have ``needed``."""
    problem = f"is truncated: {needed - found} bytes are missing"
    return FormatError(
        problem, file=path, expected=f"at least {needed} bytes", found=f"{found} bytes", next=FETCH_AGAIN
    )


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= INT64_MAX


def _short(value: Any) -> str:
    return clipped(str(value), 120)
