"""LoRA files from the internet: whatever the header says, the answer is an adapter or one message, and quickly."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_support import save, shapes

from ltxpack.errors import LtxpackError
from ltxpack.lora_bake.adapter import open_adapter
from ltxpack.lora_bake.find import all_finite
from ltxpack.lora_bake.stream import DTYPES

SHAPES = shapes()
WRAPPED = "base_model.model.transformer_blocks.0.attn1.to_q"
PAIR = {f"{WRAPPED}.lora_A.weight": torch.ones(4, 32), f"{WRAPPED}.lora_B.weight": torch.ones(32, 4)}


@pytest.mark.parametrize("where", ["weights", "config"])
def test_links_out_of_a_peft_folder_are_read_but_never_written(where: str, tmp_path: Path) -> None:
    """A hub cache's snapshot is made of links; they are followed for reading."""
    real, folder = tmp_path / "blobs", tmp_path / "snapshot"
    real.mkdir()
    folder.mkdir()
    save(real / "a", PAIR)
    (real / "b").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    for name, blob in (("adapter_model.safetensors", "a"), ("adapter_config.json", "b")):
        (folder / name).symlink_to(real / blob)
    assert open_adapter(folder, SHAPES).factor == 2.0
    (real / ("a" if where == "weights" else "b")).unlink()
    with pytest.raises(LtxpackError):
        open_adapter(folder, SHAPES)


def test_ten_thousand_foreign_targets_are_judged_in_time(tmp_path: Path) -> None:
    names = [f"diffusion_model.blocks.{i}.attn.lora_{letter}.weight" for i in range(10_000) for letter in "AB"]
    save(tmp_path / "x.safetensors", dict.fromkeys(names, torch.ones(1, 1)))
    started = time.perf_counter()
    with pytest.raises(LtxpackError, match="another model"):
        open_adapter(tmp_path / "x.safetensors", SHAPES)
    assert time.perf_counter() - started < 10


@settings(deadline=None)
@given(st.sampled_from(sorted(DTYPES)), st.binary(min_size=8, max_size=64))
def test_a_value_is_finite_where_torch_says_so(dtype: str, drawn: bytes) -> None:
    data = bytearray(drawn[: len(drawn) // 8 * 8])
    values = torch.frombuffer(data, dtype=DTYPES[dtype])
    assert all_finite(memoryview(data), dtype) == bool(torch.isfinite(values.double()).all())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 1, 200_000, 299_999])
def test_one_bad_value_among_many_is_found(dtype: str, value: float, at: int) -> None:
    values = torch.ones(300_000).to(DTYPES[dtype])
    assert all_finite(values.view(torch.uint8).numpy().data, dtype)
    values[at] = value
    if not torch.isfinite(values[at].double()):  # F8_E4M3 has no infinity
        assert not all_finite(values.view(torch.uint8).numpy().data, dtype)
