"""Repair: a damaged bake is made again, whole, from the clean base and what the manifest records of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
from lora_support import change_byte, linears, low_rank, make_overlay, official_keys, random_weights, save
from support import ltxpack, refused, tree

from ltxpack.errors import OverlayError, SourceError
from ltxpack.lora_bake import BakeOptions, bake
from ltxpack.lora_bake.adapter import AdapterFiles
from ltxpack.lora_bake.bake import remake, restore
from ltxpack.lora_bake.find import hash_adapter
from ltxpack.manifest import read_manifest
from ltxpack.repack import staging
from ltxpack.reporter import SilentReporter

BASE = random_weights()
BLOCK = [module for module in linears() if "blocks.1." in module]
SILENT = SilentReporter()
PLAIN, STACKED = "distilled-0.5", "distilled-0.7+style-0.3"


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    folder = make_overlay(tmp_path / "out", BASE, shards=4, distilled=official_keys(low_rank(BLOCK)))
    style = save(tmp_path / "style.safetensors", official_keys(low_rank(BLOCK[:4], 2, seed=3)))
    bake(BakeOptions(folder, (0.5,)), SILENT)
    bake(BakeOptions(folder, (0.7,), added=((str(style), 0.3),)), SILENT)
    return folder


def files(overlay: Path, name: str) -> list[Path]:
    return sorted((overlay / "bakes" / name).iterdir())


def shard_of(overlay: Path, name: str) -> Path:
    """A shard of the bake that is a file of its own."""
    return next(p for p in files(overlay, name) if p.suffix == ".safetensors" and not p.is_symlink())


def spoil(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
        path.write_bytes(b"not a link")
    else:
        change_byte(path, path.stat().st_size // 2, 255)


def test_a_bake_is_made_again_whichever_file_is_damaged_and_if_all_are_gone(overlay: Path) -> None:
    whole = tree(overlay)
    for path in files(overlay, PLAIN):
        spoil(path)
        assert restore(overlay, SILENT) == []
        assert tree(overlay) == whole, path.name
    for path in files(overlay, PLAIN):
        path.unlink()
    assert restore(overlay, SILENT) == []
    assert tree(overlay) == whole


def test_a_user_lora_must_be_named_again(overlay: Path, tmp_path: Path) -> None:
    whole = tree(overlay)
    spoil(shard_of(overlay, STACKED))
    with pytest.raises(SourceError, match="is needed to repair") as caught:
        restore(overlay, SILENT)
    assert "style.safetensors" in str(caught.value.items)
    assert caught.value.next == f"ltxpack verify {overlay} --repair --lora FILE"
    elsewhere = (tmp_path / "style.safetensors").rename(tmp_path / "renamed.safetensors")
    assert restore(overlay, SILENT, loras=[str(elsewhere)]) == []
    assert tree(overlay) == whole


def test_a_lora_that_does_not_match_is_named_and_one_that_does_is_kept(overlay: Path, tmp_path: Path) -> None:
    spaced = overlay.rename(tmp_path / "my overlay")
    second = save(tmp_path / "second.safetensors", official_keys(low_rank(BLOCK[:4], 2, seed=5)))
    style = tmp_path / "style.safetensors"
    [made] = bake(BakeOptions(spaced, (0.7,), added=((str(style), 0.3), (str(second), 0.1))), SILENT)
    spoil(shard_of(spaced, made.name))
    wrong = save(tmp_path / "wrong.safetensors", official_keys(low_rank(BLOCK[:4], 2, seed=4)))
    message = refused(ltxpack("verify", spaced, "--repair", "--lora", wrong, "--lora", second), 1)
    digests = [hash_adapter(path, None)[:8] for path in (style, wrong)]
    assert f"the LoRA of the bake {made.name} is needed to repair it, and a file given does not match" in message
    assert f"expected style.safetensors (blake3 {digests[0]}), found {wrong} (blake3 {digests[1]})" in message
    assert message.endswith(f"next: ltxpack verify '{spaced}' --repair --lora {second} --lora FILE\n")


def test_the_kernel_of_the_manifest_is_used_if_it_is_here(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a bake with another could be neither repaired nor made anew, although the message said so."""
    whole, manifest = tree(overlay), read_manifest(overlay)
    spoil(shard_of(overlay, PLAIN))
    with monkeypatch.context() as patch:
        patch.setattr("ltxpack.lora_bake.fuse.cpu_has_bf16_unit", lambda: pytest.fail("the kernel was chosen anew"))
        assert restore(overlay, SILENT) == []
    assert tree(overlay) == whole
    made = dataclasses.replace(manifest.bakes[PLAIN], kernel="unheard-of", device="cuda")
    (overlay / "ltxpack.json").write_bytes(manifest.with_bake(PLAIN, made).dump())
    spoil(shard_of(overlay, PLAIN))
    assert restore(overlay, SILENT) == []
    assert read_manifest(overlay).bakes[PLAIN].loras == made.loras


