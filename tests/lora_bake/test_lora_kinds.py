"""Every method of an adapter, saved with the library it is from and baked, gives the weight that the library merges.

``peft`` and ``lycoris-lora`` are the oracles; sums are compared before they are rounded.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lora_support import (
    fused_sums,
    low_rank,
    make_overlay,
    nested,
    official,
    official_keys,
    opened,
    random_weights,
    save,
    shapes,
    unfit,
)
from support import load_all

from ltxpack.errors import AdapterError
from ltxpack.files.tensorfile import read_tensorfile
from ltxpack.lora_bake import BakeOptions, bake
from ltxpack.lora_bake.methods import FORMULAS
from ltxpack.ltx23.lora_keys import METHODS
from ltxpack.materialize.inspect import inspect_path
from ltxpack.reporter import SilentReporter

BASE = random_weights(dtype=torch.float32)
ATTENTION = "transformer_blocks.1.attn1"
QUERY, WIDE = f"{ATTENTION}.to_q", "transformer_blocks.0.ff.net.0.proj"

A, B = "lora_A.weight", "lora_B.weight"

Tensors = dict[str, torch.Tensor]
# A LoRA of one weight.
[(DOWN, UP)] = low_rank([QUERY], dtype=torch.float32).values()
LOW = official_keys({QUERY: (DOWN, UP)})


def baked(path: Path, strength: float = 1.0) -> Tensors:
    """The float32 sums of every tensor that the adapter at ``path`` changes."""
    return fused_sums(opened(path), BASE, strength, pieces=3)


def agrees(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return bool((found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item()))


def flat(prefix: str, module: str) -> str:
    return prefix + module.replace(".", "_")


def linear(module: str) -> torch.nn.Linear:
    weight = BASE[f"{module}.weight"]
    made = torch.nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.data, made.bias.data = weight.clone(), BASE[f"{module}.bias"].clone()
    return made


# LyCORIS


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """With its own parameters other than those that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if not name.startswith("org_"):
            around = 1.0 if name in ("dora_scale", "rescale") else 0.0
            parameter.data = around + 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


def lycoris(kind: str, module: str, strength: float = 1.0, **options: Any) -> tuple[Tensors, torch.Tensor]:
    """(tensors by their endings, the weight it works with) of a method of LyCORIS.

    The weight is read off the forward pass, which training goes through: lycoris-lora 4.1.3 merges LoHa and LoKr with
    the square of alpha/rank.
    """
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    classes = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule, "oft": DiagOFTModule}
    classes["boft"] = ButterflyOFTModule
    org = linear(module)
    made = randomised(classes[kind]("x", org, multiplier=strength, **options))
    made.apply_to()
    with torch.no_grad():
        weight = (org(torch.eye(org.in_features)) - org.bias).T
    made.restore()
    return {name: tensor.detach().float() for name, tensor in made.state_dict().items()}, weight


