"""``verify --repair`` makes again what is damaged, whatever it is, byte for byte, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import ltxpack, refused


@pytest.fixture
def overlay(demo: Path, tmp_path: Path) -> Path:
    """An overlay of its own with small shards and two bakes, one of them stacked from a LoRA it does not keep."""
    out = tmp_path / "out"
    style = tmp_path / "style.safetensors"
    shutil.copy(next((demo / "source").glob("*lora*")), style)
    for command in (
        ["materialize", demo / "source", out, "--max-shard-size", "300kB", "--copy"],
        ["bake-lora", out, "--strength", "0.25"],
        ["bake-lora", out, "--strength", "0.5", "--add", f"{style}=0.3"],
    ):
        done = ltxpack(*command)
        assert done.returncode == 0, done.stderr
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(overlay: Path, *patterns: str) -> list[str]:
    """One file for each pattern: a byte changed, cut off, or gone, in turn."""
    names = []
    for number, pattern in enumerate(patterns):
        path = sorted(overlay.glob(pattern))[-1]
        content = bytearray(path.read_bytes())
        path.unlink()
        if number % 3 == 0:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        elif number % 3 == 1:
            path.write_bytes(content[:-1])
        names.append(str(path.relative_to(overlay)))
    return names


def test_everything_damaged_is_made_again(demo: Path, overlay: Path, tmp_path: Path) -> None:
    before = contents(overlay)
    damaged = damage(
        overlay,
        "transformer/*.safetensors",
        "vae/config.json",
        "text_encoder/*.safetensors",
        "loras/*",
        "model_index.json",
        "bakes/distilled-0.25/*.safetensors",
        "bakes/distilled-0.5*/*.safetensors",
        "bakes/distilled-0.25/coverage.html",
    )
    listed = ltxpack("verify", overlay)
    assert listed.returncode == 1
    assert all(name in listed.stdout for name in damaged)
    repaired = ltxpack(
        "verify", overlay, "--repair", "--source", demo / "source", "--lora", tmp_path / "style.safetensors"
    )
    assert repaired.returncode == 0, repaired.stderr
    assert contents(overlay) == before


def test_a_stray_file_is_told_and_kept(demo: Path, overlay: Path) -> None:
    (overlay / "vae" / "mine.safetensors").write_bytes(b"mine")
    done = ltxpack("verify", overlay, "--repair", "--source", demo / "source")
    assert done.returncode == 1
    assert "vae/mine.safetensors" in done.stdout
    assert (overlay / "vae" / "mine.safetensors").read_bytes() == b"mine"


def test_a_repair_that_lacks_its_source_says_so(overlay: Path) -> None:
    (name,) = damage(overlay, "transformer/*.safetensors")
    message = refused(ltxpack("verify", overlay, "--repair"), 1)
    assert name in message
    assert "--source" in message


def test_another_source_repairs_nothing(demo: Path, overlay: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(demo / "source", tmp_path / "other"))
    checkpoint = next(other.glob("*-dev*"))
    content = bytearray(checkpoint.read_bytes())
    content[-1000:] = bytes(1000)
    checkpoint.write_bytes(content)
    damage(overlay, "*/diffusion_pytorch_model*.safetensors")
    before = contents(overlay)
    refused(ltxpack("verify", overlay, "--repair", "--source", other), 1)
    assert contents(overlay) == before


def test_source_without_repair_is_wrong_use(overlay: Path) -> None:
    refused(ltxpack("verify", overlay, "--source", "x"), 2)
