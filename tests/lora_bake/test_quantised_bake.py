"""Quantised bakes: codes and scales of the float32 sum, rounded once; what is stored, told, refused and made again."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_support import (
    INDEX,
    LORA_FILE,
    baked,
    change_byte,
    linears,
    low_rank,
    make_overlay,
    official_keys,
    random_weights,
    save,
)
from safetensors import safe_open
from support import distance, load, load_all, ltxpack, refused, tree

from ltxpack.activations import FORMAT, activation_scale, base_digest
from ltxpack.files.tensorfile import read_index
from ltxpack.lora_bake.fuse import Workspace
from ltxpack.lora_bake.quantise import encode, hadamard
from ltxpack.lora_bake.stream import Engine, FactorReader
from ltxpack.ltx23.codes import kept_blocks, rotated_together
from ltxpack.manifest import MANIFEST_NAME, read_manifest

BASE = random_weights()
# Of a third of the linears, so that each shard has weights to copy or quantise alone too.
FACTORS = low_rank(linears()[::3])
BLOCK = "transformer_blocks.1."
INNER = [linear for linear in linears() if linear.startswith(BLOCK)]
FORMS = ("--format", "bf16", "--format", "fp8", "--format", "int8")
VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return make_overlay(tmp_path / "out", BASE, shards=3, distilled=official_keys(FACTORS))


def weights(overlay: Path, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a bake, or of the base."""
    folder = overlay / "bakes" / name if name else overlay / "transformer"
    return load_all(folder)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def decoded(found: dict[str, torch.Tensor], linear: str) -> torch.Tensor:
    """A quantised weight as its codes and scales say, not rotated back."""
    return found[f"{linear}.weight"].float() * found[f"{linear}.weight_scale"]


def coverage(overlay: Path, name: str) -> dict:
    return json.loads((overlay / "bakes" / name / "coverage.json").read_text())


# The arithmetic


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=40), st.floats(2.0**-20, 2.0**30, width=32))
def test_fp8_codes_are_the_nearest_values_ties_to_even(values: list[float], size: float) -> None:
    rows = torch.tensor([values]) * torch.tensor(size)
    largest = rows.abs().max().item()
    made = encode("fp8", rows.clone(), largest, Workspace())
    assert made.scales == (max(np.float32(largest) / np.float32(448), 2.0**-126) if largest else 1)
    wanted = (rows / made.scales).double()
    gaps = (wanted.T - VALUES.double()).abs().nan_to_num(math.inf)
    nearest = gaps.min(dim=1).values
    codes = made.codes.view(torch.uint8).long()[0]
    found = gaps[torch.arange(len(codes)), codes]
    assert torch.equal(found, nearest)
    tied = ((gaps == nearest[:, None]) & (VALUES != 0)).sum(dim=1) > 1
    assert not (codes[tied] & 1).any()
    error = (made.codes.float() * made.scales - rows).double()
    assert made.stat.error_square == pytest.approx(
        error.square().sum().item(), rel=1e-3, abs=max(1e-12 * largest**2, 1e-44)
    )


@given(st.integers(1, 5), st.sampled_from([4, 6, 12, 16, 80, 256, 512]), st.integers(0, 99))
def test_int8_codes_are_those_of_rotated_rows(rows: int, inputs: int, seed: int) -> None:
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    made = encode("int8", weight.clone(), 0.0, Workspace())
    size = rotated_together(inputs)
    assert inputs % size == 0 and size <= 256 and (size == 256 or inputs % (4 * size))
    rotation = hadamard(size).double()
    assert torch.equal(rotation @ rotation, torch.eye(size).double()) and torch.equal(rotation, rotation.T)
    rotated = (weight.double().view(-1, size) @ rotation).view(rows, inputs)
    largest = rotated.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(made.scales.double(), torch.where(largest > 0, largest / 127, 1.0), rtol=1e-6, atol=0)
    off = (made.codes.double() - rotated / made.scales.double()).abs()
    assert off.max() <= 0.5001 and made.codes.abs().max() <= 127
    back = (made.codes.double() * made.scales.double()).view(-1, size) @ rotation
    assert made.stat.error_square == pytest.approx(
        (back.view_as(weight) - weight).square().sum().item(), rel=1e-3, abs=1e-9
    )


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_codes_are_the_same_where_no_error_is_asked_for(form: str) -> None:
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(4)) * torch.logspace(-6, 4, 64)
    largest, work = rows.abs().max().item(), Workspace()
    known, bare = (encode(form, rows.clone(), largest, work, measure=measure) for measure in (True, False))
    assert torch.equal(known.codes.view(torch.uint8), bare.codes.view(torch.uint8))
    assert torch.equal(known.scales, bare.scales) and known.stat.sum_square > 0 and not any(bare.stat)