LYCORIS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"lora_dim": 4, "alpha": 2}),
    "loha": ("loha", {"lora_dim": 4, "alpha": 2}),
    "lokr": ("lokr", {"lora_dim": 2, "alpha": 1, "factor": 4}),
    "lokr, both in two": ("lokr", {"lora_dim": 2, "alpha": 1, "factor": 8, "decompose_both": True}),
    "lokr, both whole": ("lokr", {"lora_dim": 4, "alpha": 1, "factor": 4, "full_matrix": True}),
    "oft": ("oft", {"lora_dim": 4}),
    "oft, bounded, rescaled": ("oft", {"lora_dim": 8, "constraint": 0.005, "rescaled": True}),
    "boft": ("boft", {"lora_dim": 4}),
    "boft, bounded, rescaled": ("boft", {"lora_dim": 2, "constraint": 0.01, "rescaled": True}),
    "dora": ("lora", {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    "dora over inputs": ("lora", {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_out": False}),
    "dora of lokr": ("lokr", {"lora_dim": 2, "alpha": 1, "factor": 4, "weight_decompose": True}),
    "dora of loha over inputs": ("loha", {"lora_dim": 2, "alpha": 1, "weight_decompose": True, "wd_on_out": False}),
}
# At other strengths lycoris-lora scales the sum of W and the whole change; here the strength scales the change.
ONLY_AT_ONE = frozenset(case for case in LYCORIS if case.startswith("dora"))


@pytest.mark.parametrize(
    ("case", "strength"), [(case, s) for case in LYCORIS for s in (1.0, 0.5) if s == 1 or case not in ONLY_AT_ONE]
)
def test_a_method_of_lycoris_is_what_lycoris_merges(case: str, strength: float, tmp_path: Path) -> None:
    kind, options = LYCORIS[case]
    tensors: Tensors = {}
    expected: Tensors = {}
    for module in (QUERY, WIDE):
        own, expected[f"{module}.weight"] = lycoris(kind, module, strength, **options)
        tensors |= {f"lycoris_{module.replace('.', '_')}.{name}": tensor for name, tensor in own.items()}
    found = baked(save(tmp_path / "x.safetensors", tensors), strength)
    assert found.keys() == expected.keys()
    assert all(agrees(found[name], expected[name]) for name in expected)
    assert not any(agrees(found[name], BASE[name], 1e-3) for name in expected)


# PEFT


def peft(config: Any, folder: Path, modules: tuple[str, ...] = (QUERY, WIDE), seed: int = 0) -> Tensors:
    """Save an adapter of PEFT for ``modules`` in ``folder``; the tensors it changes as PEFT merges them."""
    from peft import get_peft_model

    root = nested({module: linear(module) for module in modules})
    root.forward = lambda x: x  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(root, config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                around = 1.0 if "magnitude" in name or "boft_s" in name else 0.0
                parameter.data = around + 0.2 * torch.randn(parameter.shape, generator=generator)
        wrapped.save_pretrained(folder)
        merged = wrapped.merge_and_unload().state_dict()
    return {name: tensor for name, tensor in merged.items() if not torch.equal(tensor, BASE[name])}


def peft_configs() -> Mapping[str, Any]:
    """Configurations of PEFT by what they show."""
    from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

    at = {"target_modules": ["to_q", "proj"]}
    return {
        "lora": LoraConfig(r=4, lora_alpha=2, **at),
        "lora, rslora": LoraConfig(r=4, lora_alpha=2, use_rslora=True, **at),
        "lora of two ranks": LoraConfig(r=4, lora_alpha=2, rank_pattern={"proj": 2}, alpha_pattern={"to_q": 1}, **at),
        "lora with a bias": LoraConfig(r=4, lora_alpha=2, lora_bias=True, **at),
        "dora": LoraConfig(r=4, lora_alpha=2, use_dora=True, **at),
        "biases saved whole": LoraConfig(r=4, lora_alpha=2, bias="all", **at),
        "a module saved whole": LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], modules_to_save=["proj"]),
        "loha": LoHaConfig(r=4, alpha=2, **at),
        "loha of two ranks": LoHaConfig(r=4, alpha=2, rank_pattern={"proj": 2}, alpha_pattern={"to_q": 1}, **at),
        "lokr": LoKrConfig(r=2, alpha=1, decompose_factor=4, **at),
        "lokr, both in two": LoKrConfig(r=2, alpha=1, decompose_both=True, decompose_factor=8, **at),
        "lokr, both whole": LoKrConfig(r=64, alpha=16, **at),
        "oft": OFTConfig(oft_block_size=4, **at),
        "oft, seven terms": OFTConfig(oft_block_size=4, num_cayley_neumann_terms=7, **at),
        "oft, two terms": OFTConfig(oft_block_size=4, num_cayley_neumann_terms=2, **at),
        "oft, solved": OFTConfig(oft_block_size=4, use_cayley_neumann=False, **at),
        "oft, bounded": OFTConfig(oft_block_size=4, use_cayley_neumann=False, coft=True, eps=0.01, **at),
        "oft, one block for all": OFTConfig(oft_block_size=8, block_share=True, **at),
        "boft": BOFTConfig(boft_block_size=4, **at),
    }


def test_a_method_of_peft_is_what_peft_merges(tmp_path: Path) -> None:
    for case, config in peft_configs().items():
        expected = peft(config, tmp_path / case)
        found = baked(tmp_path / case)
        assert found.keys() >= expected.keys() >= {f"{QUERY}.weight", f"{WIDE}.weight"}, case
        assert not any("by default" in warning for warning in opened(tmp_path / case).warnings), case
        assert all(agrees(found[name], expected.get(name, BASE[name])) for name in found), case


def test_a_butterfly_of_peft_in_several_stages_is_its_product_of_matrices(tmp_path: Path) -> None:
    """PEFT makes these on a card alone. Stage i brings together halves of blocks that are 2^i halves apart."""
    out, columns = BASE[f"{QUERY}.weight"].shape
    stages, size = 3, 4
    blocks = torch.randn(stages, columns // size, size, size, generator=torch.Generator().manual_seed(3)) * 0.2
    scale = torch.linspace(0.5, 1.5, out)[:, None]
    whole = torch.eye(columns, dtype=torch.float64)
    for i, stage in enumerate(blocks.double()):
        skew = (stage - stage.mT) / 2
        unit = torch.eye(size, dtype=torch.float64)
        diagonal = torch.block_diag(*((unit - skew) @ torch.linalg.inv(unit + skew)))
        units = torch.arange(columns).reshape(-1, 2 ** (i + 1), size // 2)
        order = torch.cat([units[:, 0::2], units[:, 1::2]], 1).reshape(-1)
        permute = torch.eye(columns, dtype=torch.float64)[order]
        whole = permute @ diagonal @ permute.T @ whole
    tensors = {f"base_model.model.{QUERY}.boft_R": blocks, f"base_model.model.{QUERY}.boft_s": scale}
    weight = BASE[f"{QUERY}.weight"].double()
    turned = scale.double() * (whole @ weight.T).T
    path = save(tmp_path / "x.safetensors", tensors)
    for strength in (1.0, 0.25):
        expected = weight + strength * (turned - weight)
        assert agrees(baked(path, strength)[f"{QUERY}.weight"], expected.float())


# Any mixture

MODULES = (QUERY, f"{ATTENTION}.to_out.0", WIDE, "transformer_blocks.0.audio_attn1.to_v", "proj_out")
PREFIXES: tuple[Callable[[str], str], ...] = (
    lambda m: f"diffusion_model.{official(m)}",
    lambda m: f"transformer.{m}",
    lambda m: f"base_model.model.{m}",
    lambda m: flat("lora_unet_", official(m)),
    lambda m: flat("lycoris_model_", m),
    lambda m: f"pipe.dit._orig_mod.{m}",
    lambda m: m,
)
RANKS, FRACTIONS = st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.5, 1.0, 3.0])


@st.composite
def drawn_methods(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A method of LyCORIS with its options."""
    kind = draw(st.sampled_from(["lora", "loha", "lokr", "oft", "boft"]))
    if kind in ("oft", "boft"):
        bound = {"constraint": draw(st.sampled_from([0.0, 0.003]))}
        return kind, {"lora_dim": draw(st.sampled_from([2, 4])), "rescaled": draw(st.booleans()), **bound}
    options = {"lora_dim": draw(RANKS), "alpha": draw(st.sampled_from([0.5, 1.0, 2.0, 8.0]))}
    if kind == "lokr":
        options |= {"factor": draw(st.sampled_from([2, 4])), "decompose_both": draw(st.booleans())}
    if draw(st.booleans()):
        options |= {"weight_decompose": True, "wd_on_out": draw(st.booleans())}
    return kind, options


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from(MODULES), drawn_methods(), min_size=1),
    st.sampled_from(PREFIXES), st.sampled_from([1.0, 0.5, -0.25]),
)  # fmt: skip
def test_any_mixture_is_what_the_oracle_makes_of_it(
    methods: dict[str, tuple[str, dict[str, Any]]], spell: Callable[[str], str], strength: float
) -> None:
    # An unknown prefix is believed where it stands before the name of a module in a block.
    assume(methods.keys() != {"proj_out"} or "pipe" not in spell(""))
    tensors: Tensors = {}
    expected: Tensors = {}
    for module, (kind, options) in methods.items():
        own = {name: value for name, value in options.items() if strength == 1 or name != "weight_decompose"}
        made, expected[f"{module}.weight"] = lycoris(kind, module, strength, **own)
        tensors |= {f"{spell(module)}.{name}": tensor for name, tensor in made.items()}
    with tempfile.TemporaryDirectory() as folder:
        found = baked(save(Path(folder) / "x.safetensors", tensors), strength)
    assert found.keys() == expected.keys()
    assert all(agrees(found[name], expected[name], 2e-6) for name in expected)


# Its methods that it has once.
MIXED = ("diff", "loha", "lokr", "lora", "peft-boft", "peft-oft", "weight")


def mixture(path: Path) -> Path:
    """Every method in one file, the two ways of PEFT to rotate among them."""
    tensors = dict(LOW)
    for module, (kind, options) in zip(
        (f"{ATTENTION}.to_k", f"{ATTENTION}.to_v", WIDE, "proj_in"),
        (LYCORIS[case] for case in ("lokr", "oft, bounded, rescaled", "dora of loha over inputs", "boft")),
        strict=True,
    ):
        own, _ = lycoris(kind, module, **options)
        tensors |= {f"diffusion_model.{official(module)}.{name}": tensor for name, tensor in own.items()}
    audio = f"diffusion_model.{official('transformer_blocks.0.audio_attn1')}"
    normal = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)) * 0.2
    tensors[f"{audio}.to_q.oft_R.weight"] = normal[:, :6].contiguous()
    tensors[f"{audio}.to_k.boft_R"] = normal[None, :, :4, None] * normal[None, :, None, 4:]
    tensors[f"{audio}.to_k.boft_s"] = torch.linspace(0.5, 1.5, 16)[:, None]
    tensors[f"{audio}.to_v.diff"] = torch.full((16, 16), 0.25)
    tensors["diffusion_model.proj_out.weight"] = torch.randn(shapes()["proj_out.weight"])
    return save(path, tensors)


def test_bakes_of_every_method_are_the_sums_rounded_once(tmp_path: Path) -> None:
    """In bf16 and in codes, several strengths in one pass, weights in one piece and in rows."""
    overlay, path = make_overlay(tmp_path / "out", BASE, shards=3), mixture(tmp_path / "x.safetensors")
    options = BakeOptions(overlay, (1.0, 0.5), lora=str(path), formats=("bf16", "fp8"), device="cpu", keep_blocks=())
    for report in bake(options, SilentReporter()):
        strength = report.document["loras"][0]["strength"]
        folder, sums = overlay / report.path, baked(path, strength)
        made = load_all(folder)
        for name, expected in sums.items():
            scale = made.get(f"{name}_scale")
            found = made[name].float() * (1.0 if scale is None else scale)
            assert (found - expected).norm() <= (1e-6 if scale is None else 0.04) * expected.norm(), name
        untouched = BASE.keys() - sums.keys() - {name.removesuffix("_scale") for name in made if "_scale" in name}
        assert all(torch.equal(made[name], BASE[name]) for name in untouched)
        assert report.document["loras"][0]["methods"] == {**dict.fromkeys(MIXED, 1), "oft": 2}
    with pytest.raises(AdapterError, match="the official rule has no ") as caught:
        bake(replace(options, rule="official", formats=("bf16",), keep_blocks=None), SilentReporter())
    assert caught.value.next is not None and "--rule" not in caught.value.next
    assert len(caught.value.items) == 7


# What no library saves so


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale", "weight.scale_weight"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_fp8_are_multiplied_by_their_scales(
    spelling: str, rows: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    down, up = (4 * DOWN).to(dtype), (8 * UP).to(dtype)
    root = f"diffusion_model.{official(QUERY)}"
    scale = torch.linspace(0.1, 0.2, len(up))[:, None] if rows else torch.tensor(0.125)
    tensors = {f"{root}.{A}": down, f"{root}.{B}": up, "scaled_fp8": torch.zeros(2).to(dtype)}
    tensors |= {f"{root}.lora_A.{spelling}": torch.tensor([0.25]), f"{root}.lora_B.{spelling}": scale}
    expected = BASE[f"{QUERY}.weight"] + 0.5 * (scale * up.float()) @ (0.25 * down.float())
    assert agrees(baked(save(tmp_path / "x.safetensors", tensors), 0.5)[f"{QUERY}.weight"], expected)
    tensors[f"{root}.lora_B.{spelling}"] = torch.ones(3)
    error = unfit(save(tmp_path / "y.safetensors", tensors), "no shape agrees")
    assert "one number, or one for each of the 32 rows" in str(error.items)


@pytest.mark.parametrize("infix", ["", ".modules_to_save", ".modules_to_save.default"])
def test_a_module_saved_whole_is_the_new_one_at_strength_1(infix: str, tmp_path: Path) -> None:
    name, norm = "proj_out", f"{ATTENTION}.norm_q.weight"
    new = {f"{name}.weight": torch.randn(shapes()[f"{name}.weight"]), f"{name}.bias": torch.randn(8)}
    new[norm] = torch.randn(shapes()[norm])
    keys = {f"base_model.model.{key.replace('.weight', infix + '.weight')}": new[key] for key in new}
    path = save(tmp_path / "x.safetensors", keys | LOW)
    found, half = baked(path), baked(path, 0.5)
    for key, tensor in new.items():
        assert torch.equal(found[key], tensor)
        assert agrees(half[key], (BASE[key] + tensor) / 2)
    assert any("3 tensors are replaced whole" in warning for warning in opened(path).warnings)


def test_norms_of_lycoris_are_differences_and_a_bias_of_a_factor_is_scaled(tmp_path: Path) -> None:
    tensors = dict(LOW)
    root, norm = f"diffusion_model.{official(QUERY)}", f"{ATTENTION}.norm_q"
    weight, bias = torch.randn(shapes()[f"{norm}.weight"]), torch.randn(len(UP))
    tensors |= {f"{root}.lora_B.bias": bias, f"{root}.alpha": torch.tensor(2.0), f"{root}.diff_b": bias}
    tensors[f"lycoris_{ATTENTION.replace('.', '_')}_q_norm.w_norm"] = weight
    found = baked(save(tmp_path / "x.safetensors", tensors), 0.5)
    assert agrees(found[f"{norm}.weight"], BASE[f"{norm}.weight"] + 0.5 * weight)
    assert agrees(found[f"{QUERY}.bias"], BASE[f"{QUERY}.bias"] + 0.5 * (0.5 * bias + bias))
    assert agrees(found[f"{QUERY}.weight"], BASE[f"{QUERY}.weight"] + 0.25 * UP @ DOWN)


def test_tables_are_changed_by_their_own_names_and_a_bias_counts_no_rank(tmp_path: Path) -> None:
    tensors = dict(LOW)
    table = "transformer_blocks.0.audio_a2v_cross_attn_scale_shift_table"
    tensors[f"diffusion_model.{official(table)}.diff"] = torch.ones(shapes()[table])
    tensors["diffusion_model.scale_shift_table.set_weight"] = torch.ones(shapes()["scale_shift_table"])
    tensors[f"diffusion_model.{official(QUERY)}.lora_B.bias"] = torch.ones(len(UP))
    path = save(tmp_path / "x.safetensors", tensors)
    found = baked(path, 0.5)
    assert agrees(found[table], BASE[table] + 0.5) and len(found) == 4
    assert agrees(found["scale_shift_table"], (BASE["scale_shift_table"] + 1) / 2)
    assert [target.rank for target in opened(path).targets.values() if target.rank] == [4]


def test_tucker_cores_stand_between_the_factors(tmp_path: Path) -> None:
    """As LyCORIS writes them for convolutions: a is [rank, out] then, and the core has ones behind its ranks."""
    out, columns = shapes()[f"{QUERY}.weight"]
    normal = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3  # noqa: E731
    hada = {f"hada_{name}": normal(*shape) for name, shape in (
        ("w1_a", (3, out)), ("w1_b", (3, columns)), ("t1", (3, 3, 1, 1)),
        ("w2_a", (2, out)), ("w2_b", (2, columns)), ("t2", (2, 2)))}  # fmt: skip
    lokr = {"lokr_w1": normal(4, 4), "lokr_w2_a": normal(3, out // 4), "lokr_w2_b": normal(3, columns // 4),
            "lokr_t2": normal(3, 3, 1, 1)}  # fmt: skip
    keys = {f"diffusion_model.{official(QUERY)}.{name}": tensor for name, tensor in hada.items()}
    key = official(f"{ATTENTION}.to_k")
    keys |= {f"diffusion_model.{key}.{name}": tensor for name, tensor in lokr.items()}
    found = baked(save(tmp_path / "x.safetensors", keys))
    first = hada["hada_w1_a"].T @ hada["hada_t1"][..., 0, 0] @ hada["hada_w1_b"]
    second = hada["hada_w2_a"].T @ hada["hada_t2"] @ hada["hada_w2_b"]
    assert agrees(found[f"{QUERY}.weight"], BASE[f"{QUERY}.weight"] + first * second)
    inner = lokr["lokr_w2_a"].T @ lokr["lokr_t2"][..., 0, 0] @ lokr["lokr_w2_b"]
    assert agrees(
        found[f"{ATTENTION}.to_k.weight"], BASE[f"{ATTENTION}.to_k.weight"] + torch.kron(lokr["lokr_w1"], inner)
    )
    fused = {name: torch.cat([tensor] * 3, 1) if name.endswith("_a") else tensor for name, tensor in hada.items()}
    keys = {f"diffusion_model.{official(ATTENTION)}.to_qkv.{name}": tensor for name, tensor in fused.items()}
    unfit(save(tmp_path / "fused.safetensors", keys), "to_qkv is a fused projection, and loha cannot be cut in parts")


def test_rotations_stored_as_such_are_told_from_what_makes_them(tmp_path: Path) -> None:
    """``oft_diag`` of early LyCORIS."""
    out = shapes()[f"{QUERY}.weight"][0]
    skew = torch.randn(out // 4, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.3
    skew = (skew - skew.mT) / 2
    unit = torch.eye(4)
    rotation = (unit + skew) @ torch.linalg.inv(unit - skew)
    expected = torch.block_diag(*rotation).T @ BASE[f"{QUERY}.weight"]
    for blocks in (rotation, skew / 2):
        key = f"lycoris_{QUERY.replace('.', '_')}.oft_diag"
        found = baked(save(tmp_path / "x.safetensors", {key: blocks}))
        assert agrees(found[f"{QUERY}.weight"], expected)


def test_a_rotation_that_cannot_be_solved_is_refused_as_a_result_that_is_not_finite(tmp_path: Path) -> None:
    blocks = torch.zeros(8, 4, 4)
    blocks[0, (0, 0, 1), (1, 2, 2)] = torch.tensor([1e30, 0.7e30, 1.3e30])
    path = save(tmp_path / "x.safetensors", {f"lycoris_{QUERY.replace('.', '_')}.oft_blocks": blocks})
    with pytest.raises(AdapterError, match="beyond BF16 in 1 weights"):
        bake(BakeOptions(make_overlay(tmp_path / "out"), (1.0,), lora=str(path)), SilentReporter())


PRODUCT: dict[str, tuple[int, ...]] = {A: (4, 32), B: (32, 4)}
MISFITS = {
    "a rotation and a product": (PRODUCT | {"oft_blocks": (8, 4, 4)}, "conflict"),
    "a difference of two kinds": (PRODUCT | {"hada_w1_a": (32, 4)}, "has no hada_"),
    "a scaled alpha": (PRODUCT | {"alpha.weight_scale": ()}, "unknown key"),
    "a new weight and a product": (PRODUCT | {"weight": (32, 32)}, "conflict"),
    "half of a LoKr": (PRODUCT | {"lokr_w1": (4, 4)}, "has no lokr_w2"),
    "a scale of nothing": (PRODUCT | {"lokr_w1.weight_scale": ()}, "no tensor that it scales"),
    "GLoRA": (PRODUCT | {"a1.weight": (32, 2)}, "a1.weight is of GLoRA, which is not read"),
    "lokr": ({"lokr_w1": (5, 4), "lokr_w2": (8, 8)}, "w1 [5, 4] does not divide [32, 32]"),
    "lokr of three sizes": ({"lokr_w1": (4, 4, 2), "lokr_w2": (8, 8)}, "lokr_w1 [4, 4, 2], expected [4, 4]"),
    "loha": ({"hada_w1_a": (32, 4), "hada_w1_b": (4, 32), "hada_w2_a": (32, 2), "hada_w2_b": (4, 32)}, "[32, 2]"),
    "oft": ({"oft_blocks": (8, 5, 5)}, "cannot turn 32 outputs"),
    "boft": ({"oft_blocks": (5, 8, 4, 4)}, "a butterfly of 5 stages with blocks of 4 cannot turn 32"),
    "peft-oft": ({"oft_R.weight": (4, 6)}, "oft_R.weight [4, 6], expected [8, 6]"),
    "peft-oft, no triangle": ({"oft_R.weight": (4, 7)}, "cannot turn 32 inputs"),
    "no matrix": ({"lokr_w1": (16,), "lokr_w2": (8, 8)}, "lokr_w1 [16], expected a matrix"),
    "half a block": ({"oft_blocks": (1, 8, 4, 4, 1)}, "expected [32, 1, 1]"),
    "odd blocks of a butterfly": ({"oft_blocks": (1, 32, 1, 1)}, "a butterfly of 1 stages with blocks of 1"),
    "nothing": ({A: (0, 32), B: (32, 0)}, "1 empty tensor"),
    "peft-boft": ({"boft_R": (1, 4, 4, 4), "boft_s": (32, 1)}, "[1, 8, 4, 4]"),
    "GLoRA alone": (dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight"), (4, 4)),
                    "an adapter of GLoRA, which is not read"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_cannot_belong_to_one_weight_are_refused(case: str, tmp_path: Path) -> None:
    sizes, told = MISFITS[case]
    tensors = {f"diffusion_model.{official(QUERY)}.{name}": torch.zeros(size) for name, size in sizes.items()}
    assert told in str(unfit(save(tmp_path / "x.safetensors", tensors)))


def test_half_of_an_adapter_is_an_adapter_still(tmp_path: Path) -> None:
    half = save(tmp_path / "z.safetensors", {f"diffusion_model.{official(QUERY)}.lokr_w1": torch.zeros(4, 4)})
    told = inspect_path(half)
    assert (told["kind"], told["unpaired"], told["others"]) == ("lora", [*read_tensorfile(half).tensors], [])


def test_no_adapter_that_is_baked_is_called_something_else(tmp_path: Path) -> None:
    for case, (kind, options) in LYCORIS.items():
        tensors = {
            f"lycoris_{flat('', QUERY)}.{name}": value for name, value in lycoris(kind, QUERY, **options)[0].items()
        }
        path = save(tmp_path / "x.safetensors", tensors)
        told = inspect_path(path)
        assert told["kind"] == "lora" and told["targets"] == sum(told["methods"].values()) == 1, case
        assert opened(path).targets.keys() == {f"{QUERY}.weight"}
    assert any("as PEFT does by default" in told for told in opened(mixture(path)).warnings)
    told = inspect_path(path)
    assert told["methods"] == {
        "diff": 1,
        "loha": 1,
        "lokr": 1,
        "lora": 1,
        "oft": 2,
        "peft-boft": 1,
        "peft-oft": 1,
        "weight": 1,
    }
    assert (told["targets"], told["deltas"], told["ranks"], told["unpaired"]) == (7, 1, {"2": 2, "4": 1}, [])


def test_every_method_has_a_formula() -> None:
    assert [method.name for method in METHODS] == list(FORMULAS)
