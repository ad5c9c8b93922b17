"""Whole bakes: the weights, the folder, the manifest; what is refused and what is left alone."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from lora_support import (
    CONFIG,
    INDEX,
    LORA_FILE,
    STYLE,
    Factors,
    change_byte,
    goldens,
    linears,
    low_rank,
    make_overlay,
    official_keys,
    peft_folder,
    random_weights,
    save,
)
from materialize.fake_hub import FakeHub
from support import Notes, in_fresh_process, load, load_all, ltxpack, refused, tree

from ltxpack.errors import AdapterError, DeviceError, LtxpackError, OverlayError, SourceError, UsageError
from ltxpack.files.tensorfile import read_tensorfile
from ltxpack.lora_bake import REPORT_NAMES, BakeOptions, bake, find, fuse, plan_bake
from ltxpack.ltx23.renames import TRANSFORMER
from ltxpack.manifest import Bake, read_manifest
from ltxpack.materialize import access
from ltxpack.repack.lock import OverlayLock
from ltxpack.repack.verify import verify
from ltxpack.reporter import SilentReporter
from ltxpack.strength import Strength

BASE = random_weights()
# Of a fifth of the linears, so that each shard has weights to copy too.
FACTORS = low_rank(linears()[::5])


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return make_overlay(tmp_path / "out", BASE, shards=3, distilled=official_keys(FACTORS))


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return save(tmp_path / "style.safetensors", official_keys(STYLE))


def options(overlay: Path, *strengths: float, **more: object) -> BakeOptions:
    return BakeOptions(overlay, strengths, **more)  # type: ignore[arg-type]


def planned(overlay: Path, *strengths: float, **more: object) -> dict:
    return plan_bake(options(overlay, *strengths, **more), SilentReporter())


def run(overlay: Path, *strengths: float, **more: object) -> list[str]:
    return [report.name for report in bake(options(overlay, *strengths, **more), SilentReporter())]


def exact(strengths: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """float64 results; ``strengths`` of the distilled and the style LoRA."""
    result = {name: tensor.double() for name, tensor in BASE.items()}
    for key, factors in (("style", STYLE), ("distilled", FACTORS)):
        for module, (a, b) in factors.items():
            result[f"{module}.weight"] = result[f"{module}.weight"] + strengths.get(key, 0.0) * (
                b.double() @ a.double()
            )
    return result


# The weights


@pytest.mark.parametrize("slow", [None, 0.0], ids=["bf16", "through fp32"])
def test_official_bakes_equal_the_goldens(
    slow: float | None, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slow is not None:
        monkeypatch.setattr(fuse, "SLOW_FLOP", slow)
        monkeypatch.setattr(fuse, "cpu_has_bf16_unit", lambda: False)
    checkpoint = load(next(path for path in golden.glob("*.safetensors") if path.name.endswith("-dev.safetensors")))
    root, renamed = "model.diffusion_model.", {}
    for name, tensor in checkpoint.items():
        if name.startswith(root) and "embeddings_connector" not in name:
            renamed[TRANSFORMER.rename(name)] = tensor
    recorded = goldens(golden)
    overlay = make_overlay(tmp_path / "out", renamed, shards=2, distilled=load(recorded[0][1][-1][0]))
    plain = {used[0][1]: file for file, used in recorded if len(used) == 1}
    made = dict(zip(run(overlay, *plain, rule="official", device="cpu"), plain.values(), strict=True))
    for file, (*styles, (_, strength)) in recorded:
        if styles:
            added = tuple((str(style), at) for style, at in styles)
            made[run(overlay, strength, added=added, rule="official", device="cpu")[0]] = file
    assert len(made) == len(recorded)
    kernels = {bake.kernel for bake in read_manifest(overlay).bakes.values()}
    assert kernels == ({"official"} if slow is None else {"official-fp32"})
    for name, file in made.items():
        found = load_all(overlay / "bakes" / name)
        for key, tensor in load(file).items():
            same = found[TRANSFORMER.rename(root + key)]
            assert torch.equal(same.view(torch.int16), tensor.view(torch.int16)), f"{file.name}: {key}"


def test_fp32_bake_is_the_rounded_sum(overlay: Path, style: Path) -> None:
    [alone] = run(overlay, 0.7)
    [stacked] = run(overlay, 0.7, added=((str(style), -0.3),))
    for name, strengths in ((alone, {"distilled": 0.7}), (stacked, {"distilled": 0.7, "style": -0.3})):
        found = load_all(overlay / "bakes" / name)
        assert found.keys() == BASE.keys()
        wrong = total = 0
        for tensor_name, reference in exact(strengths).items():
            assert found[tensor_name].dtype == BASE[tensor_name].dtype
            wrong += int((found[tensor_name] != reference.float().bfloat16()).sum())
            total += reference.numel()
        assert wrong / total < 1e-3


def test_several_strengths_at_once_are_the_bytes_of_each_alone(tmp_path: Path, style: Path) -> None:
    for rule in ("fp32", "official"):
        for added in ((), ((str(style), 0.8),)):
            together = make_overlay(tmp_path / "together", BASE, shards=2, distilled=official_keys(FACTORS))
            apart = make_overlay(tmp_path / "apart", BASE, shards=2, distilled=official_keys(FACTORS))
            run(together, 0.25, 0.0, 1.0, added=added, rule=rule)
            for strength in (1.0, 0.0, 0.25):
                run(apart, strength, added=added, rule=rule)
            assert tree(together) == tree(apart)
            shutil.rmtree(together)
            shutil.rmtree(apart)


@pytest.mark.parametrize(("cores", "elements"), [((1, 4), (256, 256)), ((1, 1), (1 << 21, 100))], ids=["cores", "rows"])
def test_a_bake_does_not_depend_on_the_cores_and_hardly_on_its_row_chunks(
    cores: tuple[int, int], elements: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for count, size in zip(cores, elements, strict=True):
        monkeypatch.setattr("ltxpack.lora_bake.stream.usable_cores", lambda count=count: count)
        monkeypatch.setattr("ltxpack.lora_bake.fuse.CHUNK_ELEMENTS", dict.fromkeys(fuse.CHUNK_ELEMENTS, size))
        folders.append(make_overlay(tmp_path / f"{count} {size}", BASE, distilled=official_keys(FACTORS)))
        run(folders[-1], 0.7)
    assert tree(folders[0]) == tree(folders[1]) or cores == (1, 1)
    one, two = (load_all(folder / "bakes" / "distilled-0.7") for folder in folders)
    assert sum(int((one[name] != two[name]).sum()) for name in BASE) <= 3


def test_every_kernel_is_used_by_its_name(overlay: Path, style: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for unit in (True, False):
        monkeypatch.setattr("ltxpack.lora_bake.fuse.cpu_has_bf16_unit", lambda unit=unit: unit)
        [name] = run(overlay, 0.3 if unit else 0.4, device="cpu")
        assert read_manifest(overlay).bakes[name].kernel == ("addmm" if unit else "fp32")
        [name] = run(overlay, 0.3 if unit else 0.4, device="cpu", added=((str(style), 1.0),))
        assert read_manifest(overlay).bakes[name].kernel == ("fp32-bf16" if unit else "fp32")
    [name] = run(overlay, 0.5, rule="official", device="cpu")
    assert read_manifest(overlay).bakes[name].kernel == "official"


# The folder and the manifest


def test_the_folder_is_complete_and_verifies(overlay: Path) -> None:
    names = run(overlay, 0.25, 1.0)
    assert names == ["distilled-0.25", "distilled-1"]
    transformer = {path.name for path in (overlay / "transformer").iterdir()}
    for name in names:
        folder = overlay / "bakes" / name
        assert {path.name for path in folder.iterdir()} == transformer | {"coverage.json", "coverage.html"}
        for small in ("config.json", INDEX):
            assert (folder / small).read_bytes() == (overlay / "transformer" / small).read_bytes()
    assert verify(overlay, SilentReporter()) == []
    assert not (overlay / ".ltxpack").exists()
    assert json.loads((overlay / "bakes" / names[0] / "config.json").read_text()) == CONFIG


def test_what_the_manifest_says_of_a_bake(overlay: Path, style: Path) -> None:
    [name] = run(overlay, 0.5, added=((str(style), 0.8),))
    assert name == "distilled-0.5+style-0.8"
    manifest = read_manifest(overlay)
    made = manifest.bakes[name]
    assert [(lora.name, lora.strength, lora.scale) for lora in made.loras] == [
        ("style", 0.8, 0.8),
        ("distilled", 0.5, 0.5),
    ]
    own = manifest.lora("distilled")
    assert own is not None and made.loras[1].blake3 == own.file.blake3
    assert made.loras[0].file == "style.safetensors" and made.loras[0].size == style.stat().st_size
    assert (made.rule, made.device) == ("fp32", "cpu" if not torch.cuda.is_available() else "cuda")
    found = load_all(overlay / "bakes" / name)
    differing = {tensor for tensor in BASE if not torch.equal(found[tensor], BASE[tensor])}
    assert set(made.changed) == differing


def test_shards_carry_their_provenance(overlay: Path, style: Path) -> None:
    [name] = run(overlay, 0.5, added=((str(style), 0.8),), rule="official")
    made = read_manifest(overlay).bakes[name]
    shards = {record.path: record.blake3 for record in read_manifest(overlay).components["transformer"].files}
    for path in sorted((overlay / "bakes" / name).glob("*.safetensors")):
        metadata = read_tensorfile(path).metadata
        assert metadata["format"] == "pt" and metadata["ltxpack_rule"] == "official"
        assert metadata["ltxpack_base_blake3"] == shards[f"transformer/{path.name}"]
        loras = json.loads(metadata["ltxpack_loras"])
        assert loras == [{"name": lora.name, "blake3": lora.blake3, "strength": lora.strength} for lora in made.loras]


def test_shards_without_a_changed_tensor_are_relative_links(tmp_path: Path) -> None:
    block = [module for module in linears() if module.startswith("transformer_blocks.2.")]
    overlay = make_overlay(tmp_path / "out", BASE, shards=6, distilled=official_keys(low_rank(block)))
    plan = planned(overlay, 1.0)
    [name] = run(overlay, 1.0)
    folder = overlay / "bakes" / name
    links = {path.name: path.readlink() for path in folder.iterdir() if path.is_symlink()}
    assert 0 < len(links) < 6
    for shard, target in links.items():
        assert target == Path("../../transformer") / shard
        assert not set(load(overlay / "transformer" / shard)) & {f"{module}.weight" for module in block}
    assert load_all(folder).keys() == BASE.keys()
    assert {Path(file["path"]).name for file in plan["files"] if file["action"] == "link"} == set(links)
    records = {record.path: record.link for record in read_manifest(overlay).bakes[name].files}
    assert {Path(path).name for path, link in records.items() if link} == set(links)
    assert verify(overlay, SilentReporter()) == []
    moved = overlay.rename(tmp_path / "elsewhere")
    assert verify(moved, SilentReporter()) == []


@pytest.mark.parametrize(
    ("hard", "code"),
    [*((True, code) for code in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)), (False, errno.EXDEV)],
)
def test_where_there_are_no_symlinks_shards_are_hard_links_or_copies(
    hard: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = [module for module in linears() if module.startswith("transformer_blocks.2.")]
    overlay = make_overlay(tmp_path / "out", BASE, shards=6, distilled=official_keys(low_rank(block)))
    [name] = run(overlay, 1.0)
    usual = {path.name: path.read_bytes() for path in (overlay / "bakes" / name).iterdir()}
    linked = {record.path for record in read_manifest(overlay).bakes[name].files if record.link}
    for made in ("symlink", "link")[: 1 if hard else 2]:
        monkeypatch.setattr(os, made, mock.Mock(side_effect=OSError(code, os.strerror(code))))
    run(overlay, 1.0, force=True)
    monkeypatch.undo()
    records = {record.path: record.link for record in read_manifest(overlay).bakes[name].files}
    assert {path for path, link in records.items() if link == "hard"} == (linked if hard else set())
    assert all(link in (None, "hard") for link in records.values())
    assert {path.name: path.read_bytes() for path in (overlay / "bakes" / name).iterdir()} == usual
    for path in linked:
        assert (overlay / path).samefile(overlay / "transformer" / Path(path).name) == hard
    assert verify(overlay, SilentReporter()) == []
    assert not bake(options(overlay, 1.0), SilentReporter())[0].made, "it is there already"
    assert run(overlay, 1.0, force=True) and verify(overlay, SilentReporter()) == []


def test_strength_zero(overlay: Path, style: Path) -> None:
    assert run(overlay, 0.0) == ["distilled-0"]
    folder = overlay / "bakes" / "distilled-0"
    assert all(path.is_symlink() for path in folder.glob("*.safetensors"))
    assert read_manifest(overlay).bakes["distilled-0"].changed == ()
    [name] = run(overlay, 0.0, added=((str(style), 0.8),))
    assert name == "distilled-0+style-0.8"
    found = load_all(overlay / "bakes" / name)
    reference = exact({"style": 0.8})
    assert all(torch.allclose(found[key].double(), reference[key], rtol=2**-7, atol=1e-6) for key in BASE)
    untouched = [key for key in BASE if ".attn1." not in key]
    assert all(torch.equal(found[key], BASE[key]) for key in untouched)


def flop_of(factors: Factors) -> int:
    return sum(2 * up.shape[0] * down.numel() for down, up in factors.values())


def test_the_plan_says_every_file_and_its_size(overlay: Path, style: Path) -> None:
    wanted = options(overlay, 0.25, 1.0, added=((str(style), 0.8),))
    before = tree(overlay)
    plan = plan_bake(wanted, SilentReporter())
    assert tree(overlay) == before
    bake(wanted, SilentReporter())
    assert {file["path"] for file in plan["files"]} == {
        path.relative_to(overlay).as_posix() for path in (overlay / "bakes").rglob("*") if path.is_file()
    }
    for file in plan["files"]:
        size = (overlay / file["path"]).stat().st_size
        exact = not file["path"].endswith(REPORT_NAMES)
        assert size == file["bytes"] if exact else size <= file["bytes"] < 10 * size, file["path"]
        assert file["action"] == "write"
    assert plan["total_bytes"] == plan["written_bytes"] == sum(file["bytes"] for file in plan["files"])
    assert plan["missing"] == []
    told, own, added = plan["arithmetic"], flop_of(FACTORS), flop_of(STYLE)
    flop = own + added
    assert (told["rule"], told["flop"]) == ("fp32", flop), "once for both strengths"
    assert told["kernel"] == ("fp32-bf16" if fuse.cpu_has_bf16_unit() else "fp32")
    assert told["seconds"] == pytest.approx(flop / told["flop_per_second"]) and 1e6 < told["flop_per_second"] < 1e16
    assert planned(overlay, 0.25, 1.0, rule="official")["arithmetic"]["flop"] == 2 * own
    run(overlay, 0.5)
    assert planned(overlay, 0.5)["files"] == plan_bake(wanted, SilentReporter())["files"] == []
    with pytest.raises(OverlayError, match="made from other inputs"):
        planned(overlay, 0.5, rule="official")


def test_the_plan_in_words_says_that_reports_have_a_bound(overlay: Path) -> None:
    told = ltxpack("bake-lora", overlay, "--strength", "0.5", "--plan").stdout
    lines = [line for line in told.splitlines() if "at most" in line]
    assert len(lines) == 3 and lines[0].endswith("coverage.html") and lines[1].endswith("coverage.json")
    assert lines[2].startswith("7 files, at most ")


def test_progress_adds_up(overlay: Path) -> None:
    notes = Notes()
    bake(options(overlay, 0.25, 1.0), notes)
    assert len(notes.phases) == 2 and notes.open == 0
    assert all(total == count for _, _, total, count in notes.phases)
    assert sum("page cache" in note or "O_DIRECT" in note for note in notes.said) == 6


# Names


def test_another_lora_goes_by_its_stem_and_the_distilled_file_by_its_content(overlay: Path, style: Path) -> None:
    assert run(overlay, 0.8, lora=str(style)) == ["style-0.8"]
    assert run(overlay, 0.6, lora=str(overlay / LORA_FILE)) == ["distilled-0.6"]
    for strength, name in ((0.7, "distilled"), (0.8, "renamed")):
        elsewhere = shutil.copy(overlay / LORA_FILE, overlay.parent / f"{name}.safetensors")
        [path] = {file["path"].split("/")[1] for file in planned(overlay, strength, lora=str(elsewhere))["files"]}
        assert [path] == run(overlay, strength, lora=str(elsewhere)) == [f"distilled-{strength}"]
    assert run(overlay, 0.5, added=((str(elsewhere), 0.8),)) == ["distilled-0.5+renamed-0.8"]
    odd = shutil.copy(style, overlay.parent / "my style (v2)!.safetensors")
    assert run(overlay, 1.0, lora=str(odd)) == ["my-style-v2-1"]


def test_a_users_file_called_distilled_takes_no_name_of_the_overlays_own(overlay: Path, style: Path) -> None:
    foreign = style.rename(style.with_name("distilled.safetensors"))
    for more in ([], ["--plan"], ["--add", f"{foreign}=0.3"]):
        message = refused(ltxpack("bake-lora", overlay, "--lora", foreign, "--strength", "0.5", *more), 2)
        assert "bakes of the overlay's own LoRA" in message
        assert "next: the same command with --name NAME" in message
    assert not read_manifest(overlay).bakes
    assert run(overlay, 0.5, lora=str(foreign), name="mine") == ["mine"]
    assert run(overlay, 0.5, added=((str(foreign), 0.8),)) == ["distilled-0.5+distilled-0.8"]


def test_a_distilled_lora_on_a_distilled_base_is_refused_unless_forced(overlay: Path, tmp_path: Path) -> None:
    manifest = dataclasses.replace(read_manifest(overlay), transformer_kind="distilled")
    (overlay / "ltxpack.json").write_bytes(manifest.dump())
    other = save(tmp_path / "other-distilled-lora.safetensors", official_keys(low_rank(linears(), seed=7)))
    for lora in (None, str(other)):
        options = BakeOptions(overlay, (0.5,), lora=lora)
        for act in (bake, plan_bake):
            with pytest.raises(AdapterError, match="distilled twice") as caught:
                act(options, SilentReporter())
            assert str(caught.value).rstrip().endswith("--force")
    assert read_manifest(overlay).bakes == {}
    told = Notes()
    (made,) = bake(BakeOptions(overlay, (0.5,), force=True), told)
    assert made.made and [*read_manifest(overlay).bakes] == ["distilled-0.5"]
    assert [warning for warning in told.warnings if warning.endswith("it is distilled twice")]


NO_NUMBERS = [{key: value} for x in (math.nan, math.inf, -math.inf) for key, value in
              (("strengths", (x,)), ("added", (("x", x),)))]  # fmt: skip


WRONG = [*({"name": name} for name in ("base", "..", "a/b", "")), {"name": "x", "strengths": (0.5, 0.25)},
         {"rule": "bf16"}, {"device": "tpu"}, {"strengths": ()}, *NO_NUMBERS]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_options_are_checked(overlay: Path, wrong: dict) -> None:
    checked = BakeOptions(Path("x"), (0.5, 0.25, 0.5, -0.0, 0.0)).checked()
    assert checked.strengths == (Strength(0.5), Strength(0.25), Strength(0.0))
    with pytest.raises(UsageError, match="finite" if wrong in NO_NUMBERS else None):
        bake(dataclasses.replace(options(overlay, 1.0), **wrong), SilentReporter())


# Doing it again


def test_the_same_again_is_left_alone(overlay: Path, style: Path) -> None:
    added = ((str(style), 0.8),)
    for more in ({}, {"added": added}, {"rule": "official", "name": "o"}):
        first = bake(options(overlay, 0.5, **more), SilentReporter())
        before = {path: path.stat().st_mtime_ns for path in overlay.rglob("*") if path.is_file()}
        [again] = bake(options(overlay, 0.5, **more), SilentReporter())
        assert first[0].made and not again.made and "is there already" in again.lines()[0]
        assert {path: path.stat().st_mtime_ns for path in overlay.rglob("*") if path.is_file()} == before


def test_a_bake_whose_name_begins_with_a_dot_is_the_overlays_own(overlay: Path) -> None:
    run(overlay, 0.5, name=".mine")
    notes = Notes()
    assert verify(overlay, notes) == [] and notes.notes == []


def test_other_inputs_under_the_same_name_need_force(overlay: Path, style: Path) -> None:
    run(overlay, 0.5, name="mine")
    before = tree(overlay)
    for more in ({"rule": "official"}, {"lora": str(style)}, {"added": ((str(style), 0.1),)}):
        with pytest.raises(OverlayError, match="made from other inputs") as caught:
            run(overlay, 0.5, name="mine", **more)
        assert caught.value.next.startswith(f"ltxpack bake-lora {overlay} --strength 0.5")
        assert caught.value.next.endswith("--name mine --force (replaces it; another --name keeps both)")
        assert tree(overlay) == before
    with pytest.raises(OverlayError, match="made from other inputs"):
        run(overlay, 0.6, name="mine")
    run(overlay, 0.6, name="mine", force=True)
    assert read_manifest(overlay).bakes["mine"].loras[0].strength == 0.6
    assert verify(overlay, SilentReporter()) == []
    run(overlay, 0.6)
    assert tree(overlay / "bakes/mine").keys() == tree(overlay / "bakes/distilled-0.6").keys()


def test_a_bake_that_lost_a_file_is_made_again_and_by_force_whatever_is_there(overlay: Path) -> None:
    def made(*strengths: float, **more: object) -> list[bool]:
        return [report.made for report in bake(options(overlay, *strengths, **more), SilentReporter())]

    run(overlay, 0.25)
    assert made(0.25, 0.5) == [False, True]
    whole = tree(overlay)
    shard = next((overlay / "bakes/distilled-0.5").glob("*00002-of*"))
    shard.unlink()
    assert made(0.5) == [True] and tree(overlay) == whole
    change_byte(shard)
    assert made(0.5) == [False]
    assert len(planned(overlay, 0.5, force=True)["files"]) == 7
    assert made(0.5, force=True) == [True] and tree(overlay) == whole


def test_the_command_that_a_message_names_can_be_typed(overlay: Path, tmp_path: Path) -> None:
    style = save(tmp_path / "my style=1.safetensors", official_keys(STYLE))
    wanted = options(overlay, 0.5, added=((str(style), 1e-7),), rule="official", name="mine", allow_unmatched=True)
    done = ltxpack(*shlex.split(wanted.command(force=True, device="cpu"))[1:])
    assert done.returncode == 0, done.stderr
    assert [lora.strength for lora in read_manifest(overlay).bakes["mine"].loras] == [1e-7, 0.5]


# Refusals


def assert_untouched_by(
    overlay: Path, error: type[LtxpackError], match: str, *strengths: float, **more: object
) -> LtxpackError:
    before = tree(overlay)
    with pytest.raises(error, match=match) as caught:
        run(overlay, *strengths, **more)
    assert tree(overlay) == before
    return caught.value


def test_a_changed_base_is_refused(overlay: Path) -> None:
    run(overlay, 0.25)
    shard = overlay / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    change_byte(shard, -5)
    with pytest.raises(OverlayError, match="has changed since the overlay was written") as caught:
        run(overlay, 0.5)
    assert "ltxpack verify" in (caught.value.next or "")
    assert "distilled-0.5" not in read_manifest(overlay).bakes and not (overlay / "bakes/distilled-0.5").exists()
    assert run(overlay, 0.25) == ["distilled-0.25"]
    change_byte(shard, -5)
    run(overlay, 0.5)
    assert verify(overlay, SilentReporter()) == []


CHANGES = {
    **dict.fromkeys(("config.json", INDEX), lambda path: path.write_text(path.read_text().replace("e", "a", 1))),
    "diffusion_pytorch_model-00003-of-00003.safetensors": lambda path: os.truncate(path, path.stat().st_size - 1),
    f"../{LORA_FILE}": change_byte,
}


@pytest.mark.parametrize("file", CHANGES)
def test_a_changed_or_missing_input_is_refused(overlay: Path, file: str) -> None:
    path = overlay / "transformer" / file
    CHANGES[file](path)
    assert_untouched_by(overlay, OverlayError, "has changed", 0.5)
    path.unlink()
    assert_untouched_by(
        overlay, OverlayError, "missing or has changed" if "lora" in file else "has changed|missing", 0.5
    )


def test_a_lora_that_changes_while_it_is_baked_is_refused(overlay: Path, style: Path) -> None:
    class Trainer(SilentReporter):
        def begin(self, label: str, total: int, unit: str) -> None:
            if label.startswith("bake "):
                change_byte(style)

    before, stacked = tree(overlay), options(overlay, 0.5, added=((str(style), 1.0),))
    with pytest.raises(AdapterError, match="has changed while it was baked"):
        bake(stacked, Trainer())
    assert tree(overlay) == before
    bake(stacked, SilentReporter())


def test_overflow_is_refused_with_the_list_and_leaves_nothing(tmp_path: Path) -> None:
    weights = {name: tensor.half() for name, tensor in BASE.items()}
    overlay = make_overlay(tmp_path / "out", weights, shards=2, distilled=official_keys(FACTORS))
    error = assert_untouched_by(overlay, AdapterError, "beyond F16", 1e6)
    assert len(error.items) > 5
    run(overlay, 1.0)


def test_a_lora_that_does_not_fit_or_is_not_finite_is_refused(overlay: Path) -> None:
    tensors = official_keys(FACTORS)
    key = sorted(tensors)[7]
    path = save(overlay.parent / "nan.safetensors", tensors | {key: torch.full_like(tensors[key], float("nan"))})
    error = assert_untouched_by(overlay, AdapterError, "NaN or infinity in 1 tensors", 1.0, lora=str(path))
    assert error.items == (key,)
    del tensors[key]
    path = save(overlay.parent / "half.safetensors", tensors)
    assert_untouched_by(overlay, AdapterError, "1 half pair", 1.0, lora=str(path))
    with pytest.raises(AdapterError, match="1 half pair"):
        planned(overlay, 1.0, lora=str(path))


def test_allow_unmatched_is_told(overlay: Path, style: Path) -> None:
    tensors = load(style) | {"diffusion_model.transformer_blocks.77.attn1.to_q.lora_A.weight": torch.zeros(2, 2)}
    path = save(overlay.parent / "more.safetensors", tensors)
    assert_untouched_by(overlay, AdapterError, "1 unmatched", 1.0, lora=str(path))
    notes = Notes()
    [report] = bake(options(overlay, 1.0, lora=str(path), allow_unmatched=True), notes)
    assert any("left out" in note for note in notes.said)
    assert report.document["loras"][0]["left_out"] == ["transformer_blocks.77.attn1.to_q"]


@pytest.mark.parametrize(
    ("role", "shape", "told"), [("dora_scale", (32, 1), "DoRA"), ("lora_B.bias", (32,), "lora_B.bias")]
)
def test_dora_and_the_bias_of_a_factor_have_no_official_rule(
    role: str, shape: tuple[int, ...], told: str, overlay: Path
) -> None:
    module = "transformer_blocks.0.attn1.to_q"
    tensors = official_keys(low_rank([module])) | {f"diffusion_model.{module}.{role}": torch.ones(shape)}
    path = save(overlay.parent / "more.safetensors", tensors)
    assert_untouched_by(overlay, AdapterError, f"has no {told}", 1.0, lora=str(path), rule="official")
    run(overlay, 1.0, lora=str(path))


@pytest.mark.parametrize("alpha", [8.0, 0.0])
def test_the_official_rule_tells_of_ignored_alpha(alpha: float, overlay: Path) -> None:
    alphas = {
        key.replace("lora_A.weight", "alpha"): torch.tensor(alpha) for key in official_keys(FACTORS) if "lora_A" in key
    }
    path = save(overlay.parent / "alpha.safetensors", official_keys(FACTORS) | alphas)
    notes = Notes()
    [report] = bake(options(overlay, 0.5, lora=str(path), rule="official"), notes)
    assert any("the official rule ignores alpha" in note for note in notes.said)
    assert not any("alpha is 0" in note or "nothing" in note for note in notes.said)
    plain = run(overlay, 0.5, rule="official")
    one, two = (load_all(overlay / "bakes" / name) for name in (report.name, *plain))
    assert all(torch.equal(one[name], two[name]) for name in BASE)
    assert read_manifest(overlay).bakes[report.name].loras[0].scale == 0.5
    [scaled] = run(overlay, 0.5, lora=str(path), name="fp32")
    assert read_manifest(overlay).bakes[scaled].loras[0].scale == 0.5 * alpha / 4


def test_a_base_with_a_million_blocks_is_refused_before_its_page_is_made(tmp_path: Path) -> None:
    far = "transformer_blocks.1000000.attn1.to_q.weight"
    overlay = make_overlay(tmp_path / "out", {**BASE, far: torch.zeros(4, 4)})
    for flags in (("--plan",), ()):
        message = refused(ltxpack("bake-lora", overlay, "--strength", 1, *flags), 1)
        assert f"{far}: is of a block that no model has" in message


def test_no_overlay_no_lora_no_device(tmp_path: Path, overlay: Path) -> None:
    with pytest.raises(OverlayError, match="is not an overlay"):
        run(tmp_path / "nothing", 1.0)
    with pytest.raises(SourceError, match="no such LoRA"):
        run(overlay, 1.0, lora="absent.safetensors")
    with pytest.raises(SourceError, match="no such LoRA"):
        run(overlay, 1.0, added=(("./some/where.safetensors", 1.0),))
    for odd in ("x" * 5000, "a\0b", "", "~/none.safetensors"):
        with pytest.raises((SourceError, UsageError)):
            run(overlay, 1.0, lora=odd)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no CUDA device"):
            run(overlay, 1.0, device="cuda")


def test_an_overlay_without_a_distilled_lora(overlay: Path, style: Path) -> None:
    manifest = read_manifest(overlay)
    (overlay / "ltxpack.json").write_bytes(dataclasses.replace(manifest, loras=()).dump())
    with pytest.raises(OverlayError, match="holds no distilled LoRA"):
        run(overlay, 1.0)
    assert run(overlay, 1.0, lora=str(style)) == ["style-1"]
    assert run(overlay, 0.0, added=((str(style), 1.0),)) == ["style-1"]
    assert run(overlay, 0.0, added=((str(style), 1.0), (str(style), 0.5))) == ["style-0.5+style-1"]
    assert [lora.strength for lora in read_manifest(overlay).bakes["style-0.5+style-1"].loras] == [1.0, 0.5]


def test_an_overlay_in_use_is_refused(overlay: Path) -> None:
    with OverlayLock(overlay), pytest.raises(OverlayError, match="another ltxpack"):
        run(overlay, 1.0)
    run(overlay, 1.0)


@pytest.mark.parametrize("link", ["bakes", ".ltxpack", "bakes/distilled-1"])
def test_nothing_is_written_through_a_link_out_of_the_overlay(overlay: Path, tmp_path: Path, link: str) -> None:
    (tmp_path / "outside").mkdir()
    (overlay / link).parent.mkdir(exist_ok=True)
    (overlay / link).symlink_to(tmp_path / "outside")
    with pytest.raises(OverlayError, match="is a link where only a folder may be"):
        run(overlay, 1.0)
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_disk_too_small_is_found_before_the_first_byte(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(overlay)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OverlayError, match="the disk is too small"):
        run(overlay, 1.0)
    assert list(read_manifest(overlay).bakes) == [] and not (overlay / "bakes").exists()


def test_the_lora_is_not_read_for_what_is_there_already(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(overlay, 0.5)
    monkeypatch.setattr(find, "scan", lambda *_: pytest.fail("the LoRA was read"))
    run(overlay, 0.5)


def test_torch_is_not_imported_to_refuse_or_to_find_nothing_to_do(overlay: Path) -> None:
    run(overlay, 0.5)
    code = """
    import sys
    from pathlib import Path
    from ltxpack.errors import LtxpackError
    from ltxpack.lora_bake import BakeOptions, bake
    from ltxpack.reporter import SilentReporter
    answer, overlay = [], Path(sys.argv[1])
    for folder, options in ((Path("nowhere"), {}), (overlay, {"lora": "none.safetensors"}), (overlay, {})):
        try:
            answer.append(bake(BakeOptions(folder, (0.5,), **options), SilentReporter())[0].made)
        except LtxpackError:
            answer.append("refused")
    answer.append("torch" in sys.modules)
    """
    assert in_fresh_process(code, overlay)[0] == ["refused", "refused", False, False]


def test_a_torch_that_cannot_be_imported_is_told_where_it_is_asked_for(
    overlay: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = importlib.import_module

    def broken(name: str) -> ModuleType:
        if name == "torch":
            raise ImportError(f"no {name}")
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match="no torch"):
        run(overlay, 0.5)
    assert "Traceback" not in capsys.readouterr().err


# LoRAs from elsewhere


def test_a_peft_folder(overlay: Path) -> None:
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    folder = peft_folder(overlay.parent / "my_adapter", STYLE, stated)
    assert run(overlay, 0.4, lora=str(folder)) == ["my_adapter-0.4"]
    doubled = save(overlay.parent / "d.safetensors", official_keys({m: (a, 2 * b) for m, (a, b) in STYLE.items()}))
    run(overlay, 0.4, lora=str(doubled))
    one, two = (load_all(overlay / "bakes" / name) for name in ("my_adapter-0.4", "d-0.4"))
    assert all(torch.equal(one[name], two[name]) for name in BASE)
    (folder / "adapter_config.json").write_text(json.dumps(stated | {"lora_alpha": 2}))
    with pytest.raises(OverlayError, match="made from other inputs"):
        run(overlay, 0.4, lora=str(folder))


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """What the hub has as ``someone/repo``."""
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.fixture
def hub(repo: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub({"someone/repo": repo})
    monkeypatch.setattr(access, "Hub", lambda **_: hub)
    monkeypatch.chdir(repo.parent)
    return hub


def test_a_lora_from_the_hub(overlay: Path, hub: FakeHub, repo: Path) -> None:
    save(repo / "ltx2.3-style.safetensors", official_keys(STYLE))
    reference = "someone/repo/ltx2.3-style.safetensors"
    plan = planned(overlay, 0.5, added=((reference, 1.0),))
    assert hub.fetched("") == []
    assert run(overlay, 0.5, added=((reference, 1.0),)) == ["distilled-0.5+ltx2.3-style-1"]
    assert {file["path"] for file in plan["files"]} == {
        path.relative_to(overlay).as_posix() for path in (overlay / "bakes").rglob("*") if path.is_file()
    }
    for whole_repo_or_stem in ("someone/repo@main", "someone/repo/ltx2.3-style"):
        assert run(overlay, 0.5, lora=whole_repo_or_stem) == ["ltx2.3-style-0.5"]


def test_a_plan_takes_a_hub_lora_called_distilled_for_what_it_may_be(overlay: Path, hub: FakeHub, repo: Path) -> None:
    shutil.copy(overlay / LORA_FILE, repo / "distilled.safetensors")
    plan = planned(overlay, 0.5, lora="someone/repo/distilled.safetensors")
    assert plan["files"][0]["path"].startswith("bakes/distilled-0.5/")
    assert hub.fetched("") == []
    assert run(overlay, 0.5, lora="someone/repo/distilled.safetensors") == ["distilled-0.5"]
    save(repo / "distilled.safetensors", official_keys(STYLE))
    with pytest.raises(UsageError, match="the overlay's own LoRA"):
        run(overlay, 1.0, lora="someone/repo/distilled.safetensors")


def test_a_peft_adapter_from_the_hub_brings_its_configuration(overlay: Path, hub: FakeHub, repo: Path) -> None:
    peft_folder(repo / "sub", STYLE, {"r": 2, "lora_alpha": 4})
    assert run(overlay, 0.5, lora="someone/repo/sub") == ["sub-0.5"]
    assert sorted(hub.fetched("")) == ["sub/adapter_config.json", "sub/adapter_model.safetensors"]
    assert read_manifest(overlay).bakes["sub-0.5"].loras[0].scale == 1.0


def test_a_hub_reference_that_fits_nothing(overlay: Path, hub: FakeHub, repo: Path) -> None:
    for name in ("a", "b"):
        save(repo / f"{name}.safetensors", official_keys(STYLE))
    (repo / "x.py").write_text("print()")
    wrong = (("", "several"), ("/c.safetensors", "is not in someone/repo"), ("/x.py", "not a .safetensors"))
    for reference, match in wrong:
        with pytest.raises(SourceError, match=match):
            run(overlay, 1.0, lora=f"someone/repo{reference}")
    assert hub.fetched("") == []


def test_a_model_on_the_hub_is_no_lora_and_stays_there(overlay: Path, hub: FakeHub, repo: Path) -> None:
    codes = torch.zeros(2, 3, dtype=torch.float8_e4m3fn)
    save(repo / "x-fp8.safetensors", {"model.diffusion_model.transformer_blocks.0.attn1.to_q.weight": codes})
    with pytest.raises(AdapterError, match="is no LoRA but the transformer alone, in fp8"):
        run(overlay, 1.0, lora="someone/repo/x-fp8.safetensors")
    assert hub.fetched("") == []


def test_what_exists_as_typed_wins_over_the_hub(overlay: Path, hub: FakeHub, repo: Path) -> None:
    save(repo.parent / "a" / "b" / "c.safetensors", official_keys(STYLE))
    assert run(overlay, 1.0, lora="a/b/c.safetensors") == ["c-1"]
    assert hub.fetched("") == []


def test_a_hand_edited_manifest_does_not_break_anything(overlay: Path) -> None:
    run(overlay, 0.5)
    manifest = read_manifest(overlay)
    made: Bake = manifest.bakes["distilled-0.5"]
    odd = dataclasses.replace(made, loras=(dataclasses.replace(made.loras[0], strength=0.9),))
    (overlay / "ltxpack.json").write_bytes(manifest.with_bake("distilled-0.5", odd).dump())
    with pytest.raises(OverlayError, match="made from other inputs"):
        run(overlay, 0.5)
    run(overlay, 0.5, force=True)
    assert read_manifest(overlay).bakes["distilled-0.5"] == made
    base = manifest.components["transformer"]
    bare = dataclasses.replace(base, files=tuple(file for file in base.files if file.path.endswith("config.json")))
    (overlay / "ltxpack.json").write_bytes(dataclasses.replace(manifest, components={"transformer": bare}).dump())
    with pytest.raises(OverlayError, match="holds no weights of the transformer"):
        run(overlay, 0.25)
