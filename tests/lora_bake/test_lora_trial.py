"""What is told before a bake: LoRAs that change nothing, and which of two meanings DoRA's magnitudes have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_support import linears, low_rank, make_overlay, official, official_keys, random_weights, save
from safetensors.torch import load_file
from support import Notes

from ltxpack.lora_bake.bake import bake
from ltxpack.lora_bake.coverage import BakeReport
from ltxpack.lora_bake.plan import BakeOptions

MODULES = [name for name in linears() if name.endswith(".attn1.to_q")]
FACTORS = low_rank(MODULES)
KEYS = official_keys(FACTORS)
BASE = random_weights()
Tensors = dict[str, torch.Tensor]


def baked(folder: Path, tensors: Tensors, strength: float = 1.0) -> tuple[Notes, BakeReport, Tensors]:
    """What is told, the report, and the weights of the bake."""
    path = save(folder / "x.safetensors", tensors)
    overlay = make_overlay(folder / "overlay", BASE)
    told = Notes()
    [report] = bake(BakeOptions(overlay, (strength,), lora=str(path), name="try"), told)
    return told, report, load_file(overlay / "bakes/try/diffusion_pytorch_model.safetensors")


def zeroed(keep: int, *endings: str) -> Tensors:
    """The LoRA with the factors of these endings zero, but for those of the first ``keep`` modules."""
    named = [name for name in KEYS if name.endswith(endings)][keep * len(endings) :]
    return KEYS | {name: torch.zeros_like(KEYS[name]) for name in named}


def alphas(value: float, count: int = len(MODULES)) -> Tensors:
    return {f"diffusion_model.{official(module)}.alpha": torch.tensor(value) for module in MODULES[:count]}


def magnitudes(value: float) -> Tensors:
    names = {f"diffusion_model.{official(module)}.dora_scale": len(FACTORS[module][1]) for module in MODULES}
    return {name: torch.full((rows, 1), value) for name, rows in names.items()}


TWO = f"{MODULES[1]}.weight, {MODULES[2]}.weight"
# Tensors -> how the one warning goes on behind the file's name.
IDLE: dict[str, tuple[Tensors, str]] = {
    "B": (zeroed(0, "lora_B.weight"), f"changes nothing: all {len(MODULES)} targets have a factor of zeros"),
    "some B": (zeroed(1, "lora_B.weight"), f"2 of 3 targets have a factor of zeros and change nothing: {TWO}"),
    "minus zero": (
        zeroed(0, "lora_B.weight") | {name: -torch.zeros_like(KEYS[name]) for name in KEYS if "lora_A" in name},
        "changes nothing: all 3 targets have a factor of zeros; its last 6 tensors are all zero, as in half a download",
    ),
    "half a download": (
        zeroed(1, "lora_A.weight", "lora_B.weight"),
        f"2 of 3 targets have a factor of zeros and change nothing: {TWO}; its last 4 tensors are all zero, as in half",
    ),
    "magnitudes": (
        KEYS | magnitudes(0.0),
        f"3 of 3 targets make their weights zero, by a magnitude or a new weight of zeros: {MODULES[0]}.weight, {TWO}",
    ),
    "half a DoRA": (
        zeroed(0, "lora_A.weight", "lora_B.weight") | magnitudes(0.0),
        f"3 of 3 targets make their weights zero, by a magnitude or a new weight of zeros: {MODULES[0]}.weight, {TWO}; "
        "its last 9 tensors are all zero, as in half a download",
    ),
    "alpha": (KEYS | alphas(0.0), "alpha is 0 in 3 of 3 targets: it changes nothing"),
    "some alphas": (KEYS | alphas(0.0, 1) , f"alpha is 0 in 1 of 3 targets: these change nothing: {MODULES[0]}.weight"),
    "reverse": (KEYS | alphas(-4.0), "alpha is negative in 3 of 3 targets: they act in reverse"),
}  # fmt: skip


@pytest.mark.parametrize("case", IDLE)
def test_what_changes_nothing_is_told_before(case: str, tmp_path: Path) -> None:
    tensors, warning = IDLE[case]
    told, report, weights = baked(tmp_path, tensors)
    [found] = told.warnings
    assert found.startswith(f"x.safetensors: {warning}")
    idle = [name for name in BASE if torch.equal(weights[name], BASE[name])]
    changed = len(BASE) - len(idle)
    assert changed == {
        "some B": 1,
        "half a download": 1,
        "some alphas": 2,
        "reverse": 3,
        "magnitudes": 3,
        "half a DoRA": 3,
    }.get(case, 0)
    assert any(line.startswith("  changes nothing: 0 of ") for line in report.lines()) == (changed == 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-6])
def test_what_bf16_does_not_resolve_is_told_before(scale: float, tmp_path: Path) -> None:
    tiny = {name: (tensor.float() * scale) for name, tensor in KEYS.items()}
    told, report, weights = baked(tmp_path, tiny)
    [warning] = told.warnings
    assert warning.startswith("bakes/try: changes nothing: none of ") and "below what bf16 resolves" in warning
    assert all(torch.equal(weights[name], BASE[name]) for name in BASE)
    assert any("changes nothing: 0 of" in line for line in report.lines())


def test_a_sound_lora_is_told_nothing(tmp_path: Path) -> None:
    told, report, _ = baked(tmp_path, KEYS)
    assert told.warnings == [] and not any("nothing" in line for line in report.lines())


def dora(meaning: str, magnitudes: dict[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
    """A DoRA whose dora_scale has this meaning, and the weights that it stands for, before rounding."""
    tensors, expected = dict(KEYS), {}
    for module, (a, b) in FACTORS.items():
        base, magnitude = BASE[f"{module}.weight"].double(), magnitudes[module].double()
        total = base + b.double() @ a.double()
        before, after = base.norm(dim=1), total.norm(dim=1)
        stored = magnitude if meaning == "norms" else magnitude * before / after
        tensors[f"diffusion_model.{official(module)}.dora_scale"] = stored.float()[:, None]
        expected[f"{module}.weight"] = magnitude[:, None] * total / after[:, None]
    return tensors, expected


@pytest.mark.parametrize("meaning", ["norms", "factors"])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.2])
def test_the_norms_tell_what_doras_magnitudes_mean(meaning: str, spread: float, tmp_path: Path) -> None:
    """m · (W+ΔW) / |W+ΔW| is meant, whether m is stored or m · |W| / |W+ΔW|, which is multiplied by (W+ΔW) / |W|."""
    generator = torch.Generator().manual_seed(3)
    learned = {
        module: BASE[f"{module}.weight"].float().norm(dim=1)
        * (1.1 + spread * torch.randn(len(b), generator=generator)).clamp(min=0.3)
        for module, (_, b) in FACTORS.items()
    }
    tensors, expected = dora(meaning, learned)
    told, _, weights = baked(tmp_path, tensors)
    shown = {"norms": "norms, over |W+ΔW|", "factors": "factors over |W|"}[meaning]
    assert f"x.safetensors: its dora_scale is taken as {shown}, as the norms show" in told.notes
    for name, exact in expected.items():
        assert torch.allclose(weights[name].double(), exact, rtol=2**-8, atol=1e-6)


def test_norms_that_tell_nothing(tmp_path: Path) -> None:
    """With hardly any ΔW both meanings are one."""
    tensors, _ = dora("norms", {m: torch.rand(len(b)) + 0.1 for m, (_, b) in FACTORS.items()})
    tensors |= {name: torch.full_like(tensor, 1e-20) for name, tensor in tensors.items() if "lora_" in name}
    told, _, _ = baked(tmp_path, tensors)
    assert any("taken as norms, over |W+ΔW|, which the norms do not tell" in note for note in told.notes)


def test_magnitudes_of_peft_mean_one_thing(tmp_path: Path) -> None:
    tensors, expected = dora("norms", {m: torch.rand(len(b)) + 0.1 for m, (_, b) in FACTORS.items()})
    peft = {name.replace("dora_scale", "lora_magnitude_vector"): tensor[:, 0] if "dora" in name else tensor
            for name, tensor in tensors.items()}  # fmt: skip
    told, _, weights = baked(tmp_path, peft)
    assert not any("taken as" in note for note in told.notes)
    for name, exact in expected.items():
        assert torch.allclose(weights[name].double(), exact, rtol=2**-8, atol=1e-6)