@given(st.floats(0, 2.0**120, width=32))
def test_an_input_scale_is_the_power_of_two_that_clips_nothing(largest: float) -> None:
    scale = activation_scale(largest)
    assert math.frexp(scale)[0] == 0.5
    assert largest <= 448 * scale and (not largest or scale == 2.0**-126 or largest > 224 * scale)
    assert largest or scale == 1


# Whole bakes


def test_codes_and_scales_are_the_goldens(golden: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "out"
    assert ltxpack("materialize", golden, overlay).returncode == 0
    [file] = golden.glob("golden/fp8_weights_*")
    with safe_open(file, "pt") as opened:
        stated = dict(opened.metadata())
        recorded = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dictionary)
    count = json.loads((overlay / "transformer" / "config.json").read_text())["num_layers"]
    for kind, form in (("tensor", "fp8"), ("int8", "int8")):
        kept = sorted(set(range(count)) - set(json.loads(stated[f"{kind}_blocks"])))
        keep = ",".join(map(str, kept)) or "none"
        flags = ("--strength", stated["strength"], "--format", form, "--keep-blocks", keep)
        [name] = baked(overlay, *flags)
        found, differing = weights(overlay, name), 0
        expected = {
            key.removeprefix(f"{kind}."): value for key, value in recorded.items() if key.startswith(f"{kind}.")
        }
        linear = {key.removesuffix(".weight") for key in expected if key.endswith(".weight")}
        assert linear == set(read_manifest(overlay).bakes[name].quantised)
        for key, value in expected.items():
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
            if key.endswith(".weight"):
                gap = (found[key].view(torch.int8).int() - value.view(torch.int8).int()).abs()
                assert gap.max() <= 1, key
                differing += int(gap.sum())
            elif key.endswith(".weight_scale"):
                torch.testing.assert_close(found[key], value, rtol=1e-6, atol=0)
        assert differing <= 3


def test_forms_made_together_are_those_made_alone_and_all_else_is_the_bf16_bake(overlay: Path) -> None:
    with mock.patch.object(Engine, "fuse_shard", autospec=True, side_effect=Engine.fuse_shard) as reads:
        together = baked(overlay, "--strength", 0.7, "--strength", 0, *FORMS)
    assert reads.call_count == 3, "each shard of the base is read once"
    names = ["distilled-0.7", "distilled-0.7-fp8", "distilled-0.7-int8"]
    assert together == [*names, "distilled-0", "distilled-0-fp8", "distilled-0-int8"]
    first, plain = tree(overlay / "bakes"), weights(overlay, names[0])
    for form in ("bf16", "fp8", "int8"):
        for strength in (0.7, 0):
            baked(overlay, "--strength", strength, "--format", form, "--force")
    second = tree(overlay / "bakes")
    # A bf16 bake alone may be made by another kernel.
    assert {path: data for path, data in first.items() if "8/" in path} == {
        p: d for p, d in second.items() if "8/" in p
    }
    for name, strength in ((names[1], 0.7), (names[2], 0.7), ("distilled-0-fp8", 0.0)):
        found = weights(overlay, name)
        base = BASE if not strength else plain
        assert all(torch.equal(bits(found[key]), bits(base[key])) for key in base if not key.startswith(BLOCK))
        scales = {key for key in found if key.endswith("_scale")}
        assert found.keys() - scales == base.keys()
        assert {key.rpartition(".")[0] for key in scales} == set(INNER)
        index = read_index(overlay / "bakes" / name / INDEX)
        assert index.keys() == found.keys()
        assert ltxpack("verify", overlay).returncode == 0
        for linear in INNER:
            assert bits(found[f"{linear}.bias"]).equal(bits(base[f"{linear}.bias"]))
    stored = load(overlay / "bakes" / names[1] / index[f"{INNER[0]}.weight"])
    assert stored[f"{INNER[0]}.weight"].dtype == torch.float8_e4m3fn and stored[f"{INNER[0]}.input_scale"] == 1


