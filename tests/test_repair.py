"""``verify --repair`` makes again what is damaged, whatever it is, byte for byte, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support import ltxpack, refused, tree


@pytest.fixture(scope="module")
def made(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``out``: an overlay of small shards with two bakes, one of them stacked from ``style.safetensors``."""
    folder = tmp_path_factory.mktemp("made")
    style = shutil.copy(next((demo / "source").glob("*lora*")), folder / "style.safetensors")
    for command in (
        ["materialize", demo / "source", folder / "out", "--max-shard-size", "300kB", "--copy"],
        ["bake-lora", folder / "out", "--strength", "0.25"],
        ["bake-lora", folder / "out", "--strength", "0.5", "--add", f"{style}=0.3"],
    ):
        done = ltxpack(*command)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def overlay(made: Path, tmp_path: Path) -> Path:
    """The overlay by hard links: a repair replaces files and never writes in one."""
    return Path(shutil.copytree(made / "out", tmp_path / "out", copy_function=os.link))


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


def test_everything_damaged_is_made_again_and_a_stray_file_is_told_and_kept(
    demo: Path, made: Path, overlay: Path
) -> None:
    before = tree(overlay)
    damaged = damage(
        overlay, "transformer/*.safetensors", "vae/config.json", "text_encoder/*.safetensors", "loras/*",
        "model_index.json", "bakes/distilled-0.25/*.safetensors", "bakes/distilled-0.5*/*.safetensors",
        "bakes/distilled-0.25/coverage.html",
    )  # fmt: skip
    listed = ltxpack("verify", overlay)
    assert listed.returncode == 1
    assert all(name in listed.stdout for name in damaged)
    inputs = ("--source", demo / "source", "--lora", made / "style.safetensors")
    repaired = ltxpack("verify", overlay, "--repair", *inputs)
    assert repaired.returncode == 0, repaired.stderr
    assert tree(overlay) == before
    (overlay / "vae" / "mine.safetensors").write_bytes(b"mine")
    (overlay / "vae" / "config.json").unlink()
    done = ltxpack("verify", overlay, "--repair", *inputs)
    assert done.returncode == 1 and "vae/mine.safetensors" in done.stdout
    assert tree(overlay) == before | {"vae/mine.safetensors": b"mine"}


def test_a_repair_that_lacks_its_source_says_so_and_a_source_without_repair_is_wrong_use(overlay: Path) -> None:
    (name,) = damage(overlay, "transformer/*.safetensors")
    message = refused(ltxpack("verify", overlay, "--repair"), 1)
    assert name in message
    assert "--source" in message
    refused(ltxpack("verify", overlay, "--source", "x"), 2)


def test_another_source_repairs_nothing(demo: Path, overlay: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(demo / "source", tmp_path / "other"))
    checkpoint = next(other.glob("*-dev*"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000] + bytes(1000))
    damage(overlay, "*/diffusion_pytorch_model*.safetensors")
    before = tree(overlay)
    refused(ltxpack("verify", overlay, "--repair", "--source", other), 1)
    assert tree(overlay) == before


def test_a_repair_that_was_killed_after_its_last_file_leaves_nothing(overlay: Path) -> None:
    work = overlay / ".ltxpack" / "repair" / "vae"
    work.mkdir(parents=True)
    assert not ltxpack("verify", overlay).returncode and work.is_dir()
    assert not ltxpack("verify", overlay, "--repair").returncode and not (overlay / ".ltxpack").exists()
