"""``export``: the checkpoint's own names, bytes and metadata come back; a bake's bytes are the file's bytes."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from _full_size import make_full_size
from blake3 import blake3
from lora_bake.lora_support import exported
from safetensors.torch import save_file
from support import Done, in_fresh_process, load, ltxpack, refused, tree

import ltxpack.export.plan as exporting
from ltxpack.errors import OverlayError
from ltxpack.export.write import ReadBack, Written
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import DTYPE_BITS, TensorFile, TensorInfo, read_tensorfile
from ltxpack.lora_bake import BakeOptions
from ltxpack.ltx23.renames import TRANSFORMER, component_of
from ltxpack.manifest import MANIFEST_NAME, read_manifest
from ltxpack.materialize.checkpoint import merged_loras, says_distilled
from ltxpack.repack.items import round_to_bfloat16
from ltxpack.repack.staging import Journal
from ltxpack.reporter import SilentReporter

BAKE = "distilled-0.5"
# A write in the middle of an export of the demo.
HALFWAY = 600


def content(file: TensorFile, info: TensorInfo) -> bytes:
    with file.path.open("rb") as opened:
        opened.seek(info.start)
        return opened.read(info.nbytes)


def widened(data: bytes) -> bytes:
    """bfloat16 as float32: its bytes are the upper half."""
    return b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2))


@pytest.fixture
def checkpoint(demo: Path) -> TensorFile:
    (path,) = (demo / "source").glob("*-dev.safetensors")
    return read_tensorfile(path)


def check_base(found: TensorFile, checkpoint: TensorFile) -> None:
    """Names, shapes, bytes and metadata are the checkpoint's; tables are float32, of what bfloat16 keeps of them."""
    assert found.tensors.keys() == checkpoint.tensors.keys()
    for name, info in checkpoint.tensors.items():
        ours, theirs = content(found, found.tensors[name]), content(checkpoint, info)
        assert found.tensors[name].shape == info.shape, name
        if "scale_shift_table" not in name:
            assert (found.tensors[name].dtype, ours) == (info.dtype, theirs), name
            continue
        assert found.tensors[name].dtype == "F32", name
        if info.dtype == "F32":
            theirs = round_to_bfloat16(np.frombuffer(theirs, "<f4")).tobytes()
        assert ours == widened(theirs), name
    metadata = dict(found.metadata)
    told = json.loads(metadata.pop("ltxpack"))
    assert metadata == checkpoint.metadata
    assert "not the published one" in told["notice"] and told["source"][0]["name"] == checkpoint.path.name
    order = [(-DTYPE_BITS[info.dtype], name) for name, info in found.tensors.items()]
    assert order == sorted(order) and all(
        info.start % (DTYPE_BITS[info.dtype] // 8) == 0 for info in found.tensors.values()
    )


def test_the_base_is_the_checkpoint_bit_for_bit(demo: Path, checkpoint: TensorFile, tmp_path: Path) -> None:
    check_base(exported(demo / "overlay", tmp_path / "base.safetensors"), checkpoint)


def test_the_base_of_a_golden_checkpoint_is_that_checkpoint(golden: Path, tmp_path: Path) -> None:
    checkpoint = read_tensorfile(next(golden.glob("*-dev.safetensors")))
    assert ltxpack("materialize", golden, tmp_path / "out").returncode == 0
    check_base(exported(tmp_path / "out", tmp_path / "base.safetensors"), checkpoint)


def test_what_is_exported_makes_the_same_overlay_again(demo: Path, tmp_path: Path) -> None:
    """The tables were rounded when the first overlay was made, and come out of float32 as they went in."""
    output = tmp_path / "ltx-2.3-demo-dev.safetensors"
    exported(demo / "overlay", output)
    given = [f"--{role}={next((demo / 'source').glob(name))}" for role, name in OTHERS.items()]
    merged = exported(demo / "overlay", tmp_path / "ltx-2.3-mine-dev.safetensors", "--bake", BAKE)
    told = ltxpack("materialize", merged.path, tmp_path / "merged", *given, "--plan").stderr
    assert "warning" in told and "demo-distilled-lora-8.safetensors at 0.5" in told
    done = ltxpack("materialize", output, tmp_path / "again", *given)
    assert done.returncode == 0 and "merged" not in done.stderr, done.stderr
    before, after = tree(demo / "overlay"), tree(tmp_path / "again")
    told = (MANIFEST_NAME, "source/metadata.json")  # name and hash of the source, and what it says of itself
    assert {name: data for name, data in after.items() if name not in told} == {
        name: data for name, data in before.items() if name not in told and not name.startswith("bakes/")
    }


def test_an_export_of_an_export_says_what_is_in_it(demo: Path, tmp_path: Path) -> None:
    merged = exported(demo / "overlay", tmp_path / "a.safetensors", "--bake", BAKE)
    given = [f"--{role}={next((demo / 'source').glob(name))}" for role, name in OTHERS.items()]
    assert ltxpack("materialize", merged.path, tmp_path / "out", *given).returncode == 0
    again = exported(tmp_path / "out", tmp_path / "b.safetensors")
    assert merged_loras(again) == merged_loras(merged) == ["ltx-2.3-demo-distilled-lora-8.safetensors at 0.5"]
    stated = json.loads(again.metadata["ltxpack"])
    assert stated["kind"] == "distilled" and "1 LoRA merged" in stated["notice"] and says_distilled(again)
    third = exported(tmp_path / "out", tmp_path / "c.safetensors", "--strength", "0.25", "--force")
    assert [told[-8:] for told in merged_loras(third)] == ["s at 0.5", " at 0.25"]


def test_an_export_says_nothing_of_codes_that_it_does_not_have(demo: Path, tmp_path: Path) -> None:
    """The metadata of a bf16 file that somebody made from an fp8 one list linears in codes."""
    [source] = (demo / "source").glob("*-dev.safetensors")
    stale = json.dumps({"layers": {"model.diffusion_model.transformer_blocks.0.attn1.to_q": {}}})
    checkpoint = tmp_path / "x-dev.safetensors"
    save_file(load(source), checkpoint, {**read_tensorfile(source).metadata, "_quantization_metadata": stale})
    given = [f"--{role}={next((demo / 'source').glob(name))}" for role, name in OTHERS.items()]
    assert ltxpack("materialize", checkpoint, tmp_path / "out", *given).returncode == 0
    assert "_quantization_metadata" not in exported(tmp_path / "out", tmp_path / "x.safetensors").metadata


OTHERS = {"lora": "*lora*.safetensors", "upsampler": "*upscaler*.safetensors", "text-encoder": "gemma*"}


def test_a_bake_is_its_own_bytes_in_two_exports_that_are_one(demo: Path, tmp_path: Path) -> None:
    overlay = demo / "overlay"
    found = exported(overlay, tmp_path / "a.safetensors", "--bake", BAKE)
    exported(overlay, tmp_path / "b.safetensors", "--bake", BAKE)
    told = json.loads(found.metadata["ltxpack"])
    assert told["bake"] == BAKE and [lora["strength"] for lora in told["loras"]] == [0.5]
    # The name of a file is not part of it.
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    shards = map(read_tensorfile, (overlay / "bakes" / BAKE).glob("*.safetensors"))
    baked = {info.name: content(shard, info) for shard in shards for info in shard.tensors.values()}
    of_transformer = {name: info for name, info in found.tensors.items() if component_of(name) == "transformer"}
    assert {TRANSFORMER.rename(name) for name in of_transformer} == baked.keys()
    for name, info in of_transformer.items():
        expected = baked[TRANSFORMER.rename(name)]
        assert content(found, info) == (widened(expected) if info.dtype == "F32" else expected), name


def test_the_transformer_alone_has_the_connectors_and_no_more(
    demo: Path, checkpoint: TensorFile, tmp_path: Path
) -> None:
    found = exported(demo / "overlay", tmp_path / "t.safetensors", "--parts", "transformer")
    assert found.tensors.keys() == {name for name in checkpoint.tensors if name.startswith("model.diffusion_model.")}
    assert any("embeddings_connector" in name for name in found.tensors)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published overlay without LoRA and bakes; its holes are not hashed."""
    overlay = make_full_size(tmp_path_factory.mktemp("full") / "out", hashed=False)
    manifest = dataclasses.replace(read_manifest(overlay), loras=(), bakes={})
    (overlay / MANIFEST_NAME).write_bytes(manifest.dump())
    return overlay


@pytest.mark.parametrize(
    ("parts", "form", "blocks", "nbytes"),
    [
        ("all", "", 0, 46148472534),
        ("transformer", "", 0, 42019470848),
        ("all", "fp8", 44, 29143989654),
        ("transformer", "fp8", 44, 25014987968),
        ("all", "fp8", 48, 27598127574),
        ("transformer", "fp8", 48, 23469125888),
        ("all", "int8", 44, 29161312982),
        ("transformer", "int8", 44, 25032311296),
        ("all", "int8", 48, 27617025750),
        ("transformer", "int8", 48, 23488024064),
    ],
)
def test_the_plan_of_the_published_model_is_exact(
    parts: str, form: str, blocks: int, nbytes: int, full_size: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of all tensors as spec 09, section 8 counts them."""
    monkeypatch.setattr(exporting, "_metadata", lambda *inputs: {})
    make = None
    if form:
        make = BakeOptions(full_size, (0.0,), formats=(form,), keep_blocks=None if blocks == 44 else ())
    options = exporting.ExportOptions(full_size, tmp_path / "x.safetensors", make=make, parts=parts)
    plan = exporting.plan_export(options, SilentReporter(), headers_only=True)
    assert plan.size - len(plan.header) == nbytes + sum(map(len, plan.literals.values()))
    coded = {"fp8": 2, "int8": 1, "": 0}[form] + (parts == "transformer" and form != "")
    assert plan.tensors == (5947 if parts == "all" else 4444) + 34 * blocks * coded


def test_a_plan_needs_neither_torch_nor_much_memory(full_size: Path) -> None:
    code = """
    import sys
    from pathlib import Path
    import ltxpack.export.plan as exporting
    from ltxpack.lora_bake import BakeOptions
    from ltxpack.reporter import SilentReporter
    exporting._metadata = lambda *inputs: {}
    overlay = Path(sys.argv[1])
    make = BakeOptions(overlay, (0.0,), formats=("fp8",), keep_blocks=())
    options = exporting.ExportOptions(overlay, Path("x.safetensors"), make=make)
    exporting.plan_export(options, SilentReporter(), headers_only=True).size
    answer = "torch" in sys.modules
    """
    loads_torch, peak = in_fresh_process(code, full_size)
    assert not loads_torch and peak < 100e6


def test_the_main_thread_imports_nothing_that_the_import_of_torch_needs(demo: Path) -> None:
    # Ctrl-C in a thread that waits for another one's import can leave a lock of Python's imports held for ever.
    code = """
    import sys, time, types
    from pathlib import Path
    from ltxpack.cli.terminal import TerminalReporter
    from ltxpack.export.plan import ExportOptions, plan_export
    baking = sys.modules["ltxpack.lora_bake.bake"]
    answer = []
    def slow(name):
        before = set(sys.modules)
        time.sleep(1)
        answer.extend([name, *set(sys.modules).difference(before)])
    load = lambda name: slow(name) if name == "torch" else __import__(name)
    baking.importlib = types.SimpleNamespace(import_module=load)
    overlay = Path(sys.argv[1])
    make = baking.BakeOptions(overlay, (0.5,))
    plan_export(ExportOptions(overlay, Path("x.safetensors"), make=make), TerminalReporter())
    """
    assert in_fresh_process(code, demo / "overlay")[0] == ["torch"]


def test_the_plan_is_the_size_of_the_file(demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    planned = ltxpack("export", demo / "overlay", "-o", output, "--plan", "--json")
    assert planned.returncode == 0 and not output.exists()
    plan = json.loads(planned.stdout)
    done = ltxpack("export", demo / "overlay", "-o", output, "--json")
    report = json.loads(done.stdout)
    assert plan["files"] == [{"path": str(output), "bytes": output.stat().st_size, "action": "write"}]
    assert plan["total_bytes"] == report["bytes"] == output.stat().st_size


def test_wrong_use(demo: Path, tmp_path: Path) -> None:
    overlay, output = demo / "overlay", tmp_path / "x.safetensors"
    message = refused(ltxpack("export", overlay, "-o", output, "--bake", "mine"), 2)
    assert "no such bake" in message and BAKE in message
    assert "no name for a safetensors file" in refused(ltxpack("export", overlay, "-o", tmp_path / "x.pt"), 2)
    assert "is inside the overlay" in refused(ltxpack("export", overlay, "-o", overlay / "x.safetensors"), 2)
    assert "is not an overlay" in refused(ltxpack("export", demo / "source", "-o", output), 1)
    output.write_bytes(b"mine")
    assert "exists already" in refused(ltxpack("export", overlay, "-o", output), 2)
    assert output.read_bytes() == b"mine"
    exported(overlay, output, "--force")


def test_an_overlay_that_kept_no_metadata_or_that_changed_is_told(overlay: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    manifest = overlay / MANIFEST_NAME
    kept = overlay / "source" / "metadata.json"
    said = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(said.replace(b"2.3", b"2.4"))
    assert "has changed since" in refused(ltxpack("export", overlay, "-o", output), 1)
    document = json.loads(manifest.read_text())
    document["files"] = [file for file in document["files"] if file["path"] != "source/metadata.json"]
    manifest.unlink()
    manifest.write_text(json.dumps(document))
    message = refused(ltxpack("export", overlay, "-o", output), 1)
    assert "did not keep the checkpoint's metadata" in message and "--source SOURCE" in message
    assert not output.exists()


@pytest.mark.parametrize("flags", ["", "--format fp8 --keep-blocks none"])
def test_a_shard_that_changed_is_told(flags: str, overlay: Path, tmp_path: Path) -> None:
    """One that is longer before, one of other content while the transformer is made."""
    record = next(file for file in read_manifest(overlay).components["vae"].files if file.path.endswith(".safetensors"))
    path, output = overlay / record.path, tmp_path / "x.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if flags else data + bytes(4))
    message = refused(ltxpack("export", overlay, "-o", output, *flags.split()), 1)
    assert record.path in message and "ltxpack verify" in message and not output.exists()


FAULTS = {"interrupt": KeyboardInterrupt(), "full": OSError(errno.ENOSPC, "No space left on device")}


def spoiled(fault: str, overlay: Path, output: Path) -> Done:
    """An export in whose midst one write fails, or writes zeros to the disk without a word."""
    real, calls = os.pwrite, itertools.count()

    def written(fd: int, data: memoryview, offset: int) -> int:
        if next(calls) == HALFWAY:
            if fault in FAULTS:
                raise FAULTS[fault]
            data = memoryview(bytes(len(data)))
        return real(fd, data, offset)

    with mock.patch.object(os, "pwrite", written):
        done = ltxpack("export", overlay, "-o", output, "--force")
    assert next(calls) > HALFWAY
    return done


@pytest.mark.parametrize("fault", ["disk", *FAULTS])
def test_what_goes_wrong_leaves_no_file(fault: str, demo: Path, tmp_path: Path) -> None:
    """Nor changes the one that is there; what is sound of the work is used by the next run."""
    output, work = tmp_path / "x.safetensors", tmp_path / ".x.safetensors.ltxpack"
    output.write_bytes(b"mine")
    done = spoiled(fault, demo / "overlay", output)
    assert done.returncode == (130 if fault == "interrupt" else 1)
    told = {"disk": "did not come back from the disk", "interrupt": "goes on from there", "full": "the disk is full"}
    assert told[fault] in done.stderr and output.read_bytes() == b"mine"
    assert work.exists() == (fault != "disk")
    again = ltxpack("export", demo / "overlay", "-o", output, "--force")
    assert again.returncode == 0 and ("going on" in again.stderr) == (fault != "disk")
    exported(demo / "overlay", tmp_path / "y.safetensors")
    assert output.read_bytes() == (tmp_path / "y.safetensors").read_bytes() and not work.exists()


def test_what_an_earlier_run_wrote_is_read_back(demo: Path, tmp_path: Path) -> None:
    output, work = tmp_path / "x.safetensors", tmp_path / ".x.safetensors.ltxpack"
    assert spoiled("interrupt", demo / "overlay", output).returncode == 130
    plan = exporting.plan_export(exporting.ExportOptions(demo / "overlay", output), SilentReporter())
    done = Journal.read(work / "journal.jsonl").records
    unit = next(unit for unit in plan.units if unit.shard.record.path in done)
    name = next(name for name, spec in unit.exported.items() if spec.nbytes)
    with (work / "unfinished.safetensors").open("r+b") as file:
        file.seek(plan.spans[name][0])
        data = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([data[0] ^ 1]))
    again = ltxpack("export", demo / "overlay", "-o", output)
    assert "did not come back from the disk" in refused(again, 1) and name in again.stderr
    assert not work.exists() and not output.exists()


def test_bytes_are_compared_before_the_last_of_them_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 64)
    monkeypatch.setattr("ltxpack.export.write.BATCH", 5000)
    back = ReadBack(path)
    digest = blake3(path.read_bytes()[100:5100]).hexdigest()
    for name, offset in (("sound", 100), ("other bytes", 101)):
        back.add(Written(name, Range(path, offset, 5000), digest))
    deadline = time.monotonic() + 60
    with pytest.raises(OverlayError, match="did not come back") as told:
        while time.monotonic() < deadline:
            back.add(Written("empty", Range(path, 0, 0), ""))
    assert told.value.tensor == "other bytes" and back.failed
    back.stop()