def test_errors_are_those_of_what_is_stored_and_the_official_rule_adds_its_own(overlay: Path, tmp_path: Path) -> None:
    style = save(tmp_path / "style.safetensors", official_keys(low_rank(INNER[:9], 2, seed=5)))
    stack = ("--strength", 0.7, "--add", f"{style}=-0.3")
    exact = {linear: BASE[f"{linear}.weight"].double() for linear in INNER}
    for factors, strength in ((low_rank(INNER[:9], 2, seed=5), -0.3), (FACTORS, 0.7)):
        exact |= {k: exact[k] + strength * (b.double() @ a.double()) for k, (a, b) in factors.items() if k in exact}
    for rule in ("fp32", "official"):
        [plain, name] = baked(overlay, *stack, "--rule", rule, "--format", "bf16", "--format", "fp8", "--force")
        found, bf16, told = weights(overlay, name), weights(overlay, plain), coverage(overlay, name)
        for linear in INNER:
            target = told["targets"][f"{linear}.weight"]
            error = distance(decoded(found, linear), exact[linear])
            assert target["error"] == pytest.approx(error, rel=0.006), linear
            if rule == "fp32":
                assert target["rounding"] == 1
                continue
            # The sum is the official bake's weight.
            weight = bf16[f"{linear}.weight"].float()
            rounded = encode("fp8", weight, weight.abs().max().item(), Workspace())
            assert bits(rounded.codes).equal(bits(found[f"{linear}.weight"]))
            assert 0.9 < target["rounding"] <= 1
        assert (min(target["rounding"] for target in told["targets"].values() if "rounding" in target) < 1) == (
            rule == "official"
        )
        assert told["median_error"] <= told["largest_error"] < 0.04
        page = (overlay / "bakes" / name / "coverage.html").read_text()
        assert f"{100 * told['median_error']:.3g} %" in page and "not calibrated" in page


def test_the_base_alone_is_quantised_without_a_lora(overlay: Path) -> None:
    manifest = dataclasses.replace(read_manifest(overlay), loras=(), transformer_kind="distilled")
    (overlay / MANIFEST_NAME).write_bytes(manifest.dump())
    assert baked(overlay, "--strength", 0, "--format", "fp8", "--keep-blocks", "none") == ["base-fp8"]
    assert read_manifest(overlay).bakes["base-fp8"].loras == ()
    assert "no distilled LoRA" in refused(ltxpack("bake-lora", overlay, "--strength", 0), 1)


def test_the_overlays_own_lora_at_0_is_not_read(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_byte(overlay / LORA_FILE)
    assert "has changed" in refused(ltxpack("bake-lora", overlay, "--strength", "1"), 1)
    monkeypatch.setattr(FactorReader, "term", None)
    wanted = ("bake-lora", overlay, "--strength", "0", "--format", "fp8", "--keep-blocks", "none")
    assert json.loads(ltxpack(*wanted, "--plan", "--json").stdout)["arithmetic"]["flop"] == 0
    assert ltxpack(*wanted).returncode == 0
    assert "--keep-blocks names a block" in refused(ltxpack(*wanted, "--strength", "1", "--keep-blocks", "9"), 2)


def test_weights_of_zeros_have_the_scale_1_and_what_is_not_finite_is_named(tmp_path: Path) -> None:
    zeros, broken = f"{INNER[0]}.weight", f"{INNER[3]}.weight"
    base = {**BASE, zeros: torch.zeros_like(BASE[zeros])}
    for form in ("fp8", "int8"):
        overlay = make_overlay(tmp_path / form, base, distilled=official_keys(FACTORS))
        [name] = baked(overlay, "--strength", 0, "--format", form)
        found = weights(overlay, name)
        assert not bits(found[zeros]).any() and bool((found[f"{zeros}_scale"] == 1).all())
        for i, value in enumerate((math.nan, math.inf)):
            spoiled = {**base, broken: BASE[broken].clone()}
            spoiled[broken][0, 0] = value
            overlay = make_overlay(tmp_path / f"{form} {i}", spoiled, distilled=official_keys(FACTORS))
            assert broken in refused(ltxpack("bake-lora", overlay, "--strength", "0", "--format", form), 1)
            assert not (overlay / "bakes").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--format fp8 --keep-blocks 3", "blocks 0 to 2"),
        ("--format fp8 --keep-blocks 0,1,2", "all blocks stay in bf16"),
        ("--format fp8 --keep-blocks first", "--keep-blocks needs numbers"),
        ("--keep-blocks 1", "goes with --format fp8 or int8"),
        ("--format int8 --activations a.safetensors", "goes with --format fp8"),
        ("--format bf16 --format fp8 --name x", "one strength and one format"),
        ("--format fp4", "fp4"),
    ],
)
def test_what_does_not_go_together_is_wrong_use(flags: str, told: str, overlay: Path) -> None:
    assert told in refused(ltxpack("bake-lora", overlay, "--strength", "1", *flags.split()), 2)


