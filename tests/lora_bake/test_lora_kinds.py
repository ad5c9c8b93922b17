"""Every method of an adapter, saved with the library it is from and baked, gives the weight that the library merges.

``peft`` and ``lycoris-lora`` are the oracles; sums are compared before they are rounded.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_support import Factors, low_rank, official, random_weights, save, shapes

from ltxpack.errors import AdapterError
from ltxpack.lora_bake.adapter import open_adapter
from ltxpack.lora_bake.fuse import fuse_rows
from ltxpack.lora_bake.methods import FORMULAS
from ltxpack.lora_bake.stream import FactorReader
from ltxpack.ltx23.lora_keys import METHODS

BASE = random_weights(dtype=torch.float32)
ATTENTION = "transformer_blocks.1.attn1"
QUERY, WIDE = f"{ATTENTION}.to_q", "transformer_blocks.0.ff.net.0.proj"

Tensors = dict[str, torch.Tensor]


def baked(path: Path, strength: float = 1.0, **options: bool) -> Tensors:
    """The float32 sums of every tensor that the adapter at ``path`` changes, in row chunks where they can be."""
    adapter, sums = open_adapter(path, shapes(), **options), {}
    with contextlib.closing(FactorReader(adapter)) as reader:
        for name in adapter.targets:
            term, weight = reader.term(name), BASE[name]
            assert term is not None
            sums[name] = torch.empty_like(weight)
            step = len(weight) if term.needs_whole else max(1, len(weight) // 3)
            for first in range(0, len(weight), step):
                cut = slice(first, first + step)
                fuse_rows(weight[cut], [term.rows(first, first + step)], [[strength]], "fp32", into=[sums[name][cut]])
    return sums


def agrees(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return bool((found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item()))


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
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    classes = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}
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
}


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("case", LYCORIS)
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

    root = torch.nn.Module()
    for module in modules:
        at = root
        *above, last = module.split(".")
        for part in above:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(last, linear(module))
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


# Names

A, B = "lora_A.weight", "lora_B.weight"
FACTORS = low_rank([QUERY, f"{ATTENTION}.to_out.0", WIDE], dtype=torch.float32)


def spelled(spell: Callable[[str], str], down: str = A, up: str = B, factors: Factors = FACTORS) -> Tensors:
    return {f"{spell(m)}.{end}": t for m, (a, b) in factors.items() for end, t in ((down, a), (up, b))}


def flat(prefix: str, module: str) -> str:
    return prefix + module.replace(".", "_")


NAMES: Mapping[str, Tensors] = {
    "an unknown prefix": spelled("pipe.dit.{}".format),
    "an unknown prefix, flattened": spelled(lambda m: flat("lora_unet_pipe_dit_", m)),
    "flattened with model_": spelled(lambda m: flat("lora_unet_model_", m)),
    "flattened with model_ and without": spelled(lambda m: flat("lora_unet_model_" * (m == QUERY) or "lora_unet_", m)),
    "compiled": spelled("_orig_mod.{}".format),
    "compiled blocks": spelled(lambda m: "diffusion_model." + m.replace(".ff.", "._orig_mod.ff.")),
    "compiled, flattened": spelled(lambda m: flat("lora_unet_", f"_orig_mod.{m}".replace(".ff.", "._orig_mod.ff."))),
    "FSDP and checkpointing": spelled(
        lambda m: "module._fsdp_wrapped_module." + m.replace(".attn1.", "._checkpoint_wrapped_module.attn1.")
    ),
    "base_layer": spelled("base_model.model.{}.base_layer".format),
    "bare factors": spelled("diffusion_model.{}".format, "lora_A", "lora_B"),
    "an adapter's name": spelled("base_model.model.{}".format, "lora_A.my_style.weight", "lora_B.my_style.weight"),
    "diffusers' old layers": spelled(
        "transformer.{}".format, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"
    ),
    "lora.down": spelled("transformer.{}".format, "lora.down.weight", "lora.up.weight"),
    "attention processors": spelled(
        lambda m: m.replace(".attn1.", ".attn1.processor.").removesuffix(".0") + "_lora", "down.weight", "up.weight"
    ),
    "empty markers beside": spelled(official)
    | {"__dummy": torch.zeros(0), "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)},
    "factors like those of a convolution": spelled(
        official, factors={m: (a[..., None, None], b[..., None, None]) for m, (a, b) in FACTORS.items()}
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_every_spelling_of_a_name_is_the_same_module(case: str, tmp_path: Path) -> None:
    found = baked(save(tmp_path / "x.safetensors", NAMES[case]), 0.7)
    assert found.keys() == {f"{module}.weight" for module in FACTORS}
    for module, (a, b) in FACTORS.items():
        assert agrees(found[f"{module}.weight"], BASE[f"{module}.weight"] + 0.7 * (b @ a))


def test_what_stands_before_the_names_must_be_the_same(tmp_path: Path) -> None:
    both = spelled(lambda m: ("pipe.dit." if m == QUERY else "other.") + m)
    with pytest.raises(
        AdapterError, match=r"its names have 'other\.' and 'pipe\.dit\.' before ours|'pipe.dit.' and"
    ) as caught:
        open_adapter(save(tmp_path / "x.safetensors", both), shapes())
    assert "another model" not in caught.value.problem
    some = spelled(lambda m: ("refiner." if m == QUERY else "transformer.") + m)
    with pytest.raises(AdapterError, match="1 unmatched target") as caught:
        open_adapter(save(tmp_path / "y.safetensors", some), shapes())
    assert "has refiner. before our name" in str(caught.value.items)


def test_a_prefix_is_told_and_names_of_connectors_are_not_ours(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", spelled("pipe.dit.{}".format))
    assert any("'pipe.dit.' before ours" in warning for warning in open_adapter(path, shapes()).warnings)
    text = spelled("connectors.video_connector.{}".format)
    with pytest.raises(AdapterError, match="changes only the text path"):
        open_adapter(save(tmp_path / "y.safetensors", text), shapes())


def test_every_method_has_a_formula() -> None:
    assert [method.name for method in METHODS] == list(FORMULAS)
