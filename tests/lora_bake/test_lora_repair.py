"""Repair: damaged files of a bake come back byte for byte, from the clean base, with the kernel of the manifest."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from lora_support import linears, low_rank, make_overlay, official_keys, random_weights, save, tree_bytes
from support import ltxpack, refused

from ltxpack.errors import DeviceError, OverlayError, SourceError
from ltxpack.lora_bake import BakeOptions, bake, repair_bake
from ltxpack.lora_bake.reading import hash_adapter
from ltxpack.manifest import read_manifest
from ltxpack.repack.verify import damaged, verify
from ltxpack.reporter import SilentReporter

BASE = random_weights()
BLOCK = [module for module in linears() if "blocks.1." in module]
SILENT = SilentReporter()


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    folder = make_overlay(tmp_path / "out", BASE, shards=4, distilled=official_keys(low_rank(BLOCK)))
    style = save(tmp_path / "style.safetensors", official_keys(low_rank(BLOCK[:4], 2, seed=3)))
    bake(BakeOptions(folder, (0.5,)), SILENT)
    bake(BakeOptions(folder, (0.7,), added=((str(style), 0.3),)), SILENT)
    return folder


def files(overlay: Path, name: str) -> list[Path]:
    return sorted((overlay / "bakes" / name).iterdir())


def spoil(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
        path.write_bytes(b"not a link")
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)


def repair(overlay: Path, name: str, **options: object) -> None:
    faults = verify(overlay, SILENT)
    assert faults
    repair_bake(overlay, name, damaged(faults, read_manifest(overlay)), SILENT, **options)  # type: ignore[arg-type]


def test_every_file_of_a_bake_can_be_repaired(overlay: Path) -> None:
    whole = tree_bytes(overlay)
    for path in files(overlay, "distilled-0.5"):
        spoil(path)
        repair(overlay, "distilled-0.5")
        assert tree_bytes(overlay) == whole, path.name


def test_all_files_at_once(overlay: Path) -> None:
    whole = tree_bytes(overlay)
    for path in files(overlay, "distilled-0.5"):
        path.unlink()
    repair(overlay, "distilled-0.5")
    assert tree_bytes(overlay) == whole and verify(overlay, SILENT) == []


def test_a_user_lora_must_be_named_again(overlay: Path, tmp_path: Path) -> None:
    whole = tree_bytes(overlay)
    name = "distilled-0.7+style-0.3"
    shard = next(path for path in files(overlay, name) if path.suffix == ".safetensors" and not path.is_symlink())
    spoil(shard)
    with pytest.raises(SourceError, match="is needed to repair") as caught:
        repair(overlay, name)
    assert "style.safetensors" in str(caught.value.items)
    assert caught.value.next == f"ltxpack verify {overlay} --repair --lora FILE"
    elsewhere = (tmp_path / "style.safetensors").rename(tmp_path / "renamed.safetensors")
    repair(overlay, name, loras=[elsewhere])
    assert tree_bytes(overlay) == whole


def test_a_lora_that_does_not_match_is_named_and_one_that_does_is_kept(overlay: Path, tmp_path: Path) -> None:
    spaced = overlay.rename(tmp_path / "my overlay")
    second = save(tmp_path / "second.safetensors", official_keys(low_rank(BLOCK[:4], 2, seed=5)))
    style = tmp_path / "style.safetensors"
    [made] = bake(BakeOptions(spaced, (0.7,), added=((str(style), 0.3), (str(second), 0.1))), SILENT)
    shard = next(path for path in files(spaced, made.name) if path.suffix == ".safetensors" and not path.is_symlink())
    spoil(shard)
    wrong = save(tmp_path / "wrong.safetensors", official_keys(low_rank(BLOCK[:4], 2, seed=4)))
    message = refused(ltxpack("verify", spaced, "--repair", "--lora", wrong, "--lora", second), 1)
    digests = [hash_adapter(path, None)[:8] for path in (style, wrong)]
    assert f"the LoRA of the bake {made.name} is needed to repair it, and a file given does not match" in message
    assert f"expected style.safetensors (blake3 {digests[0]}), found {wrong} (blake3 {digests[1]})" in message
    assert message.endswith(f"next: ltxpack verify '{spaced}' --repair --lora {second} --lora FILE\n")


def test_only_the_damaged_shard_is_fused(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sys.modules["ltxpack.lora_bake.stream"].Engine
    real, fused = engine.fuse_shard, []
    monkeypatch.setattr(
        engine, "fuse_shard", lambda self, shard, outputs: fused.append(shard.name) or real(self, shard, outputs)
    )
    shards = [
        path for path in files(overlay, "distilled-0.5") if path.suffix == ".safetensors" and not path.is_symlink()
    ]
    assert len(shards) > 1
    spoil(shards[0])
    repair(overlay, "distilled-0.5")
    assert fused == [shards[0].name]


def test_the_kernel_of_the_manifest_is_used(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree_bytes(overlay)
    shard = next(path for path in files(overlay, "distilled-0.5") if path.suffix == ".safetensors")
    spoil(shard)
    monkeypatch.setattr("ltxpack.lora_bake.fuse.cpu_has_bf16_unit", lambda: pytest.fail("the kernel was chosen anew"))
    repair(overlay, "distilled-0.5")
    assert tree_bytes(overlay) == whole


def test_a_changed_base_repairs_nothing(overlay: Path) -> None:
    shard = next(p for p in files(overlay, "distilled-0.5") if p.suffix == ".safetensors" and not p.is_symlink())
    spoil(shard)
    spoil(overlay / "transformer" / shard.name)
    before = tree_bytes(overlay)
    with pytest.raises(OverlayError, match="has changed"):
        repair(overlay, "distilled-0.5")
    assert tree_bytes(overlay) == before


def test_other_bytes_than_the_manifest_names_are_not_put_in_place(overlay: Path) -> None:
    manifest = read_manifest(overlay)
    made = manifest.bakes["distilled-0.5"]
    shard = next(record for record in made.files if record.path.endswith(".safetensors") and not record.link)
    odd = tuple(dataclasses.replace(record, blake3="0" * 64) if record == shard else record for record in made.files)
    (overlay / "ltxpack.json").write_bytes(
        manifest.with_bake("distilled-0.5", dataclasses.replace(made, files=odd)).dump()
    )
    before = tree_bytes(overlay)
    with pytest.raises(OverlayError, match="other bytes"):
        repair(overlay, "distilled-0.5")
    assert tree_bytes(overlay) == before


def test_a_bake_from_another_device(overlay: Path) -> None:
    manifest = read_manifest(overlay)
    made = dataclasses.replace(manifest.bakes["distilled-0.5"], kernel="unheard-of")
    (overlay / "ltxpack.json").write_bytes(manifest.with_bake("distilled-0.5", made).dump())
    with pytest.raises(DeviceError, match="which is not here"):
        repair_bake(overlay, "distilled-0.5", [], SILENT)
