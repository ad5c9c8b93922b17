"""Half downloads of full size: told by a download program's file beside them, or by the zeros that are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from materialize import tiny_source
from support import Notes, ltxpack, refused, tree

from ltxpack.errors import SourceError
from ltxpack.files.foreign import ENDINGS, finished_name
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import read_tensorfile
from ltxpack.manifest import read_manifest
from ltxpack.materialize import BLOCK, LONG, Options, ZeroStretches, materialize, restore_base

INPUTS = [*tiny_source.NAMES.values(), f"{tiny_source.GEMMA}/model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_download_programs_file_beside_an_input_refuses_it(ending: str, source: Path, out: Path) -> None:
    name = INPUTS[ENDINGS.index(ending) % len(INPUTS)]
    beside = source / (name + ending)
    beside.touch()
    message = refused(ltxpack("materialize", source, out), 1)
    assert str(source / name) in message and "half a download" in message and f"found {beside.name}" in message
    assert not out.exists() and finished_name(beside.name) == Path(name).name
    beside.unlink()
    assert ltxpack("materialize", source, out, "--plan").returncode == 0


def test_a_repair_takes_no_half_either(source: Path, out: Path) -> None:
    materialize(Options(str(source), out), Notes())
    damaged = "vae/diffusion_pytorch_model.safetensors"
    (out / damaged).unlink()
    (source / f"{tiny_source.CHECKPOINT}.part").touch()
    with pytest.raises(SourceError, match="half a download"):
        restore_base(out, read_manifest(out), [damaged], Notes(), source=str(source))


def test_a_file_beside_what_a_link_leads_to_counts(source: Path, out: Path, tmp_path: Path) -> None:
    real = tmp_path / "blob"
    shutil.move(source / tiny_source.CHECKPOINT, real)
    (source / tiny_source.CHECKPOINT).symlink_to(real)
    (tmp_path / "blob.incomplete").touch()
    assert "found blob.incomplete" in refused(ltxpack("materialize", source, out), 1)
    assert "blob.incomplete" in ltxpack("inspect", source / tiny_source.CHECKPOINT).stdout


@pytest.mark.parametrize("copied", [False, True], ids=["linked", "copied"])
def test_zeros_in_what_is_read_are_told_with_their_tensors(copied: bool, tmp_path: Path) -> None:
    config = tiny_source.GEMMA_TEXT | {"vocab_size": 40_000}
    source = tiny_source.make_source(tmp_path / "source")
    before = tree(source)
    notes = Notes()
    materialize(Options(str(source), tmp_path / "sound", copy=copied), notes)
    assert not [text for text in notes.warnings if "zeros" in text] and tree(source) == before
    # A table of embeddings of 1.9 MB of which the rest never came, in a file that is linked or copied whole.
    tiny_source.write_gemma(source / tiny_source.GEMMA, {"model_type": "gemma3", "text_config": config}, 0)
    path = source / tiny_source.GEMMA / "model-00001-of-00002.safetensors"
    table = read_tensorfile(path).tensors["language_model.model.embed_tokens.weight"]
    assert table.nbytes == 1_920_000
    with path.open("r+b") as file:
        file.seek(table.start + 300_000)
        file.write(bytes(table.nbytes - 300_000))
    notes = Notes()
    materialize(Options(str(source), tmp_path / "out", copy=copied), notes)
    (told,) = [text for text in notes.warnings if "zeros" in text]
    assert str(path) in told and f"({table.name})" in told and "1.6 MB" in told


def test_a_checkpoint_that_is_half_zeros_is_told(demo: Path, tmp_path: Path) -> None:
    (whole,) = (demo / "source").glob("*-dev.safetensors")
    half = tmp_path / "half-dev.safetensors"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with half.open("r+b") as file:
        file.truncate(whole.stat().st_size)
    done = ltxpack("materialize", demo / "source", tmp_path / "out", "--checkpoint", half)
    assert done.returncode == 0
    (told,) = [line for line in done.stderr.splitlines() if "zeros" in line]
    assert str(half) in told and "more)" in told and "10." in told.split("MB")[0]


def test_stretches_are_joined_whatever_the_order_of_reading() -> None:
    path, zeros = Path("x"), ZeroStretches()
    size = LONG // 2
    ranges = [Range(path, size + 8, size), Range(path, 8, size), Range(path, 10 * LONG, size)]
    assert all(map(len, zeros.watch(ranges, (memoryview(bytes(size)) for _ in ranges))))
    assert list(zeros.long()) == [Range(path, 8, 2 * size)]
    almost = bytearray(LONG)
    almost[:: BLOCK // 2] = b"\1" * len(almost[:: BLOCK // 2])
    dense = ZeroStretches()
    list(dense.watch([Range(path, 0, LONG)], [memoryview(almost)]))
    assert not list(dense.long())
