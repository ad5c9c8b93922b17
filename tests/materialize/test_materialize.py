"""From a source to an overlay, whole: the files, their bytes, the manifest, and doing it again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from materialize import tiny_source
from materialize.fake_hub import FakeHub
from materialize.modules import module_class
from safetensors.torch import load_file
from support import Notes, in_fresh_process, tree

from ltxpack.errors import LtxpackError, OverlayError, SourceError
from ltxpack.files.tensorfile import build_header, read_tensorfile
from ltxpack.ltx23.classes import COMPONENTS
from ltxpack.ltx23.releases import TEXT_ENCODER_REPO
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, component_of
from ltxpack.manifest import Bake, BakedLora, read_manifest
from ltxpack.materialize import Options, Report, materialize, plan_overlay
from ltxpack.materialize.existing import differences
from ltxpack.repack.verify import verify
from ltxpack.reporter import SilentReporter


def run(
    source: Path | str, overlay: Path, notes: Notes | None = None, hub: FakeHub | None = None, **more: object
) -> Report:
    return materialize(Options(str(source), overlay, **more), notes or Notes(), hub)  # type: ignore[arg-type]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = load_file(path)
        assert not shard.keys() & found.keys()
        found.update(shard)
    return found


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    assert torch.equal(found.view(torch.int16), expected.to(torch.bfloat16).view(torch.int16))


# The golden fixture


@pytest.fixture(scope="session")
def overlay(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay of a golden fixture."""
    folder = tmp_path_factory.mktemp("golden") / "out"
    run(golden, folder)
    return folder


def test_golden_every_tensor_is_the_sources(golden: Path, overlay: Path) -> None:
    (path,) = golden.glob("*-dev.safetensors")
    checkpoint = load_file(path)
    written = {component: tensors(overlay / component) for component in CHECKPOINT_TABLES}
    for name, tensor in checkpoint.items():
        component = component_of(name)
        assert component is not None
        assert_same_bits(written[component].pop(CHECKPOINT_TABLES[component].rename(name)), tensor)
    assert not any(written.values())


