"""What inspect tells, for each kind of file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from materialize import tiny_source
from support import ltxpack, refused

from ltxpack.errors import FormatError, SourceError
from ltxpack.ltx23.releases import RELEASES
from ltxpack.manifest import MANIFEST_NAME, Calibration, read_manifest
from ltxpack.materialize import Options, inspect_path, materialize
from ltxpack.reporter import SilentReporter


def write(path: Path, shapes: dict[str, tuple[int, ...]], **metadata: str) -> Path:
    tiny_source.write_tensors(path, shapes, metadata)
    return path


def test_a_checkpoint(tmp_path: Path) -> None:
    source = tiny_source.make_source(tmp_path / "source", dtypes=tiny_source.f32_tables)
    found = inspect_path(source / tiny_source.CHECKPOINT)
    json.dumps(found)
    assert (found["kind"], found["generation"], found["converts"]) == ("checkpoint", "LTX-2.3", True)
    assert found["licence"] == "none, random"
    assert found["components"]["transformer"]["dtypes"]["F32"] == 14
    assert sum(part["tensors"] for part in found["components"].values()) == found["tensors"]
    assert sum(part["tensor_bytes"] for part in found["components"].values()) == found["tensor_bytes"]
    assert found["unknown"]["count"] == 0


def test_an_upsampler_and_a_checkpoint_that_does_not_convert(source: Path) -> None:
    found = inspect_path(source / tiny_source.UPSAMPLER)
    assert (found["kind"], found["converts"]) == ("upsampler", True)
    assert found["config"]["mid_channels"] == 32
    tiny_source.Tiny(metadata={"model_version": "2.5.0"}).write(source)
    found = inspect_path(source / tiny_source.CHECKPOINT)
    assert (found["generation"], found["converts"]) == ("LTX-2.5", False)
    assert "2.5.0" in found["problem"]


MODULE = "transformer_blocks.3.attn1.to_q"
STYLES = {
    "official": (f"diffusion_model.{MODULE}", ".lora_A.weight", ".lora_B.weight"),
    "comfy": (f"diffusion_model.{MODULE}", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (f"transformer.{MODULE}", ".lora_A.weight", ".lora_B.weight"),
    "peft": (f"base_model.model.{MODULE}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "bare": (MODULE, ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("lora_unet_transformer_blocks_3_attn1_to_q", ".lora_down.weight", ".lora_up.weight"),
}


@pytest.mark.parametrize("style", STYLES)
def test_lora_styles(tmp_path: Path, style: str) -> None:
    module, down, up = STYLES[style]
    shapes = {module + down: (4, 24), module + up: (24, 4), f"{module}.alpha": ()}
    found = inspect_path(write(tmp_path / "x.safetensors", shapes))
    assert (found["kind"], found["style"], found["targets"], found["ranks"]) == ("lora", style, 1, {"4": 1})
    separator = "_" if style == "kohya" else "."
    assert found["kinds"] == {separator.join(("transformer_blocks", "*", "attn1", "to_q")): 1}
    assert found["alpha"] == "per target (1)"
    assert found["unpaired"] == []


def test_half_pairs_and_others_are_listed(tmp_path: Path) -> None:
    shapes = {"a.lora_A.weight": (2, 3), "b.lora_A.weight": (2, 3), "b.lora_B.weight": (3, 2), "c.odd": (1,)}
    found = inspect_path(write(tmp_path / "x.safetensors", shapes, lora_alpha="8"))
    assert (found["unpaired"], found["others"], found["targets"]) == (["a.lora_A.weight"], ["c.odd"], 1)
    assert found["alpha"] == "8 from the header (lora_alpha)"


def test_an_overlay(out: Path, tmp_path: Path) -> None:
    source = tiny_source.make_source(tmp_path / "source", dtypes=tiny_source.f32_tables)
    materialize(Options(str(source), out), SilentReporter())
    found = inspect_path(out)
    json.dumps(found)
    assert (found["kind"], found["image_crf"], found["bakes"]) == ("overlay", 33, {})
    assert found["components"]["transformer"]["cast"] == 14
    assert [lora["name"] for lora in found["loras"]] == ["distilled"]
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "ltxpack.json"]
    assert found["bytes"] == sum(path.stat().st_size for path in files)


def test_a_removed_bake_is_no_bake(overlay: Path) -> None:
    whole = inspect_path(overlay)
    shutil.rmtree(overlay / "bakes/distilled-0.25")
    found = inspect_path(overlay)
    assert ([*found["bakes"]], found["removed"]) == (["distilled-0.5"], ["bakes/distilled-0.25"])
    assert found["bytes"] == whole["bytes"] - whole["bakes"]["distilled-0.25"]["bytes"] and "removed" not in whole


def test_bakes_state_their_form(overlay: Path) -> None:
    made = ltxpack(
        "bake-lora", overlay, *["--strength", "1", "--format", "fp8", "--format", "int8", "--keep-blocks", "0"]
    )
    assert made.returncode == 0, made.stderr
    manifest = read_manifest(overlay)
    fp8 = manifest.bakes["distilled-1-fp8"]
    calibrated = replace(fp8, calibration=Calibration("mine.safetensors", "ab" * 32, (0.5,) * len(fp8.quantised)))
    for calibration, written in (("not calibrated", manifest), ("mine.safetensors", None)):
        (overlay / MANIFEST_NAME).unlink()
        (overlay / MANIFEST_NAME).write_bytes((written or manifest.with_bake("distilled-1-fp8", calibrated)).dump())
        found = json.loads(ltxpack("inspect", overlay, "--json").stdout)
        facts = {n: (bake["format"], bake["quantised"], bake["calibration"]) for n, bake in found["bakes"].items()}
        assert facts["distilled-0.5"] == ("bf16", 0, None)
        assert facts["distilled-1-fp8"] == ("fp8", 34, calibration)
        assert facts["distilled-1-int8"] == ("int8", 34, None)
        assert "distilled-1-fp8, distilled-1-int8" in found["takes"]["diffusers"]
    for name, form in (("fp8", "fp8-scaled"), ("int8", "int8-rotated")):
        [shard] = overlay.glob(f"bakes/distilled-1-{name}/*.safetensors")
        found = inspect_path(shard)
        assert (found["kind"], found["form"], found["naming"]) == ("tensors", form, "diffusers")


def test_an_index_leads_to_its_folder(demo: Path) -> None:
    told = refused(ltxpack("inspect", demo / "overlay/transformer/config.json"), 1)
    assert "JSON text" in told and f"next: ltxpack inspect {demo / 'overlay/transformer'}" in told


def test_no_line_of_metadata_looks_like_one_of_ours(tmp_path: Path) -> None:
    forged = "x\nrelease: ltx-2.3-22b-dev"
    path = write(tmp_path / "x.safetensors", {"a": ()}, other=forged, **{forged: "x"})
    said = ltxpack("inspect", path).stdout.splitlines()
    assert [line for line in said if line.startswith("release")] == ["release: -", "release_by_name_and_size: -"]
    assert sum(line.startswith("      release: ltx-2.3-22b-dev") for line in said) == 2


def test_an_activations_file(tmp_path: Path) -> None:
    metadata = {"format": "ltxpack-activations-1", "model_version": "2.3.0"}
    found = inspect_path(write(tmp_path / "x.safetensors", {"transformer_blocks.1.attn1.to_q": ()}, **metadata))
    assert (found["kind"], found["metadata"]) == ("activations", metadata)


def test_a_folder_lists_its_files(source: Path, tmp_path: Path) -> None:
    (source / "broken.safetensors").write_bytes(b"x")
    (source / "folder.safetensors").mkdir()
    (source / "folder.safetensors" / "a.safetensors").write_bytes(b"x")
    found = inspect_path(source)
    assert {file["name"]: file["kind"] for file in found["files"]} == {
        "broken.safetensors": "broken",
        tiny_source.CHECKPOINT: "checkpoint",
        tiny_source.LORA: "lora",
        tiny_source.UPSAMPLER: "upsampler",
    }
    with pytest.raises(SourceError, match="neither an overlay"):
        inspect_path(tmp_path)


def test_other_tensors_with_a_releases_name_and_another_size(tmp_path: Path) -> None:
    release = RELEASES[0]
    found = inspect_path(write(tmp_path / release.file, {"a": (2, 3)}))
    assert (found["kind"], found["params"], found["names"]) == ("tensors", 6, ["a"])
    assert (found["release"], found["release_by_name_and_size"]) == (None, None)
    assert str(release.size) in found["warning"]


def test_what_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        inspect_path(tmp_path / "nothing")
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(FormatError, match="pickle"):
        inspect_path(tmp_path / "x.safetensors")