def test_the_one_block_of_a_model_is_first_and_last_and_is_kept_once() -> None:
    assert [kept_blocks(count) for count in (1, 2, 5, 48)] == [(0,), (0, 1), (0, 4), (0, 1, 46, 47)]


def test_another_choice_of_blocks_is_another_bake(overlay: Path) -> None:
    flags = ("--strength", "0.5", "--format", "fp8")
    [name] = baked(overlay, *flags)
    assert "is there already" in ltxpack("bake-lora", overlay, *flags).stdout
    told = refused(ltxpack("bake-lora", overlay, *flags, "--keep-blocks", "none"), 1)
    assert f"{len(INNER)} linears in fp8" in told and f"{3 * len(INNER)} linears in fp8" in told
    baked(overlay, *flags, "--keep-blocks", "none", "--force")
    assert len(read_manifest(overlay).bakes[name].quantised) == 3 * len(INNER)


def test_the_plan_is_exact_and_a_damaged_bake_is_made_again(overlay: Path) -> None:
    flags = ("--strength", "0.5", "--format", "fp8", "--format", "int8")
    plan = json.loads(ltxpack("bake-lora", overlay, *flags, "--plan", "--json").stdout)
    names = baked(overlay, *flags)
    for file in plan["files"]:
        size = (overlay / file["path"]).stat().st_size
        assert size == file["bytes"] if "coverage" not in file["path"] else size <= file["bytes"], file
    whole = tree(overlay)
    for name in names:
        shard = next(path for path in (overlay / "bakes" / name).glob("*.safetensors") if not path.is_symlink())
        change_byte(shard, shard.stat().st_size // 2, 255)
    assert ltxpack("verify", overlay).returncode == 1
    assert ltxpack("verify", overlay, "--repair").returncode == 0
    assert tree(overlay) == whole


# Calibration


def activations(path: Path, overlay: Path, made_of: dict[str, list], largest: float = 7.0, **metadata: str) -> Path:
    """A file such as ``run --save-activations`` writes: the largest |x| of the i-th linear is ``largest`` + i."""
    files = read_manifest(overlay).components["transformer"].files
    tensors = {f"{name}:{k}": torch.tensor(largest + i) for name in made_of for i, k in enumerate(sorted(linears()))}
    stated = {
        "format": FORMAT,
        "model_version": "2.3.0",
        "base": base_digest(files),
        "transformers": json.dumps(made_of),
    }
    return save(path, tensors, {**stated, **metadata})


def test_input_scales_are_taken_of_the_bake_that_was_recorded(overlay: Path, tmp_path: Path) -> None:
    [lora] = read_manifest(overlay).loras
    made_of = {"base": [], "mine": [[lora.file.blake3, 0.5]]}
    file = activations(tmp_path / "a.safetensors", overlay, made_of)
    flags = ("--strength", "0.5", "--format", "fp8", "--activations", file)
    [name] = baked(overlay, *flags)
    found, bake = weights(overlay, name), read_manifest(overlay).bakes[name]
    wanted = {linear: activation_scale(7.0 + i) for i, linear in enumerate(sorted(linears()))}
    assert {linear: found[f"{linear}.input_scale"].item() for linear in INNER} == {k: wanted[k] for k in INNER}
    assert bake.calibration and bake.calibration.name == file.name
    # Without the file: repair takes the scales from the manifest.
    file.unlink()
    whole = tree(overlay)
    for path in (overlay / "bakes" / name).glob("*.safetensors"):
        path.unlink()
    assert ltxpack("verify", overlay, "--repair").returncode == 0 and tree(overlay) == whole
    activations(file, overlay, {"other": [[lora.file.blake3, 0.25]]})
    assert "other bakes" in refused(ltxpack("bake-lora", overlay, *flags, "--force"), 1)
    activations(file, overlay, made_of, base="another")
    assert "another base" in refused(ltxpack("bake-lora", overlay, *flags, "--force"), 1)
    for number in (-1e6, math.nan):
        activations(file, overlay, made_of, number)
        assert "is not the largest |x|" in refused(ltxpack("bake-lora", overlay, *flags, "--force"), 1)
    save(file, {"x": torch.ones(1)})
    assert "is not an activations file" in refused(ltxpack("bake-lora", overlay, *flags, "--force"), 1)
    assert tree(overlay) == whole