@pytest.mark.parametrize("component", [*CHECKPOINT_TABLES, "latent_upsampler"])
def test_golden_diffusers_loads_each_component_strictly(overlay: Path, component: str) -> None:
    model, info = module_class(component).from_pretrained(
        overlay / component, dtype=torch.bfloat16, output_loading_info=True, local_files_only=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    stored = tensors(overlay / component)
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert not [name for name, tensor in state.items() if tensor.is_meta]
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.bfloat16"}
    for name, tensor in stored.items():
        assert torch.equal(state[name].to(torch.bfloat16), tensor), name


def test_golden_transformers_loads_the_text_encoder_strictly(overlay: Path) -> None:
    import transformers

    model, info = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        overlay / "text_encoder", dtype=torch.bfloat16, output_loading_info=True, local_files_only=True
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["missing_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(overlay / "tokenizer", local_files_only=True)
    assert len(tokenizer("a beach")["input_ids"]) > 1
    assert model.config.text_config.num_hidden_layers > 0


def test_golden_plan_and_overlay_agree(golden: Path, overlay: Path) -> None:
    plan = plan_overlay(Options(str(golden), overlay), SilentReporter()).to_json()
    sizes = {path: len(content) for path, content in tree(overlay).items() if path != "ltxpack.json"}
    assert {file["path"]: file["bytes"] for file in plan["files"]} == sizes
    assert plan["missing"] == []
    assert plan["total_bytes"] == sum(sizes.values())


# The miniature, everywhere


def test_overlay_of_the_miniature(source: Path, out: Path, tmp_path: Path) -> None:
    out.mkdir()  # an empty folder is a good place
    report = run(source, out)
    assert report.written
    found = tree(out)
    for name in ("transformer", "connectors", "vae", "audio_vae", "vocoder", "latent_upsampler"):
        assert f"{name}/config.json" in found and f"{name}/diffusion_pytorch_model.safetensors" in found
    assert found[f"loras/{tiny_source.LORA}"] == (source / tiny_source.LORA).read_bytes()
    assert not [name for name in found if not name.endswith((".safetensors", ".json", ".jinja"))]
    assert verify(out, SilentReporter()) == []
    assert str(tmp_path) not in found["ltxpack.json"].decode()
    assert report.total_bytes == sum(map(len, found.values())) - len(found["ltxpack.json"])
    run(source, tmp_path / "again")
    assert tree(tmp_path / "again") == found
    manifest = read_manifest(out)
    assert (manifest.model_version, manifest.image_crf, manifest.licence) == ("2.3.0", 33, "none, random")
    assert manifest.source.repo is None
    roles = [(file.role, file.name) for file in manifest.source.files]
    assert roles[:3] == [*tiny_source.NAMES.items()] and {role for role, _ in roles[3:]} == {"text_encoder"}
    assert {name: part.class_name for name, part in manifest.components.items()} == {
        name: component.name for name, component in COMPONENTS.items()
    }
    assert [lora.name for lora in manifest.loras] == ["distilled"]
    assert [file.path for file in manifest.files] == ["model_index.json", "source/metadata.json"]


def test_small_shards_are_indexed(source: Path, out: Path, tmp_path: Path) -> None:
    run(source, out, max_shard_size=20_000)
    folder = out / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(set(index["weight_map"].values())) == shards
    whole = tmp_path / "whole"
    run(source, whole)
    expected = tensors(whole / "transformer")
    found = tensors(folder)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_f32_tables_give_the_same_shards(tmp_path: Path) -> None:
    plain = tiny_source.make_source(tmp_path / "plain")
    wide = tiny_source.make_source(tmp_path / "wide", dtypes=tiny_source.f32_tables)
    notes = Notes()
    run(plain, tmp_path / "a")
    run(wide, tmp_path / "b", notes)
    for component in CHECKPOINT_TABLES:
        assert tree(tmp_path / "a" / component) == tree(tmp_path / "b" / component)
    tables = {name for name in tensors(tmp_path / "b" / "transformer") if "scale_shift_table" in name}
    assert set(read_manifest(tmp_path / "b").components["transformer"].cast) == tables and len(tables) == 14
    assert any("14" in line and "BF16" in line for line in notes.said)
    assert read_manifest(tmp_path / "a").components["transformer"].cast == ()


def test_an_upsampler_in_f32_becomes_bf16(tmp_path: Path, out: Path) -> None:
    source = tiny_source.make_source(tmp_path / "source", upsampler_dtype="F32")
    run(source, out)
    found = tensors(out / "latent_upsampler")
    for name, tensor in load_file(source / tiny_source.UPSAMPLER).items():
        assert_same_bits(found[name], tensor)
    assert set(read_manifest(out).components["latent_upsampler"].cast) == found.keys()


def test_a_distilled_base_is_told_needs_no_lora_and_gets_the_other_scheduler(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "full")
    assert read_manifest(tmp_path / "full").transformer_kind == "full"
    other = source / "ltx-2.3-mini-distilled.safetensors"
    (source / tiny_source.CHECKPOINT).rename(other)
    notes = Notes()
    run(other, tmp_path / "out", notes)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.transformer_kind, manifest.loras) == ("distilled", ())
    (source / tiny_source.LORA).rename(tmp_path / tiny_source.LORA)
    run(other, tmp_path / "without")
    assert (tmp_path / "without" / "ltxpack.json").read_bytes() == manifest.dump()
    run(other, tmp_path / "named", lora=str(tmp_path / tiny_source.LORA))
    assert [lora.name for lora in read_manifest(tmp_path / "named").loras] == ["distilled"]
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["use_dynamic_shifting"] is False
    assert any("kind of transformer, by its file name: distilled" in line for line in notes.said)


def test_nothing_heavy_is_imported(source: Path, out: Path) -> None:
    code = """
    import sys
    from pathlib import Path
    from ltxpack.materialize import Options, materialize
    from ltxpack.reporter import SilentReporter
    materialize(Options(sys.argv[1], Path(sys.argv[2])), SilentReporter())
    answer = sorted({"torch", "diffusers", "transformers", "huggingface_hub"} & sys.modules.keys())
    """
    assert in_fresh_process(code, source, out)[0] == []


# Doing it again


def test_another_source_needs_force(source: Path, out: Path, tmp_path: Path) -> None:
    run(source, out)
    before = tree(out)
    other = tiny_source.make_source(tmp_path / "other", seed=1)
    with pytest.raises(OverlayError, match="another file of the same name and size") as caught:
        run(other, out)
    assert "--force" in str(caught.value.next)
    assert tree(out) == before
    assert run(other, out, force=True).written
    run(other, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_the_same_again_is_a_no_op_and_one_tensor_trained_further_is_another_source(out: Path, tmp_path: Path) -> None:
    """Name and size stay, and so do all other tensors; whether the overlay has a tensor as it is or rounded."""
    notes, dtypes = Notes(), ("BF16", "F32")
    source = tiny_source.make_source(tmp_path / "source", dtypes=lambda name: dtypes[len(name) % 2])
    run(source, out, copy=True)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not run(source, out, notes, copy=True).written
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    assert any("compared with the overlay by name, size and a sample" in line for line in notes.said)
    plan, manifest = plan_overlay(Options(str(source), out, copy=True), SilentReporter()), read_manifest(out)
    for name in (tiny_source.CHECKPOINT, tiny_source.LORA, f"{tiny_source.GEMMA}/model-00001-of-00002.safetensors"):
        path = source / name
        before = path.read_bytes()
        for info in list(read_tensorfile(path).tensors.values())[::23]:
            trained = bytes(byte ^ 1 for byte in before[info.start : info.start + info.nbytes])
            path.write_bytes(before[: info.start] + trained + before[info.start + info.nbytes :])
            [told] = differences(plan, manifest, out)
            assert told.endswith("was made from another file of the same name and size")
        with pytest.raises(OverlayError, match="another file of the same name and size"):
            run(source, out, copy=True)
        path.write_bytes(before)
    assert not run(source, out, copy=True).written


@pytest.mark.parametrize("name", [tiny_source.CHECKPOINT, f"{tiny_source.GEMMA}/model-00001-of-00002.safetensors"])
def test_a_source_that_changes_while_it_is_read_is_refused(name: str, source: Path, out: Path) -> None:
    class Download(Notes):
        def begin(self, label: str, total: int, unit: str) -> None:
            super().begin(label, total, unit)
            if label == "writing":
                with (source / name).open("r+b") as file:
                    file.seek(-2, os.SEEK_END)
                    file.write(b"xx")

    with pytest.raises(SourceError, match="has changed while it was read"):
        run(source, out, Download())
    assert not out.exists()
    run(source, out)
    assert verify(out, SilentReporter()) == []


def test_the_checkpoints_metadata_is_kept_to_the_letter(source: Path, out: Path) -> None:
    path = source / tiny_source.CHECKPOINT
    checkpoint = read_tensorfile(path)
    order = [(info.name, info.dtype, info.shape) for info in checkpoint.tensors.values()]
    said = {
        **checkpoint.metadata,
        "licence": 'ré\u2028sumé \U0001f600 \x00\t\\ "quoted"\r\n' * 500,
        "": "no name",
        "format": "pt",
        "zz": "",
    }
    payload = path.read_bytes()[checkpoint.size - sum(info.nbytes for info in checkpoint.tensors.values()) :]
    path.write_bytes(build_header(order, said) + payload)
    report = run(source, out)
    assert json.loads((out / "source" / "metadata.json").read_text()) == said
    assert "source/metadata.json" in {
        file["path"] for file in plan_overlay(Options(str(source), out), Notes()).to_json()["files"]
    }
    (out / "source" / "metadata.json").write_text("{}")
    assert [fault.path for fault in verify(out, SilentReporter())] == ["source/metadata.json"]
    assert report.manifest == read_manifest(out)


def test_an_overlay_without_the_metadata_is_still_the_same(source: Path, out: Path) -> None:
    notes = Notes()
    run(source, out)
    manifest = read_manifest(out)
    older = [record for record in manifest.files if record.path != "source/metadata.json"]
    (out / "ltxpack.json").write_bytes(dataclasses.replace(manifest, files=tuple(older)).dump())
    shutil.rmtree(out / "source")
    assert verify(out, SilentReporter()) == []
    assert not run(source, out, notes).written
    assert any("an earlier version" in line and "--force" in line for line in notes.said)


def test_every_unusable_input_is_told_at_once(source: Path, out: Path) -> None:
    lora, upsampler = source / tiny_source.LORA, source / tiny_source.UPSAMPLER
    os.truncate(source / tiny_source.CHECKPOINT, 1000)
    shutil.copy(upsampler, lora)
    upsampler.write_bytes(b"<html>")
    (source / tiny_source.GEMMA / "tokenizer.json").unlink()
    with pytest.raises(LtxpackError, match="several inputs cannot be used") as caught:
        run(source, out)
    for words in ("truncated", "is not a LoRA", "not a safetensors file", "lacks files of the text encoder"):
        assert words in str(caught.value)
    assert [entry.name for entry in out.parent.iterdir()] == ["source"], "nothing is left"


@pytest.mark.parametrize("change", [{"max_shard_size": 20_000}, {"copy": True}])
def test_other_options_need_force(source: Path, out: Path, change: dict[str, object]) -> None:
    run(source, out)
    manifest = read_manifest(out)
    linked = any(record.link for record in manifest.records())
    if "copy" in change and not linked:
        assert not run(source, out, **change).written
    else:
        with pytest.raises(OverlayError, match=r"made with --max-shard-size 5000000000|--copy asks for copies"):
            run(source, out, **change)
        run(source, out, force=True, **change)
    assert verify(out, SilentReporter()) == []
    if "copy" in change:
        assert not any(record.link for record in read_manifest(out).records())
        assert all(path.is_dir() or (path.stat().st_nlink == 1 and not path.is_symlink()) for path in out.rglob("*"))


def test_a_changed_overlay_is_not_the_same_and_force_keeps_files_that_are_not_ours(source: Path, out: Path) -> None:
    run(source, out)
    (out / "model_index.json").unlink()
    (out / "notes.md").write_text("mine")
    with pytest.raises(OverlayError, match="was changed or removed"):
        run(source, out)
    run(source, out, force=True)
    assert [fault.path for fault in verify(out, SilentReporter())] == ["notes.md"]
    assert (out / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_target_that_is_no_overlay_is_left_alone(source: Path, out: Path, tmp_path: Path, kind: str) -> None:
    precious = out / "precious.txt" if kind == "folder" else out
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine")
    for force in (False, True):
        for command in (materialize, plan_overlay):
            with pytest.raises(OverlayError, match="exists and is not"):
                command(Options(str(source), out, force=force), SilentReporter())
    assert precious.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """An overlay of copies that nothing disturbed, and the bytes written."""
    folder = tmp_path_factory.mktemp("whole")
    report = run(tiny_source.make_source(folder / "source"), folder / "out", copy=True)
    return tree(folder / "out"), report.total_bytes


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_stopped_and_started_again_is_as_undisturbed(
    source: Path, out: Path, tmp_path: Path, whole: tuple[dict[str, bytes], int], share: float
) -> None:
    content, total = whole
    notes = Notes()

    def advance(amount: int = 1) -> None:
        notes.advanced += amount
        if notes.advanced > int(total * share):
            raise KeyboardInterrupt

    notes.advance = advance
    with pytest.raises(KeyboardInterrupt):
        run(source, out, notes, copy=True)
    assert not out.exists()
    assert any("goes on from there" in line for line in notes.said)
    run(source, out, copy=True)
    assert tree(out) == content
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "source"]


# From a hub


def test_too_small_a_disk_is_told_before_the_download(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub({"someone/model": source, TEXT_ENCODER_REPO: source / tiny_source.GEMMA})
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OverlayError, match="disk is too small"):
        run("someone/model", out, hub=hub)
    assert hub.fetched() == []


def test_force_says_which_bakes_go(source: Path, out: Path) -> None:
    run(source, out)
    manifest = read_manifest(out)
    record = manifest.files[0]
    baked = BakedLora("distilled", "x.safetensors", 1, record.blake3, 0.25, 0.25)
    bake = Bake((baked,), "fp32", "k", "cpu", (dataclasses.replace(record, path="bakes/distilled-0.25/x.json"),), ())
    (out / "ltxpack.json").write_bytes(manifest.with_bake("distilled-0.25", bake).dump())
    assert not run(source, out).written
    notes = Notes()
    run(source, out, notes, force=True)
    assert any("distilled-0.25" in line for line in notes.said)
    assert read_manifest(out).bakes == {}
