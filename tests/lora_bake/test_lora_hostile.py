"""LoRA files from the internet: whatever the header says, the answer is an adapter or one message, and quickly."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_support import fuse_fp32, linears, official, shapes

from ltxpack.errors import LtxpackError
from ltxpack.files.tensorfile import DTYPE_BITS
from ltxpack.lora_bake.adapter import open_adapter
from ltxpack.lora_bake.find import all_finite, scan
from ltxpack.lora_bake.stream import DTYPES, FactorReader
from ltxpack.reporter import SilentReporter

SHAPES = shapes()
MODULES = [module for module in linears() if "blocks.0.attn1" in module]
PREFIXES = ["diffusion_model.", "transformer.", "base_model.model.", "lora_unet_", "", "model.",
            "diffusion_model.diffusion_model."]  # fmt: skip
WRAPPED = "base_model.model.transformer_blocks.0.attn1.to_q"
PAIR = {f"{WRAPPED}.lora_A.weight": ("F32", [4, 32]), f"{WRAPPED}.lora_B.weight": ("F32", [32, 4])}
ENDINGS = ["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "diff",
           "diff_b", "lora_magnitude_vector.default.weight", "lora_A.x.weight", "lora_mid.weight", ""]  # fmt: skip


def keys() -> st.SearchStrategy[str]:
    module = st.sampled_from([*MODULES, *map(official, MODULES), "transformer_blocks.0.attn1.to_qkv", "proj_in", "x.y"])
    spelled = st.builds(lambda m, flat: m.replace(".", "_") if flat else m, module, st.booleans())
    real = st.builds(lambda p, m, e: f"{p}{m}.{e}", st.sampled_from(PREFIXES), spelled, st.sampled_from(ENDINGS))
    return st.one_of(real, st.text(min_size=1, max_size=30))


def tensors() -> st.SearchStrategy[tuple[str, list[int]]]:
    dims = st.lists(st.sampled_from([0, 1, 2, 4, 16, 32, 96]), max_size=3)
    return st.tuples(st.sampled_from(sorted(DTYPE_BITS)), dims)


def write(path: Path, entries: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> bool:
    """A well-formed file with these tensors, all bytes 1; False if a tensor would be no whole number of bytes."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in entries.items():
        bits = math.prod((DTYPE_BITS[dtype], *shape))
        if bits % 8 or name == "__metadata__":
            return False
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
        end += bits // 8
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\1" * end)
    return True


@settings(max_examples=200, deadline=1000)
@given(
    st.dictionaries(keys(), tensors(), min_size=1, max_size=8),
    st.dictionaries(st.sampled_from(["lora_adapter_metadata", "ss_network_alpha", "format"]), st.text(max_size=20)),
    st.booleans(),
)
def test_any_header_is_an_adapter_or_one_message(
    entries: dict[str, tuple[str, list[int]]], metadata: dict[str, str], allow: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        if not write(path, entries, metadata):
            return
        try:
            adapter = open_adapter(path, SHAPES, allow_unmatched=allow)
            scan(adapter, SilentReporter())
        except LtxpackError as error:
            assert str(error).replace("\n", "").isprintable()
            return
        assert adapter.targets
        with contextlib.closing(FactorReader(adapter)) as reader:
            for name in adapter.targets:
                term = reader.term(name)
                assert term is not None and name in SHAPES
                fuse_fp32(torch.zeros(SHAPES[name]), [term], [0.5])


@pytest.mark.parametrize("where", ["weights", "config"])
def test_links_out_of_a_peft_folder_are_read_but_never_written(where: str, tmp_path: Path) -> None:
    """A hub cache's snapshot is made of links; they are followed for reading."""
    real, folder = tmp_path / "blobs", tmp_path / "snapshot"
    real.mkdir()
    folder.mkdir()
    write(real / "a", PAIR, {})
    (real / "b").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    for name, blob in (("adapter_model.safetensors", "a"), ("adapter_config.json", "b")):
        (folder / name).symlink_to(real / blob)
    assert open_adapter(folder, SHAPES).factor == 2.0
    (real / ("a" if where == "weights" else "b")).unlink()
    with pytest.raises(LtxpackError):
        open_adapter(folder, SHAPES)


def test_ten_thousand_foreign_targets_are_judged_in_time(tmp_path: Path) -> None:
    entries = {
        f"diffusion_model.blocks.{i}.attn.lora_{letter}.weight": ("BF16", [1, 1])
        for i in range(10_000)
        for letter in "AB"
    }
    write(tmp_path / "x.safetensors", entries, {})
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