@pytest.mark.parametrize("missing", ["_FP32_PRECISION", "cpu_has_bf16_unit"])
def test_a_bake_of_the_bf16_unit_is_repaired_without_it(
    overlay: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a torch before 2.9: it ended in a traceback there, and the manifest named a kernel that was not used."""
    manifest = read_manifest(overlay)
    made = dataclasses.replace(manifest.bakes[PLAIN], kernel="fp32-bf16")
    (overlay / "ltxpack.json").write_bytes(manifest.with_bake(PLAIN, made).dump())
    spoil(shard_of(overlay, PLAIN))
    monkeypatch.setattr(f"ltxpack.lora_bake.fuse.{missing}", False if missing.isupper() else lambda: False)
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul", raising=False)
    assert restore(overlay, SILENT) == []
    assert read_manifest(overlay).bakes[PLAIN].kernel != "fp32-bf16"


@pytest.mark.parametrize(
    ("form", "kernel", "strength"), [("fp8", "addmm", 0.5), ("bf16", "official", 0.5), ("bf16", "fp32", 1e300)]
)
def test_a_manifest_that_states_the_impossible_repairs_or_is_refused(
    form: str, kernel: str, strength: float, overlay: Path
) -> None:
    [report] = bake(BakeOptions(overlay, (0.5,), formats=(form,), keep_blocks=() if form != "bf16" else None), SILENT)
    manifest = read_manifest(overlay)
    made = manifest.bakes[report.name]
    loras = tuple(dataclasses.replace(lora, strength=strength) for lora in made.loras)
    made = dataclasses.replace(made, kernel=kernel, loras=loras)
    (overlay / "ltxpack.json").write_bytes(manifest.with_bake(report.name, made).dump())
    spoil(shard_of(overlay, report.name))
    if strength == 1e300:
        with pytest.raises(OverlayError, match="that are too large, overlap"):
            restore(overlay, SILENT)
        return
    assert restore(overlay, SILENT) == []
    assert read_manifest(overlay).bakes[report.name].kernel != kernel


def test_a_bake_that_comes_out_otherwise_than_recorded_is_made_all_the_same(overlay: Path) -> None:
    whole = tree(overlay)
    manifest = read_manifest(overlay)
    made = manifest.bakes[PLAIN]
    shard = next(record for record in made.files if record.path.endswith(".safetensors") and not record.link)
    odd = tuple(dataclasses.replace(record, blake3="0" * 64) if record == shard else record for record in made.files)
    (overlay / "ltxpack.json").write_bytes(manifest.with_bake(PLAIN, dataclasses.replace(made, files=odd)).dump())
    assert restore(overlay, SILENT) == []
    assert tree(overlay) == whole


@pytest.mark.parametrize("moved", range(4))
def test_a_repair_that_stops_while_its_files_come_to_their_place_loses_no_bake(
    overlay: Path, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest named the bake no more, so that the next repair found nothing to do."""
    whole = tree(overlay)
    spoil(files(overlay, PLAIN)[0])
    with monkeypatch.context() as patch:
        moves = [*[mock.DEFAULT] * moved, KeyboardInterrupt]
        patch.setattr(staging, "move_file", mock.Mock(wraps=staging.move_file, side_effect=moves))
        with pytest.raises(KeyboardInterrupt):
            restore(overlay, SILENT)
    assert PLAIN in read_manifest(overlay).bakes
    assert restore(overlay, SILENT) == []
    assert tree(overlay) == whole


def test_a_changed_base_makes_no_bake(overlay: Path) -> None:
    shard = shard_of(overlay, PLAIN)
    spoil(shard)
    spoil(overlay / "transformer" / shard.name)
    before = {name: data for name, data in tree(overlay).items() if not name.startswith(".ltxpack")}
    own = read_manifest(overlay).loras
    own_files = {lora.file.blake3: AdapterFiles(lora.name, overlay / lora.file.path) for lora in own}
    with pytest.raises(OverlayError, match="has changed"):
        remake(overlay, f"bakes/{PLAIN}", own_files, SILENT)
    assert {name: data for name, data in tree(overlay).items() if not name.startswith(".ltxpack")} == before
