"""Rotary tables against recorded ones, and the rotation in both dtypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from codec_parts import golden_configs
from dit_parts import LTX23
from support import load, relative_l2
from torch import Tensor

from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.model.rope import RopeTables, Rotation, rotate
from ltxpack.runtime.sampling.shape import AV

TABLES = {
    "video": lambda tables: tables.video.self_attention,
    "audio": lambda tables: tables.audio.self_attention,
    "video_cross": lambda tables: tables.video.cross_attention,
    "audio_cross": lambda tables: tables.audio.cross_attention,
}
# The real_* tables are stored in float16 for two of the 32 heads, the audio ones for the first tokens.
REAL_HEADS = {"stage1": slice(0, 2), "stage2": slice(30, 32)}


def tables_for(config: dict[str, object], constants: dict[str, Tensor], name: str) -> AV[RopeTables]:
    """Tables at the recorded positions; a DiT without blocks suffices."""
    with torch.device("meta"):
        dit = DiT(replace(DiTConfig.from_dict(config), num_layers=0))
    positions = AV(constants[f"pos.{name}.video_positions"], constants[f"pos.{name}.audio_positions"])
    return dit.rope(positions, torch.float32, "cpu")


def recorded_names(constants: dict[str, Tensor]) -> set[str]:
    return {key.split(".")[1] for key in constants if key.startswith("rope.")}


def test_recorded_tables_are_reproduced(latents_golden: Path) -> None:
    constants = load(latents_golden / "golden" / "constants.safetensors")
    names = recorded_names(constants)
    assert names
    for name in names:
        real = name.startswith("real_")
        tables = tables_for(LTX23 if real else golden_configs(latents_golden)["transformer"], constants, name)
        for kind, table in TABLES.items():
            for part, found in table(tables)._asdict().items():
                expected = constants[f"rope.{name}.{kind}.{part}"]
                if real:
                    heads = REAL_HEADS[name.split("_")[1]]
                    stored = found[:, heads, : expected.shape[2]].half()
                    assert torch.equal(stored, expected) or (stored - expected).abs().max() <= 2**-10, (name, kind)
                else:
                    assert relative_l2(found, expected) <= 1e-6, (name, kind, part)


def test_bf16_rounds_the_product_and_then_the_sum() -> None:
    """Spec 06 section 3: y1 = bf16(bf16(x1·cos) - sin·x2), y2 = bf16(bf16(x2·cos) + sin·x1)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 50, 8, generator=generator).bfloat16()
    angles = torch.randn(1, 2, 50, 4, generator=generator)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    first, second = x.double().chunk(2, dim=-1)

    def once(value: Tensor) -> Tensor:
        return value.bfloat16().double()

    expected = torch.cat(
        (once(first * cos) - sin.double() * second, once(second * cos) + sin.double() * first), dim=-1
    ).bfloat16()
    assert torch.equal(rotate(x, Rotation(cos, sin)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_are_rounded_from_float32(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        dit = DiT(replace(DiTConfig.from_dict(LTX23), num_layers=0))
    positions = AV(torch.rand(1, 3, 4, 2) * 20, torch.rand(1, 1, 3, 2) * 5)
    exact, found = dit.rope(positions, torch.float32, "cpu"), dit.rope(positions, dtype, "cpu")
    for table in TABLES.values():
        assert torch.equal(table(found).cos, table(exact).cos.to(dtype))
        assert torch.equal(table(found).sin, table(exact).sin.to(dtype))
    assert found.video.self_attention.cos.shape == (1, 32, 4, 64)
    assert found.video.cross_attention.cos.shape == (1, 32, 4, 32)
    assert found.audio.self_attention.cos.shape == found.audio.cross_attention.cos.shape == (1, 32, 3, 32)
