"""The tensors of a shard and, apart from them, the producers of their bytes: a copied range or a cast to bfloat16.

Other rooms add producers of their own. A producer may make several tensors at once and may read all of its sources
before it yields a byte, as a quantised weight and its scale need. numpy is imported when the first tensor is cast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ltxpack.errors import UnsupportedError
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import TensorInfo, tensor_nbytes

if TYPE_CHECKING:
    import numpy as np

Buffer = memoryview | bytes | bytearray
CASTS = frozenset({("F32", "BF16"), ("F16", "BF16"), ("F64", "BF16")})
STEP = 256 * 1024
NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
QUIET_NAN = 0x7FC0


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as it is stored: ``dtype`` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return tensor_nbytes(self.dtype, self.shape)


class Producer(Protocol):
    """Makes the bytes of tensors. A frozen dataclass: its fields and the sources' content decide the bytes."""

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The bytes it reads, in this order."""

    def make(self, data: Iterator[memoryview]) -> Iterator[Buffer]:
        """Yield the bytes of its tensors in their order.

        ``data`` gives the bytes of ``ranges`` in parts of at most 4 MB; a part is valid until the next one is asked
        for. Within a range every part but the last is a multiple of 8 bytes long.
        """


@dataclass(frozen=True, slots=True)
class Copied:
    """The bytes of ``source``, as they are."""

    source: Range

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The one range."""
        return (self.source,)

    def make(self, data: Iterator[memoryview]) -> Iterator[Buffer]:
        """What is read."""
        return data


@dataclass(frozen=True, slots=True)
class Cast:
    """The values of ``source``, stored as ``dtype``, rounded to bfloat16 (to nearest, ties to even, as torch does it).

    float64 goes through float32. NaN and infinity stay what they are.
    """

    source: Range
    dtype: str
    name: str

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The one range."""
        return (self.source,)

    def make(self, data: Iterator[memoryview]) -> Iterator[Buffer]:
        """The rounded values. Raises UnsupportedError if a finite value has no finite bfloat16."""
        return map(self._rounded, data)

    def _rounded(self, data: memoryview) -> Buffer:
        import numpy as np

        values = np.frombuffer(data, dtype=NUMPY_DTYPES[self.dtype])
        out = np.empty(len(values), dtype="<u2")
        for start in range(0, len(values), STEP):
            part = values[start : start + STEP]
            rounded = round_to_bfloat16(part)
            infinite = (rounded & 0x7FFF) == 0x7F80
            if bool(infinite.any()):
                self._refuse_overflow(part[infinite & np.isfinite(part)])
            out[start : start + STEP] = rounded
        return memoryview(out.view("u1").data)

    def _refuse_overflow(self, lost: np.ndarray[Any, Any]) -> None:
        if len(lost):
            raise UnsupportedError(
                "holds a value too large for bfloat16",
                file=self.source.path,
                tensor=self.name,
                expected="at most 3.39e38",
                found=float(lost[0]),
            )


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """Tensors that follow one another in a shard, and the producer of their bytes."""

    tensors: tuple[TensorSpec, ...]
    producer: Producer

    @property
    def nbytes(self) -> int:
        """Bytes its tensors take in the file."""
        return sum(tensor.nbytes for tensor in self.tensors)


def stored_tensor(name: str, info: TensorInfo, source: Path, dtype: str | None = None) -> ShardEntry:
    """The tensor ``info`` of the file ``source``, stored as ``name``; another ``dtype`` than its own is a cast.

    Raises UnsupportedError for a cast that is not one to BF16.
    """
    dtype = dtype or info.dtype
    spec, range_ = TensorSpec(name, dtype, info.shape), Range(source, info.start, info.nbytes)
    if dtype == info.dtype:
        return ShardEntry((spec,), Copied(range_))
    if (info.dtype, dtype) not in CASTS:
        raise UnsupportedError(
            "has a dtype that cannot be stored here", file=source, tensor=info.name, expected=dtype, found=info.dtype
        )
    return ShardEntry((spec,), Cast(range_, info.dtype, name))


def round_to_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits (uint16) of ``values`` (any float dtype) rounded to bfloat16."""
    import numpy as np

    with np.errstate(over="ignore"):
        bits = values.astype("<f4").view("<u4")
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded: np.ndarray[Any, Any] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    rounded[nan] = QUIET_NAN
    return rounded
