"""Strengths that are others in some blocks: how they are written, the weights they give, and who tells of them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_support import STYLE, change_byte, linears, low_rank, make_overlay, official_keys, random_weights, save
from lora_support import baked as bakes
from support import load_all, ltxpack, refused, tree

from ltxpack.activations import ActivationsFile
from ltxpack.errors import OverlayError, UsageError
from ltxpack.lora_bake.coverage import split_name
from ltxpack.lora_bake.plan import bake_name
from ltxpack.manifest import BAKE_NAME, MANIFEST_NAME, read_manifest
from ltxpack.runtime.commands import baked
from ltxpack.runtime.overlay import Overlay, choose
from ltxpack.runtime.sampling.recipes import HQ
from ltxpack.strength import BlockRun, Strength

BASE = random_weights()
FACTORS = low_rank([module for module in linears() if ".attn1." in module or ".ff." in module or "." not in module])


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return make_overlay(tmp_path / "out", BASE, shards=6, distilled=official_keys(FACTORS))


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return save(tmp_path / "style.safetensors", official_keys(STYLE))


def made(overlay: Path, *words: str) -> str:
    return bakes(overlay, *words, "--device", "cpu")[0]


# How they are written


@pytest.mark.parametrize(
    ("text", "plain", "in_name"),
    [
        ("0.8", "0.8", "0.8"),
        ("0.8@0-11,30:0.5", "0.8@0-11,30:0.5", "0.8_0-11_30at0.5"),
        ("1@3:0@1,0:-0.5", "1@0-1:-0.5@3:0", "1_0-1at-0.5_3at0"),
        ("0@5,4,7:.5@6:.5", "0@4-7:0.5", "0_4-7at0.5"),
        ("0.5@1-2:0.5@3:1e-3", "0.5@3:0.001", "0.5_3at0.001"),
        ("1@ 0 , 2 :0.5", "1@0,2:0.5", "1_0_2at0.5"),
    ],
)
def test_one_meaning_has_one_spelling_and_one_name(text: str, plain: str, in_name: str) -> None:
    strength = Strength.parse(text)
    assert (str(strength), strength.in_name) == (plain, in_name)
    assert Strength.parse(plain) == strength
    assert BAKE_NAME.fullmatch(bake_name([("style", strength), ("distilled", 0.5)]))


@pytest.mark.parametrize(
    "text",
    ["1@0-3", "1@:0.5", "1@0-:0.5", "1@-3:0.5", "1@3-1:0.5", "1@0,,1:0.5", "1@0-3:0.5@2:1", "1@0,0:0.5", "1@a:0.5",
     "1@0:half", "half@0:1", "@0:1", "1@0:1e19", "1@0:nan", "1@1234567:1", "1@0:", "1@"],
)  # fmt: skip
def test_blocks_that_are_no_blocks_or_named_twice_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Strength.parse(text)
    assert caught.value.next
    assert "next: " in refused(ltxpack("bake-lora", "out", "--strength", text, "--add", f"style.safetensors={text}"), 2)


@pytest.mark.parametrize(("typed", "blocks"), [("0.8@0-3", "0-3"), ("0.8@", "0-11")])
def test_blocks_without_their_strength_are_told_both_meanings(typed: str, blocks: str) -> None:
    with pytest.raises(UsageError, match=rf"write 0@{blocks}:0\.8 for these blocks alone, 0\.8@{blocks}:0 for all"):
        Strength.parse(typed)


@given(st.dictionaries(st.integers(0, 60), st.sampled_from([0.0, 0.5, -1.0, 2.25])), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_block_has_the_strength_it_was_given(blocks: dict[int, float], value: float) -> None:
    strength = Strength.of(Strength(value, tuple(BlockRun(block, block, by) for block, by in blocks.items())))
    assert [strength.at(block) for block in range(62)] == [blocks.get(block, value) for block in range(62)]
    assert Strength.parse(str(strength)) == strength and strength.at(None) == value
    assert strength.within(30) == Strength.parse(str(strength.within(30)))


def test_a_block_that_the_model_lacks_is_refused_with_what_works(overlay: Path, style: Path) -> None:
    words = ["--strength", "0.5@2:0", "--add", f"{style}=1@1-7,9:0.5", "--plan"]
    message = refused(ltxpack("bake-lora", overlay, *words), 2)
    assert "expected blocks 0 to 2, found 9" in message
    told = shlex.split(message.partition("next: ")[2])
    assert told[2:] == [str(overlay), "--strength", "0.5@2:0", "--add", f"{style}=1@1-2:0.5"]
    assert ltxpack(*told[1:], "--plan").returncode == 0


# What they give


@pytest.mark.parametrize("rule", ["fp32", "official"])
def test_each_block_changes_by_its_own_strength(overlay: Path, style: Path, rule: str) -> None:
    style_by, own_by = (lambda block: {0: 0.5, 2: -0.25}.get(block, 1.0)), (lambda block: {1: 0.0}.get(block, 0.5))
    name = made(overlay, "--strength", "0.5@1:0", "--add", f"{style}=1@0:0.5@2:-0.25", "--rule", rule)
    assert name == "distilled-0.5_1at0+style-1_0at0.5_2at-0.25"
    found, wrong, total = load_all(overlay / "bakes" / name), 0, 0
    assert found.keys() == BASE.keys()
    for tensor, before in BASE.items():
        delta = torch.zeros_like(before, dtype=torch.float64)
        for factors, by in ((STYLE, style_by), (FACTORS, own_by)):
            down, up = factors.get(tensor.removesuffix(".weight"), (None, None))
            if down is not None and up is not None:
                delta += by(split_name(tensor)[0]) * (up.double() @ down.double())
        if not delta.any():
            assert torch.equal(found[tensor], before), tensor
            continue
        wrong += int((found[tensor] != (before.double() + delta).float().bfloat16()).sum())
        total += delta.numel()
        step = (found[tensor].double() - before.double() - delta).norm() / delta.norm()
        assert step < (0.01 if rule == "fp32" else 0.02), tensor
    assert total and wrong / total < (1e-3 if rule == "fp32" else 0.5)


def test_the_addmm_kernel_and_codes_take_them_too(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltxpack.lora_bake.fuse.cpu_has_bf16_unit", lambda: True)
    one = made(overlay, "--strength", "0.5@1:0@2:1")
    assert read_manifest(overlay).bakes[one].kernel == "addmm"
    plain = {strength: load_all(overlay / "bakes" / made(overlay, "--strength", strength)) for strength in ("0.5", "1")}
    plain["0"] = BASE
    for name, tensor in load_all(overlay / "bakes" / one).items():
        assert torch.equal(tensor, plain[{1: "0", 2: "1"}.get(split_name(name)[0], "0.5")][name]), name
    eight = made(overlay, "--strength", "0.5@1:0@2:1", "--format", "int8", "--keep-blocks", "none")
    alone = made(overlay, "--strength", "1", "--format", "int8", "--keep-blocks", "none")
    both = [load_all(overlay / "bakes" / name) for name in (eight, alone)]
    assert all(torch.equal(both[0][name], both[1][name]) == (split_name(name)[0] == 2)
               for name in both[0] if name.endswith(".attn1.to_q.weight"))  # fmt: skip


def test_several_at_once_are_each_alone_and_idle_blocks_are_links(tmp_path: Path, style: Path) -> None:
    together, apart = (make_overlay(tmp_path / name, BASE, shards=6, distilled=official_keys(FACTORS)) for name in "ab")
    strengths = ["0@1:1", "1@0:0.5", "0.5"]
    made(together, *(word for by in strengths for word in ("--strength", by)))
    for by in strengths[::-1]:
        made(apart, "--strength", by)
    assert tree(together) == tree(apart)
    folder = together / "bakes" / "distilled-0_1at1"
    changed = {split_name(name)[0] for name in read_manifest(together).bakes[folder.name].changed}
    assert changed == {1} and any(path.is_symlink() for path in folder.iterdir())


# Who tells of them


def test_the_manifest_the_reports_and_the_plan(overlay: Path, style: Path) -> None:
    words = ["--strength", "0@1:0.5", "--add", f"{style}=1@0,2:0.5"]
    plan = json.loads(ltxpack("bake-lora", overlay, *words, "--plan", "--json").stdout)
    name = made(overlay, *words)
    assert {file["path"].split("/")[1] for file in plan["files"]} == {name}
    for file in plan["files"]:
        exact = not file["path"].endswith(("coverage.json", "coverage.html"))
        size = (overlay / file["path"]).stat().st_size
        assert size == file["bytes"] if exact else size <= file["bytes"], file["path"]
    added, main = read_manifest(overlay).bakes[name].loras
    assert main.blocks == (BlockRun(1, 1, 0.5),) and main.scale is None and not main.idle
    assert added.applied == Strength.parse("1@0,2:0.5")
    report = json.loads((overlay / "bakes" / name / "coverage.json").read_text())
    assert [lora["strength"] for lora in report["loras"]] == ["1@0,2:0.5", "0@1:0.5"]
    assert [lora["scales"] for lora in report["loras"]] == [[0.5, 1.0], [0.0, 0.5]]
    scales = {split_name(target)[0]: [term["scale"] for term in found["terms"]]
              for target, found in report["targets"].items() if target.endswith(".attn1.to_q.weight")}  # fmt: skip
    assert scales == {0: [0.5, 0.0], 1: [1.0, 0.5], 2: [0.5, 0.0]}
    assert "1@0,2:0.5" in (overlay / "bakes" / name / "coverage.html").read_text()
    assert "style.safetensors" in ltxpack("inspect", overlay, "--json").stdout
    again = ltxpack("bake-lora", overlay, "--strength", "0@1:.5", "--add", f"{style}=0.5@1:1", "--name", name)
    assert "made from other inputs" in refused(again, 1) and "1@0,2:0.5" in again.stderr
    done = ltxpack("bake-lora", overlay, "--strength", "0@1:.5@2:0", "--add", f"{style}=1@2:0.5@0:0.5")
    assert "is there already" in done.stdout


def test_a_damaged_one_is_made_again_to_the_byte(overlay: Path, style: Path) -> None:
    name = made(overlay, "--strength", "0.5@1:0", "--add", f"{style}=1@0:0.5@2:-0.25")
    before = tree(overlay)
    change_byte(next(path for path in (overlay / "bakes" / name).glob("*.safetensors") if not path.is_symlink()))
    assert ltxpack("verify", overlay).returncode == 1
    assert ltxpack("verify", overlay, "--repair", "--lora", style).returncode == 0
    assert tree(overlay) == before


def test_auto_leaves_them_to_whoever_names_them(overlay: Path) -> None:
    made(overlay, "--strength", "0.5@1:0", "--strength", "0@1:1", "--strength", "0.25")
    opened = Overlay(overlay, read_manifest(overlay))
    with pytest.raises(OverlayError, match="no bake that stage 2"):
        choose(opened, HQ, ("auto", "auto"))
    picked = choose(opened, HQ, ("auto", "distilled-0.5_1at0"))
    assert picked.stages == ("distilled-0.25", "distilled-0.5_1at0")
    assert baked(overlay, opened.manifest.bakes["distilled-0_1at1"]).endswith("--strength 0@1:1")


def test_an_activations_file_knows_them(tmp_path: Path) -> None:
    file = ActivationsFile("2.3.0", "0" * 64).with_larger("x", (("ab", "1@0:0.5"), ("cd", 0.5)), {"a": 1.0})
    (tmp_path / "a.safetensors").write_bytes(file.dump())
    assert ActivationsFile.read(tmp_path / "a.safetensors") == file


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifest of an overlay with a bake that has other strengths in two blocks."""
    overlay = make_overlay(tmp_path_factory.mktemp("recorded") / "out", BASE, distilled=official_keys(FACTORS))
    made(overlay, "--strength", "0.5@0:0@2:1")
    read_manifest(overlay)
    return (overlay / MANIFEST_NAME).read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda runs: [runs[0], {**runs[0], "strength": 3.0}],
        lambda runs: runs[::-1],
        lambda runs: [{**runs[0], "last": 0, "first": 2}],
        lambda runs: [{**runs[0], "strength": 1e300}],
        lambda runs: [{**runs[0], "strength": True}],
        lambda runs: [{**runs[0], "last": 1e6}],
        lambda runs: [],
    ],
)
def test_a_manifest_with_odd_blocks_is_refused(recorded: str, tmp_path: Path, change: Callable[[list], list]) -> None:
    document = json.loads(recorded)
    [bake] = document["bakes"].values()
    bake["loras"][0]["blocks"] = change(bake["loras"][0]["blocks"])
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(OverlayError):
        read_manifest(tmp_path)


def test_a_bake_without_them_is_recorded_as_before(overlay: Path) -> None:
    made(overlay, "--strength", "0.5@0:0.5")
    manifest = read_manifest(overlay)
    assert b'"blocks"' not in manifest.dump() and [*manifest.bakes] == ["distilled-0.5"]
    plain = dataclasses.replace(manifest.bakes["distilled-0.5"].loras[0], blocks=())
    assert plain == manifest.bakes["distilled-0.5"].loras[0] and plain.scale == 0.5


@given(st.text("0123456789.,:@-+e nai", max_size=24))
def test_any_text_is_a_strength_or_refused(text: str) -> None:
    try:
        strength = Strength.parse(text)
    except UsageError:
        return
    assert Strength.parse(str(strength)) == strength and BAKE_NAME.fullmatch(strength.in_name)
