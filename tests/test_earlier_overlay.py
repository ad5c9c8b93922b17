"""An overlay that an earlier version made still verifies, takes another bake and runs.

tests/data/overlay-9f9b28e.tar.xz holds ``source/``, and ``overlay/`` with a bake at 0.5, as the code of commit 9f9b28e
made them: its demo's checkpoint with two heads and a narrow decoder, and with values that compress well.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from support import DATA, Done, load, ltxpack

from ltxpack.manifest import read_manifest

SIZE = ("--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2", "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with ``source`` and ``overlay``; the tests go on from one another's work in it."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(DATA / "overlay-9f9b28e.tar.xz") as archive:
        # Python before 3.11.4 has no filters.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


def done(*command: str | Path) -> Done:
    found = ltxpack(*command)
    assert found.returncode == 0, found.stderr
    return found


def test_it_verifies_and_takes_another_bake(earlier: Path) -> None:
    overlay = earlier / "overlay"
    done("verify", overlay)
    manifest = read_manifest(overlay)
    done("bake-lora", overlay, "--strength", "0.25")
    made = read_manifest(overlay)
    assert [*made.bakes] == ["distilled-0.25", "distilled-0.5"]
    assert made.bakes["distilled-0.5"] == manifest.bakes["distilled-0.5"]
    done("verify", overlay)


def test_the_same_bake_has_the_same_numbers(earlier: Path) -> None:
    """All but a few: another processor may add in another order, and then round another way."""
    overlay = earlier / "overlay"
    assert "already" in done("bake-lora", overlay, "--strength", "0.5").stdout
    done("bake-lora", overlay, "--strength", "0.5", "--name", "again")
    then, now = (load(next((overlay / "bakes" / name).glob("*.safetensors"))) for name in ("distilled-0.5", "again"))
    assert then.keys() == now.keys()
    others = sum(int((then[name] != now[name]).sum()) for name in then)
    assert others <= 0.001 * sum(tensor.numel() for tensor in then.values())


def test_it_runs(earlier: Path) -> None:
    video, tensors = earlier / "video.mp4", earlier / "video.safetensors"
    stages = ("--stage1", "base", "--stage2", "distilled-0.5")
    done("run", earlier / "overlay", "--prompt", "x", *SIZE, *stages, "-o", video, "--save-tensors", tensors)
    assert video.stat().st_size
    assert all(tensor.isfinite().all() for tensor in load(tensors).values())


def test_materialized_again_it_is_already_there_but_for_the_metadata(earlier: Path) -> None:
    told = done("materialize", earlier / "source", earlier / "overlay")
    assert "already" in told.stdout
    assert "source/metadata.json" in told.stderr and "--force" in told.stderr
