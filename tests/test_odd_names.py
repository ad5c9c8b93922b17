"""Files with names that Windows or another encoding made: an overlay records them so that it can be read again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from materialize import tiny_source
from support import ltxpack, refused

from ltxpack.errors import quoted
from ltxpack.manifest import read_manifest

LATIN_1 = os.fsdecode(b"gr\xfcn")
RECORDED = r"gr\udcfcn"


def renamed(path: Path, old: str, new: str) -> Path:
    """``path`` with ``new`` for ``old`` in its name."""
    try:
        return path.rename(path.with_name(path.name.replace(old, new)))
    except OSError:
        pytest.skip("this filesystem takes UTF-8 names only")


def test_an_overlay_of_files_with_such_names_can_be_read(tmp_path: Path) -> None:
    source, out = tiny_source.make_source(tmp_path / "source"), tmp_path / "out"
    for name in ("-dev", "-spatial-upscaler-x2"):
        renamed(next(source.glob(f"*{name}*.safetensors")), name, f"{LATIN_1}{name}")
    for told in ("", "nothing to do"):
        done = ltxpack("materialize", source, out)
        assert done.returncode == 0 and told in done.stdout, done.stderr
    files = {file.role: file.name for file in read_manifest(out).source.files}
    assert RECORDED in files["checkpoint"] and RECORDED in files["upsampler"]
    (out / "vae" / "config.json").unlink()
    repaired = ltxpack("verify", out, "--repair", "--source", source)
    assert repaired.returncode == 0, repaired.stderr


def test_a_bake_with_a_lora_of_such_a_name_can_be_read(overlay: Path, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    shutil.copy(next((overlay / "loras").iterdir()), lora)
    lora = renamed(lora, "style", LATIN_1)
    for told in ("baked", "there already"):
        done = ltxpack("bake-lora", overlay, "--strength", "0.5", "--add", f"{lora}=0.3")
        assert done.returncode == 0 and told in done.stdout, (done.stdout, done.stderr)
    added, _ = read_manifest(overlay).bakes["distilled-0.5+gr-n-0.3"].loras
    assert added.file == f"{RECORDED}.safetensors"


def test_a_lora_or_a_shard_that_an_overlay_would_keep_by_such_a_name_is_refused(tmp_path: Path) -> None:
    source, out = tiny_source.make_source(tmp_path / "source"), tmp_path / "out"
    (source / "gemma" / "model.safetensors.index.json").unlink()
    for shard in (source / "gemma").glob("model-*.safetensors"):
        renamed(shard, "model", LATIN_1)
    said = refused(ltxpack("materialize", source, out), 1)
    assert "has shards with names that no overlay may hold" in said and RECORDED in said
    done = ltxpack("materialize", source, out, "--lora", renamed(next(source.glob("*lora*")), "lora", LATIN_1))
    assert "has a name that no overlay may hold" in refused(done, 1)


@pytest.mark.parametrize(
    "arguments",
    ["materialize {source} EMPTY", "demo EMPTY", "verify EMPTY", "export {source} -o EMPTY", "plan --page EMPTY"],
)
def test_an_empty_name_is_not_the_current_folder(arguments: str, tmp_path: Path) -> None:
    """As an unset variable of a shell gives it: ``materialize`` and ``demo`` filled the current folder."""
    words = ["" if word == "EMPTY" else word for word in arguments.format(source=tmp_path).split()]
    assert "the name of a file or folder is empty" in refused(ltxpack(*words, cwd=tmp_path), 2)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("output", [".", "/", ".."])
def test_an_export_to_a_folder_is_refused_with_a_name_in_it(output: str, overlay: Path, tmp_path: Path) -> None:
    told = refused(ltxpack("export", overlay, "-o", output, cwd=tmp_path), 2)
    assert "expected a name ending in .safetensors" in told and "/ltx-2.3.safetensors" in told


def test_a_folder_whose_name_looks_like_an_option_can_be_typed() -> None:
    assert (quoted(Path("-out")), quoted(Path("a -b")), quoted("-x")) == ("./-out", "'a -b'", "-x")
