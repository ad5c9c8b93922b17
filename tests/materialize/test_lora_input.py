"""A LoRA given to materialize: what it states is read as a bake will read it; and distilled checkpoints by any name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from materialize import tiny_source
from support import Notes

from ltxpack.errors import LtxpackError
from ltxpack.ltx23.releases import RELEASES
from ltxpack.materialize import Options, OverlayPlan, plan_overlay
from ltxpack.materialize.access import InputFile

LORA = {"diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 24),
        "diffusion_model.transformer_blocks.0.attn1.to_q.lora_B.weight": (24, 4)}  # fmt: skip


def planned(source: Path, folder: Path, lora: Path | None, **files: str) -> tuple[Notes, OverlayPlan]:
    notes = Notes()
    options = Options(str(source), folder / "out", lora=None if lora is None else str(lora), **files)
    return notes, plan_overlay(options, notes)


def written(path: Path, **metadata: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    tiny_source.write_tensors(path, LORA, metadata)
    return path


def test_what_a_lora_states_is_told(source: Path, tmp_path: Path) -> None:
    lora = written(tmp_path / "x.safetensors", lora_alpha="8", reference_downscale_factor="2")
    notes, _ = planned(source, tmp_path, lora)
    assert "lora: alpha 8 from the header (lora_alpha), rank 4: the strength is multiplied by 2" in notes.notes
    assert [told for told in notes.warnings if "lora: is an IC-LoRA" in told]


REFUSED = {
    "another model": ({"ss_base_model_version": "ltx2"}, "says that it was made for another model"),
    "two alphas": ({"lora_alpha": "8", "network_alpha": "4"}, "states more than one alpha"),
    "another rank": ({"lora_rank": "8"}, "rank mismatch: transformer_blocks.0.attn1.to_q has rank 4"),
    "lost dora": ({"use_dora": "true"}, "is a DoRA without its magnitudes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_lora_that_a_bake_would_refuse_is_refused(case: str, source: Path, tmp_path: Path) -> None:
    metadata, told = REFUSED[case]
    with pytest.raises(LtxpackError) as caught:
        planned(source, tmp_path, written(tmp_path / "x.safetensors", **metadata))
    assert told in str(caught.value) and "x.safetensors" in str(caught.value)


@pytest.mark.parametrize(("alpha", "kept"), [(8, False), (4, True)])
def test_a_configuration_that_scales_is_not_left_behind(alpha: int, kept: bool, source: Path, tmp_path: Path) -> None:
    """An overlay keeps the weights alone."""
    lora = written(tmp_path / "peft" / "adapter_model.safetensors")
    (lora.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": alpha}))
    if kept:
        planned(source, tmp_path, lora)
        return
    with pytest.raises(LtxpackError, match="which an overlay does not keep") as caught:
        planned(source, tmp_path, lora)
    assert caught.value.found == "8 from adapter_config.json (lora_alpha)"


@pytest.mark.parametrize(
    ("metadata", "by"),
    [
        ({"modelspec.title": "LTX-2.3 Distilled 1.1"}, "header"),
        ({"ltxpack": json.dumps({"source": [{"role": "checkpoint", "name": "a-distilled.safetensors"}]})}, "header"),
        ({"ltxpack": json.dumps({"loras": [{"file": "a-distilled-lora.safetensors", "strength": 1.0}]})}, "header"),
        ({"ltxpack": json.dumps({"source": [{"role": "lora", "name": "a-distilled-lora.safetensors"}]})}, None),
        ({"ltxpack": "[]", "title": "LTX-2.3"}, None),
    ],
)
def test_a_distilled_checkpoint_is_known_by_its_header(
    metadata: dict[str, str], by: str | None, tmp_path: Path
) -> None:
    source = tiny_source.make_source(tmp_path / "source", metadata={"model_version": "2.3.0", **metadata})
    notes, plan = planned(source, tmp_path, None)
    assert plan.stated.transformer_kind == ("distilled" if by else "full")
    told = f"by its {by}: distilled, for the recipe distilled; bake no distilled LoRA into it" if by else ": full"
    assert any(f"kind of transformer, {told}" in note or (not by and note.endswith(told)) for note in notes.notes)


@pytest.mark.parametrize("release", RELEASES[:3], ids=lambda release: release.name)
def test_a_published_checkpoint_of_another_name_is_known_by_its_size(release: object, tmp_path: Path) -> None:
    assert hasattr(release, "size") and hasattr(release, "name")
    for name, expected in (("x.safetensors", "size"), ("x-DISTILLED.safetensors", "size")):
        file = InputFile(name, release.size, None, tmp_path / name, None, name)
        assert file.distilled_by == (expected if "distilled" in release.name else None)
    other = InputFile("x-Distilled.safetensors", 7, None, tmp_path / "x", None, "x")
    assert other.distilled_by == "file name"
