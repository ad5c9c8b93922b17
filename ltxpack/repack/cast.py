"""Casts to bfloat16, the only ones the repacker does. numpy is imported when the first tensor needs one.

Rounding is to nearest, ties to even, as torch does it: float64 goes through float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ltxpack.errors import UnsupportedError
from ltxpack.repack.work import Piece

if TYPE_CHECKING:
    import numpy as np

STEP = 256 * 1024
NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
QUIET_NAN = 0x7FC0


def cast_to_bfloat16(data: memoryview, piece: Piece) -> memoryview:
    """Some elements of ``piece`` as bfloat16 bytes. NaN and infinity stay what they are.

    Raises UnsupportedError if a finite value has no finite bfloat16.
    """
    import numpy as np

    values = np.frombuffer(data, dtype=NUMPY_DTYPES[piece.source_dtype])
    out = np.empty(len(values), dtype="<u2")
    for start in range(0, len(values), STEP):
        part = values[start : start + STEP]
        rounded = round_to_bfloat16(part)
        if bool(((rounded & 0x7FFF) == 0x7F80).any()):
            _refuse_overflow(part, rounded, piece)
        out[start : start + STEP] = rounded
    return memoryview(out.view("u1").data)


def round_to_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits (uint16) of ``values`` (any float dtype) rounded to bfloat16."""
    import numpy as np

    with np.errstate(over="ignore"):
        bits = values.astype("<f4").view("<u4")
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded: np.ndarray[Any, Any] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    rounded[nan] = QUIET_NAN
    return rounded


def _refuse_overflow(values: np.ndarray[Any, Any], rounded: np.ndarray[Any, Any], piece: Piece) -> None:
    import numpy as np

    lost = np.isfinite(values) & ((rounded & 0x7FFF) == 0x7F80)
    if bool(lost.any()):
        raise UnsupportedError(
            "holds a value too large for bfloat16",
            file=piece.source,
            tensor=piece.name,
            expected="at most 3.39e38",
            found=float(values[lost][0]),
        )
