"""The casts equal torch's, bit for bit; what has no finite bfloat16 is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ltxpack.errors import UnsupportedError
from ltxpack.files.reader import Range
from ltxpack.repack.items import STEP, Cast, round_to_bfloat16

DTYPES = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64}


def by_us(values: torch.Tensor, dtype: str) -> torch.Tensor:
    data = values.numpy().tobytes()
    cast = Cast(Range(Path("s.safetensors"), 0, len(data)), dtype, "t")
    made = bytearray(b"".join(cast.make(iter([memoryview(data)]))))
    return torch.frombuffer(made, dtype=torch.bfloat16)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_every_half_precision_value() -> None:
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[~values.isnan()]
    assert same(by_us(values, "F16"), values.to(torch.bfloat16))


def test_random_floats_around_every_exponent_and_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (700_000,), generator=generator).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000
    values = torch.cat([bits, ties, ties + 1, ties - 1]).view(torch.float32)
    values = values[values.to(torch.bfloat16).isfinite()]
    assert len(values) > 2_000_000 > STEP
    assert same(by_us(values, "F32"), values.to(torch.bfloat16))


def test_doubles() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, dtype=torch.float64, generator=generator)
    values = torch.cat(
        [values, values * 1e-300, values * 1e30, torch.tensor([0.0, -0.0, 1 + 2**-8], dtype=torch.float64)]
    )
    assert same(by_us(values, "F64"), values.to(torch.bfloat16))


def test_infinity_and_nan_stay() -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0])
    assert same(by_us(values, "F32")[:2], values[:2].to(torch.bfloat16))
    assert by_us(values, "F32").isnan().tolist() == [False, False, True, False]
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], dtype="<u4").view("<f4")
    assert torch.from_numpy(round_to_bfloat16(odd).view("<i2")).view(torch.bfloat16).isnan().all()


@pytest.mark.parametrize(("dtype", "value"), [("F32", 3.4e38), ("F32", -3.4e38), ("F64", 1e39), ("F64", -1e300)])
def test_overflow_is_refused_by_name(dtype: str, value: float) -> None:
    values = torch.tensor([1.0, value, 2.0], dtype=DTYPES[dtype])
    with pytest.raises(UnsupportedError, match=r"s\.safetensors: t: holds a value too large"):
        by_us(values, dtype)
