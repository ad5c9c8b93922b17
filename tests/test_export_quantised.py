"""``export`` of quantised linears: a bake's codes under official names, marked so that loaders know them."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from lora_bake.lora_support import baked, exported
from materialize.fake_hub import FakeHub
from safetensors.torch import save_file
from support import FORKS, dying_at, load, load_all, ltxpack, refused

from ltxpack.export import ExportOptions, export
from ltxpack.files.tensorfile import TensorFile
from ltxpack.lora_bake import BakeOptions
from ltxpack.ltx23.renames import TRANSFORMER
from ltxpack.manifest import MANIFEST_NAME
from ltxpack.materialize import access
from ltxpack.materialize.inspect import inspect_path
from ltxpack.reporter import SilentReporter

ROOT = "model.diffusion_model."
FP8 = ("--format", "fp8", "--keep-blocks", "none")


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.view(-1).view(torch.uint8).equal(
        right.contiguous().view(-1).view(torch.uint8)
    )  # fmt: skip


def coded(file: TensorFile, dtype: str = "F8_E4M3") -> set[str]:
    """The linears in codes, by the tensors."""
    return {name.removesuffix(".weight") for name, info in file.tensors.items() if info.dtype == dtype}


@pytest.mark.parametrize(
    "flags", [f"--strength 0.5 --format {form} --keep-blocks none" for form in ("fp8", "int8")] + ["--strength 0.5@0:0"]
)
def test_an_export_on_the_way_is_that_of_the_bake(flags: str, overlay: Path, tmp_path: Path) -> None:
    baked(overlay, *flags.split(), "--name", "mine")
    exported(overlay, tmp_path / "way.safetensors", *flags.split())
    exported(overlay, tmp_path / "bake.safetensors", "--bake", "mine")
    on_the_way, found = load(tmp_path / "way.safetensors"), load(tmp_path / "bake.safetensors")
    assert on_the_way.keys() == found.keys()
    assert all(same(on_the_way[name], found[name]) for name in found)
    for name, tensor in load_all(overlay / "bakes" / "mine").items():
        official = TRANSFORMER.reverse().rename(name)
        assert same(found[official], tensor.float() if "scale_shift_table" in official else tensor), name
    told = ltxpack("materialize", tmp_path / "bake.safetensors", tmp_path / "x", "--plan").stderr
    assert ("is quantised" if "--format" in flags else "0.5@0:0") in told


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_loaders_find_what_is_quantised(form: str, demo: Path, tmp_path: Path) -> None:
    flags = ("--strength", "0.5", "--format", form, "--keep-blocks", "none")
    whole = exported(demo / "overlay", tmp_path / "all.safetensors", *flags)
    alone = exported(demo / "overlay", tmp_path / "t.safetensors", *flags, "--parts", "transformer")
    linears = coded(whole, {"fp8": "F8_E4M3", "int8": "I8"}[form])
    assert linears and all(name.startswith(f"{ROOT}transformer_blocks.") for name in linears)
    text = whole.metadata["_quantization_metadata"]
    stated = json.loads(text)
    assert text == json.dumps(stated) and stated.keys() == {"format_version", "layers"}
    assert stated["format_version"] == "1.0" and stated["layers"].keys() == linears
    assert "_quantization_metadata" not in alone.metadata
    markers = {name: tensor for name, tensor in load(alone.path).items() if name.endswith(".comfy_quant")}
    assert {name.removesuffix(".comfy_quant"): json.loads(bytes(data.tolist())) for name, data in markers.items()} == (
        stated["layers"]
    )
    assert list(alone.tensors)[-len(markers) :] == sorted(markers)
    for linear, mark in stated["layers"].items():
        weight, scale = whole.tensors[f"{linear}.weight"], whole.tensors[f"{linear}.weight_scale"]
        assert (f"{linear}.input_scale" in whole.tensors) == (form == "fp8")
        if form == "fp8":
            assert mark == {"format": "float8_e4m3fn"} and scale.shape == ()
            continue
        size = mark.pop("convrot_groupsize")
        assert mark == {"format": "int8_tensorwise", "convrot": True} and scale.shape == (weight.shape[0], 1)
        assert weight.shape[1] % size == 0 and size in (4, 16, 64, 256)
    for file, parts in ((whole, "all"), (alone, "transformer")):
        facts = inspect_path(file.path)
        assert (facts["form"], facts["parts"]) == ({"fp8": "fp8-scaled", "int8": "int8-rotated"}[form], parts)
        assert not facts["faults"], facts["faults"]
    told = json.loads(whole.metadata["ltxpack"])
    assert f"{len(linears)} linears quantised to {form}" in told["notice"] and told["loras"][0]["strength"] == 0.5
    assert whole.metadata["model_version"] == alone.metadata["model_version"]


def test_what_the_command_says_last(demo: Path, tmp_path: Path) -> None:
    overlay, output = demo / "overlay", tmp_path / "x.safetensors"
    said = ltxpack("export", overlay, "-o", output, *FP8).stdout
    assert "fp8-scaled-mm" in said and "CheckpointLoaderSimple" in said and "not calibrated" in said
    said = ltxpack(
        "export", overlay, "-o", output, "--format", "int8", *FP8[2:], "--force", "--parts", "transformer"
    ).stdout
    assert "cannot read int8" in said and "UNETLoader" in said and "not calibrated" not in said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--bake distilled-0.5 --strength 1", "--bake is copied as it is"),
        ("--bake distilled-0.5 --format fp8", "copied as it is stored"),
        ("--add x.safetensors=1", "need a --strength"),
        ("--rule official --allow-unmatched", "the base is copied as it is"),
        ("--keep-blocks none", "goes with --format fp8"),
        ("--format int8 --activations a.safetensors", "--strength 0 --format fp8 --activations a.safetensors"),
        ("--strength 1 --format fp8 --keep-blocks 99", "a block that is not there"),
    ],
)
def test_what_does_not_go_together_is_wrong_use(flags: str, told: str, demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    assert told in refused(ltxpack("export", demo / "overlay", "-o", output, *flags.split()), 2)
    assert not list(tmp_path.iterdir())


def test_an_earlier_overlay_takes_its_metadata_from_the_source(
    overlay: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((overlay / MANIFEST_NAME).read_text())
    manifest["files"] = [file for file in manifest["files"] if file["path"] != "source/metadata.json"]
    (overlay / MANIFEST_NAME).unlink()
    (overlay / MANIFEST_NAME).write_text(json.dumps(manifest))
    wanted = exported(demo / "overlay", tmp_path / "a.safetensors")
    [checkpoint] = (demo / "source").glob("*-dev.safetensors")
    hub = FakeHub({"someone/repo": demo / "source"})
    monkeypatch.setattr(access, "Hub", lambda **_: hub)
    for source in (demo / "source", checkpoint, "someone/repo"):
        exported(overlay, tmp_path / "b.safetensors", "--source", source, "--force")
        assert (tmp_path / "b.safetensors").read_bytes() == wanted.path.read_bytes()
    assert hub.fetched("") == [], "the header alone"
    output, shorter = tmp_path / "c.safetensors", tmp_path / "dev.safetensors"
    shutil.copy(wanted.path, shorter)
    told = refused(ltxpack("export", overlay, "-o", output, "--source", shorter), 1)
    assert "is not the checkpoint of this overlay" in told
    data = checkpoint.read_bytes()
    shorter.write_bytes(data.replace(b'"license":', b'"nothing":').replace(b'"licence":', b'"nothing":'))
    manifest["licence"] = "LTX-2 Community License"
    (overlay / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert data != shorter.read_bytes()
    assert "has no licence text" in refused(ltxpack("export", overlay, "-o", output, "--source", shorter), 1)
    manifest["source"]["files"] = []
    (overlay / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert "does not record" in refused(ltxpack("export", overlay, "-o", output, "--source", shorter), 1)


def export_until_killed(options: ExportOptions, kill_at: int) -> None:
    """Before the ``kill_at``-th change of the disk the process ends."""
    calls = dying_at(kill_at, "pwrite", "fsync", "replace", "rename", "unlink", "rmdir")
    export(options, SilentReporter())
    (options.output.parent / "calls").write_text(str(next(calls) - 1))


@pytest.mark.skipif(sys.platform != "linux", reason="forks a server and sends signals")
def test_killed_anywhere_and_run_again_it_is_the_same_file(demo: Path, tmp_path: Path) -> None:
    output, work = tmp_path / "x.safetensors", ".x.safetensors.ltxpack"
    make = BakeOptions(demo / "overlay", (0.5,), formats=("fp8",), keep_blocks=())
    options = ExportOptions(demo / "overlay", output, make=make)

    def run(kill_at: int) -> int | None:
        process = FORKS.Process(target=export_until_killed, args=(options, kill_at))
        process.start()
        process.join()
        return process.exitcode

    assert run(0) == 0
    whole, count = output.read_bytes(), int((tmp_path / "calls").read_text())
    rng = random.Random(0)
    for kill_at in (1, *sorted(rng.sample(range(2, count), 5)), count - 3, count - 1):
        output.unlink(missing_ok=True)
        assert run(kill_at) == -signal.SIGKILL
        assert not output.exists() or output.read_bytes() == whole
        if not output.exists() and rng.random() < 0.5:
            assert run(rng.randrange(1, count)) in (0, -signal.SIGKILL)
        if not output.exists():
            assert ltxpack("export", demo / "overlay", "-o", output, "--strength", "0.5", *FP8).returncode == 0
        assert output.read_bytes() == whole
        assert {path.name for path in tmp_path.iterdir()} <= {output.name, "calls", work, f".{work}.lock"}
    exported(demo / "overlay", output, "--strength", "0.5", *FP8, "--force")
    assert {path.name for path in tmp_path.iterdir()} == {output.name, "calls"}


def test_sums_that_are_not_finite_are_named_and_leave_nothing(demo: Path, tmp_path: Path) -> None:
    [own] = (demo / "source").glob("*lora*.safetensors")
    huge = tmp_path / "huge.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load(own).items()}, huge)
    for form in ("bf16", "fp8", "int8"):
        flags = ("--lora", huge, "--strength", "1", "--format", form, *(FP8[2:] if form != "bf16" else ()))
        told = refused(ltxpack("export", demo / "overlay", "-o", tmp_path / "x.safetensors", *flags), 1)
        assert "the result is beyond BF16" in told and ".weight\n  - and 86 more\n" in told
        assert list(tmp_path.iterdir()) == [huge]
