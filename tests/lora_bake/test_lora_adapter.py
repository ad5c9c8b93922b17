"""Adapters: every naming gives the same weights, and everything that does not fit is refused with the list."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from lora_support import (
    Factors,
    dotted,
    fused_sums,
    linears,
    low_rank,
    official,
    official_keys,
    opened,
    peft_folder,
    random_weights,
    save,
    unfit,
)

from ltxpack.errors import AdapterError, FormatError, LtxpackError, SourceError
from ltxpack.lora_bake.adapter import Adapter
from ltxpack.lora_bake.find import _NOT_FINITE, hash_adapter, largest_bits, scan
from ltxpack.lora_bake.stream import DTYPES
from ltxpack.reporter import SilentReporter

RANK, ALPHA = 4, 8.0
# Linears of every kind, in one block and outside.
BLOCK = ("attn1", "ff", "audio_attn2", "audio_to_video_attn")
PLACES = (*(f"transformer_blocks.1.{part}." for part in BLOCK), "proj_in", "time_embed.")
MODULES = [module for module in linears() if module.startswith(PLACES)]
BASE = random_weights()
FACTORS = low_rank(MODULES, RANK)
ATTENTION = "transformer_blocks.1.attn1"


def official_root(module: str) -> str:
    return f"diffusion_model.{official(module)}"


def kohya(module: str) -> str:
    return "lora_unet_" + official(module).replace(".", "_")


def alphas(spell: Callable[[str], str], modules: list[str], value: float = ALPHA) -> dict[str, torch.Tensor]:
    return {f"{spell(module)}.alpha": torch.tensor(value) for module in modules}


def scaled(factors: Factors) -> Factors:
    """alpha/rank moved into B: exact, both are powers of two."""
    return {module: (a, b * (ALPHA / RANK)) for module, (a, b) in factors.items()}


def weights_of(
    adapter: Adapter, strength: float = 0.7, base: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """All weights after the fp32 rule."""
    base = BASE if base is None else base
    return base | {name: found.to(base[name].dtype) for name, found in fused_sums(adapter, base, strength).items()}


def config(**values: object) -> dict[str, object]:
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **values}


def wrapped(module: str) -> str:
    return f"base_model.model.{module}"


def flat(module: str, prefix: str = "lora_unet_") -> str:
    return prefix + module.replace(".", "_")


COMFY, NAMED = ("lora_down.weight", "lora_up.weight"), ("lora_A.default.weight", "lora_B.default.weight")
FULL, QUERIES, WIDE = scaled(FACTORS), [m for m in MODULES if m.endswith("to_q")], MODULES[::2]
# The queries' B is halved and their alpha doubled; half of the modules are padded with zeros to twice the rank.
HALVED = {m: (a, b * (0.5 if m in QUERIES else 1.0)) for m, (a, b) in FACTORS.items()}
PADDED = {
    m: (torch.cat([a, 0 * a]), torch.cat([b, 0 * b], 1)) if m in WIDE else (a, b) for m, (a, b) in FACTORS.items()
}
spelled = functools.partial(dotted, FULL)
NAMINGS: dict[str, dict[str, torch.Tensor]] = {
    "official": official_keys(FULL),
    "official alpha": official_keys(FACTORS) | alphas(official_root, MODULES),
    "checkpoint root": spelled(lambda m: f"model.diffusion_model.{official(m)}"),
    "bare": spelled(str),
    "comfy": dotted(FACTORS, official_root, *COMFY) | alphas(official_root, MODULES),
    "diffusers": dotted(FACTORS, "transformer.{}".format),
    "peft": dotted(FACTORS, wrapped),
    "peft rslora": dotted(FACTORS, lambda m: wrapped(official(m))),
    "peft default": spelled(wrapped, *NAMED),
    "peft patterns": dotted(HALVED, wrapped),
    "peft mixed ranks": dotted(PADDED, wrapped),
    "kohya": dotted(FACTORS, kohya, *COMFY) | alphas(kohya, MODULES),
    "kohya, diffusers names": dotted(FACTORS, flat, *COMFY) | alphas(flat, MODULES),
    "to_out without index": spelled(lambda m: official_root(m).replace("to_out.0", "to_out")),
    "fp32 factors": official_keys({m: (a.float(), b.float()) for m, (a, b) in FULL.items()}),
    "full delta": {f"{official_root(m)}.diff": b.float() @ a.float() for m, (a, b) in FULL.items()},
    "an unknown prefix": spelled("pipe.dit.{}".format),
    "an unknown prefix, flattened": spelled(lambda m: flat(m, "lora_unet_pipe_dit_")),
    "a flattened prefix that nobody knows": spelled(lambda m: flat(official(m), "lora_dit_")),
    "flattened with model_": spelled(lambda m: flat(m, "lora_unet_model_")),
    "flattened with model_ and without": spelled(lambda m: flat(f"model_{m}" if m in QUERIES else m)),
    "compiled": spelled("_orig_mod.{}".format),
    "compiled blocks": spelled(lambda m: "diffusion_model." + m.replace(".ff.", "._orig_mod.ff.")),
    "compiled, flattened": spelled(lambda m: flat(f"_orig_mod.{m}".replace(".ff.", "._orig_mod.ff."))),
    "FSDP and checkpointing": spelled(
        lambda m: "module._fsdp_wrapped_module." + m.replace(".attn1.", "._checkpoint_wrapped_module.attn1.")
    ),
    "base_layer": spelled("base_model.model.{}.base_layer".format),
    "bare factors": spelled("diffusion_model.{}".format, "lora_A", "lora_B"),
    "an adapter's name": spelled(wrapped, "lora_A.my_style.weight", "lora_B.my_style.weight"),
    "diffusers' old layers": spelled(
        "transformer.{}".format, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"
    ),
    "lora.down": spelled("transformer.{}".format, "lora.down.weight", "lora.up.weight"),
    "attention processors": spelled(
        lambda m: m.replace(".attn1.", ".attn1.processor.").removesuffix(".0") + "_lora", "down.weight", "up.weight"
    ),
    "empty markers beside": spelled(official)
    | {"__dummy": torch.zeros(0), "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)},
    "factors like those of a convolution": official_keys(
        {m: (a[..., None, None], b[..., None, None]) for m, (a, b) in FULL.items()}
    ),
}
# What a PEFT configuration states, or (as text) diffusers' metadata.
STATED: dict[str, dict[str, object] | str] = {
    "diffusers": json.dumps({f"transformer.{name}": value for name, value in config().items()}),
    "peft": config(),
    "peft rslora": config(lora_alpha=ALPHA / math.sqrt(RANK), use_rslora=True),
    "peft patterns": config(alpha_pattern={"to_q": 2 * ALPHA}, rank_pattern={"net.2": RANK}),
    "peft mixed ranks": config(
        rank_pattern=dict.fromkeys(WIDE, 2 * RANK), alpha_pattern=dict.fromkeys(WIDE, 2 * ALPHA)
    ),
}


def written(folder: Path, naming: str) -> Path:
    """The file, or the PEFT folder, of a naming."""
    stated = STATED.get(naming)
    if not isinstance(stated, dict):
        metadata = {"lora_adapter_metadata": stated} if stated else None
        return save(folder / "x.safetensors", NAMINGS[naming], metadata)
    save(folder / "adapter_model.safetensors", NAMINGS[naming])
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """All weights with FULL, under its official names."""
    found = weights_of(opened(written(tmp_path_factory.mktemp("official"), "official")))
    assert all(found[f"{module}.weight"].ne(BASE[f"{module}.weight"]).any() for module in MODULES)
    return found


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_same_weights(naming: str, merged: dict[str, torch.Tensor], tmp_path: Path) -> None:
    adapter = opened(written(tmp_path, naming))
    assert set(adapter.targets) == {f"{module}.weight" for module in MODULES}
    found = weights_of(adapter)
    assert [name for name, expected in merged.items() if not torch.equal(found[name], expected)] == []


def test_what_stands_before_the_names_must_be_the_same(tmp_path: Path) -> None:
    both = spelled(lambda m: ("pipe.dit." if m in QUERIES else "other.") + m)
    error = unfit(save(tmp_path / "x.safetensors", both), "its names have `")
    assert "another model" not in error.problem and "`pipe.dit.`" in error.problem
    some = spelled(lambda m: ("refiner." if m in QUERIES else "transformer.") + m)
    path = save(tmp_path / "y.safetensors", some)
    error = unfit(path, f"{len(QUERIES)} unmatched targets")
    assert "has `refiner.` before our name" in str(error.items)
    [told] = opened(path, allow_unmatched=True).warnings
    assert "left out: refiner." in told


def test_a_prefix_is_told_and_names_of_connectors_are_not_ours(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", spelled("pipe.dit.{}".format))
    assert any("`pipe.dit.` before ours" in warning for warning in opened(path).warnings)
    text = spelled("connectors.video_connector.{}".format)
    unfit(save(tmp_path / "y.safetensors", text), "changes only the text path")


def test_names_outside_the_blocks_are_found_behind_a_prefix_if_all_are(tmp_path: Path) -> None:
    outside = low_rank([module for module in linears() if "blocks" not in module], 2, seed=3)
    mine = dotted(outside, "pipe.dit.{}".format)
    assert len(opened(save(tmp_path / "x.safetensors", mine)).targets) == len(outside)
    foreign = mine | dotted(low_rank(["proj_out"], 2, seed=4), "pipe.dit.decoder_{}".format)
    unfit(save(tmp_path / "y.safetensors", foreign), "is a LoRA for another model")


@pytest.mark.parametrize(("name", "letters"), [("to_qkv", "qkv"), ("qkv", "qkv"), ("to_kv", "kv"), ("kv", "kv")])
@pytest.mark.parametrize("spell", [official_root, kohya], ids=["dotted", "kohya"])
def test_fused_projections_are_split_by_rows(
    name: str, letters: str, spell: Callable[[str], str], tmp_path: Path
) -> None:
    modules = [f"{ATTENTION}.to_{letter}" for letter in letters]
    shared, _ = FACTORS[modules[0]]
    separate = {module: (shared, FACTORS[module][1]) for module in modules}
    fused = {f"{ATTENTION}.{name}": (shared, torch.cat([b for _, b in separate.values()]))}
    whole = opened(save(tmp_path / "fused.safetensors", dotted(fused, spell)))
    parts = opened(save(tmp_path / "parts.safetensors", official_keys(separate)))
    assert set(whole.targets) == set(parts.targets) == {f"{module}.weight" for module in modules}
    expected, found = weights_of(parts), weights_of(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_belongs_to_a_module_names_it_in_one_way(tmp_path: Path) -> None:
    """An alpha under another spelling than the factors would be ignored."""
    module = f"{ATTENTION}.to_q"
    tensors = official_keys({module: FACTORS[module]}) | alphas(kohya, [module])
    error = unfit(save(tmp_path / "x.safetensors", tensors))
    assert f"{kohya(module)}.alpha" in str(error.items) and "another name" in str(error.items)


@pytest.mark.parametrize(
    ("ending", "columns"),
    [("dora_scale", False), ("lora_magnitude_vector", True), ("lora_magnitude_vector.default.weight", False)],
)
def test_dora_with_the_norms_of_the_sum_is_the_plain_merge(
    ending: str, columns: bool, merged: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tensors = official_keys(FULL)
    for module, (a, b) in FULL.items():
        norm = (BASE[f"{module}.weight"].double() + 0.7 * (b.double() @ a.double())).norm(dim=1, keepdim=columns)
        tensors[f"{official_root(module)}.{ending}"] = norm.float()
    found = weights_of(opened(save(tmp_path / "dora.safetensors", tensors)))
    for name, expected in merged.items():
        # The same value in exact arithmetic; a rounding may fall the other way where it lies on a tie.
        assert torch.allclose(found[name].float(), expected.float(), rtol=2**-7, atol=1e-6)
        assert (found[name] != expected).float().mean() < 0.01


def test_dora_scales_each_row_to_its_magnitude(tmp_path: Path) -> None:
    module = f"{ATTENTION}.to_q"
    a, b = FACTORS[module]
    magnitude = torch.rand(b.shape[0]) + 0.5
    tensors = official_keys({module: (a, b)}) | {f"{official_root(module)}.dora_scale": magnitude}
    adapter = opened(save(tmp_path / "x.safetensors", tensors))
    base = {name: tensor.float() for name, tensor in BASE.items()}
    exact = base[f"{module}.weight"].double() + 0.7 * (b.double() @ a.double())
    exact = magnitude.double()[:, None] * exact / exact.norm(dim=1, keepdim=True)
    found = weights_of(adapter, 0.7, base)[f"{module}.weight"]
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-7)
    assert torch.equal(weights_of(adapter, 0.0, base)[f"{module}.weight"], base[f"{module}.weight"])


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    tensors = official_keys(FACTORS)
    root = f"diffusion_model.{ATTENTION}"
    del tensors[f"{root}.to_q.lora_B.weight"]
    tensors[f"{root}.to_k.lora_A.weight"] = torch.zeros(RANK, 7)
    tensors[f"{root}.to_v.lora_A.weight"] = torch.zeros(RANK + 1, 32)
    connector = "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q"
    for key in ("transformer_blocks.99.attn1.to_q.lora_A.weight", "transformer_blocks.99.attn1.to_q.lora_B.weight",
                "transformer_blocks.0.attn1.to_q.ia3_l", f"{connector}.lora_A.weight"):  # fmt: skip
        tensors[f"diffusion_model.{key}"] = torch.zeros(4, 4)
    error = unfit(save(tmp_path / "x.safetensors", tensors), "does not fit this transformer")
    for part in ("1 half pair", "1 shape mismatch", "1 rank mismatch", "1 unmatched target", "1 unknown key",
                 "1 target outside the transformer"):  # fmt: skip
        assert part in error.problem
    listed = "\n".join(map(str, error.items))
    for part in ("to_q.lora_A.weight has no up factor", "[4, 7]", "[5, 32]", "blocks.99", "ia3_l", "connector"):
        assert part in listed


def test_allow_unmatched_passes_unmatched_targets_only(tmp_path: Path) -> None:
    tensors = official_keys(FACTORS)
    tensors["diffusion_model.transformer_blocks.99.attn1.to_q.lora_A.weight"] = torch.zeros(4, 32)
    path = save(tmp_path / "x.safetensors", tensors)
    assert "--allow-unmatched" in (unfit(path, "1 unmatched target").next or "")
    adapter = opened(path, allow_unmatched=True)
    assert adapter.skipped == ("transformer_blocks.99.attn1.to_q",)
    assert len(adapter.targets) == len(MODULES) and "left out" in adapter.warnings[0]
    tensors["something.else"] = torch.zeros(1)
    unfit(save(tmp_path / "y.safetensors", tensors), "1 unknown key", allow_unmatched=True)


WAN = [f"diffusion_model.blocks.{i}.self_attn.q.lora_{c}.weight" for i in range(40) for c in "AB"]
SDXL = [f"{name}.lora_{c}.weight" for c in ("down", "up") for name in
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1")]  # fmt: skip


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(("keys", "count", "named"), [(WAN, 40, "blocks.0.self_attn.q"), (SDXL, 2, "attentions_0")])
def test_a_lora_for_another_model_is_one_clear_message(
    keys: list[str], count: int, named: str, allow: bool, tmp_path: Path
) -> None:
    path = save(tmp_path / "x.safetensors", dict.fromkeys(keys, torch.zeros(4, 4)))
    error = unfit(path, "is a LoRA for another model", allow_unmatched=allow)
    assert f"none of its {count} targets" in error.problem and named in str(error.found)


def test_targets_of_other_widths_are_another_model(tmp_path: Path) -> None:
    factors = {m: (torch.zeros(4, 64), torch.zeros(64, 4)) for m in MODULES if ".attn1.to_q" in m and "audio" not in m}
    error = unfit(save(tmp_path / "x.safetensors", official_keys(factors)), "no shape agrees")
    assert len(error.items) == len(factors)
    # Query and key of the cross attentions differ in width, so no fused projection exists there.
    for module, height in ((ATTENTION, 64), ("transformer_blocks.0.audio_to_video_attn", 48)):
        tensors = dotted({f"{module}.to_qkv": (torch.zeros(4, 32), torch.zeros(height, 4))}, official_root)
        error = unfit(save(tmp_path / "x.safetensors", tensors), "no shape agrees")
        assert module != ATTENTION or "[96, 4]" in str(error.items)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_other_float_dtypes_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    module = f"{ATTENTION}.to_q"
    a, b = (torch.eye(4, 32).to(dtype), torch.ones(32, 4).to(dtype))
    adapter = opened(save(tmp_path / "x.safetensors", official_keys({module: (a, b)})))
    scan(adapter, SilentReporter())
    name = f"{module}.weight"
    expected = (BASE[name].float() + 0.5 * (b.float() @ a.float())).bfloat16()
    assert torch.equal(weights_of(adapter, 0.5)[name], expected)


def peft(folder: Path, factors: Factors, **values: object) -> Path:
    return peft_folder(folder, factors, config(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "LOHA"}, {"r": "4"}, {"r": 0}, {"lora_alpha": True}, {"lora_alpha": "x"}, {"use_rslora": "yes"},
        {"rank_pattern": []}, {"rank_pattern": {"(": 4}}, {"alpha_pattern": {"(a+)+b": 4}},
        {"alpha_pattern": {"a*b*c*d*e*": 4}}, {"alpha_pattern": {"x" * 600: 4}}, {"fan_in_fan_out": True},
        {"alora_invocation_tokens": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_or_foreign_configurations(values: dict[str, object], tmp_path: Path) -> None:
    unfit(peft(tmp_path, FACTORS, **values), None)


@pytest.mark.parametrize("text", ["[]", "{", '{"r": NaN}', "[" * 5000, '{"r": 1, "r": 2}'])
def test_broken_configurations(text: str, tmp_path: Path) -> None:
    (peft(tmp_path, FACTORS) / "adapter_config.json").write_text(text)
    with pytest.raises((AdapterError, FormatError)):
        opened(tmp_path)


def test_thousands_of_patterns_are_quick(tmp_path: Path) -> None:
    patterns = {f"no_such_block.{i}.to_q": 3 for i in range(20_000)}
    folder = peft(tmp_path, FACTORS, rank_pattern=patterns, alpha_pattern=patterns)
    started = time.process_time()
    assert opened(folder).factor == ALPHA / RANK
    assert time.process_time() - started < 30


@pytest.mark.parametrize("gone", ["adapter_model.safetensors", "adapter_config.json"])
def test_links_out_of_a_peft_folder_are_followed(gone: str, tmp_path: Path) -> None:
    """A hub cache's snapshot is made of links."""
    real, folder = peft(tmp_path / "blobs", FACTORS), tmp_path / "snapshot"
    folder.mkdir()
    for path in real.iterdir():
        (folder / path.name).symlink_to(path)
    assert opened(folder).factor == ALPHA / RANK
    (real / gone).unlink()
    with pytest.raises(LtxpackError):
        opened(folder)


def test_thousands_of_foreign_targets_are_judged_in_time(tmp_path: Path) -> None:
    names = [name for i in range(6_000) for name in (f"blocks.{i}.attn", f"x{i}.{ATTENTION}.to_q")]
    foreign = dotted(dict.fromkeys(names, (torch.ones(1, 1), torch.ones(1, 1))), "diffusion_model.{}".format)
    x, y = save(tmp_path / "x.safetensors", foreign), save(tmp_path / "y.safetensors", foreign | official_keys(FACTORS))
    started = time.process_time()
    unfit(x, "another model")
    unfit(y, "12000 unmatched targets")
    assert time.process_time() - started < 6


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        opened(tmp_path / "nothing.safetensors")
    with pytest.raises(SourceError, match="without a LoRA"):
        opened(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(FormatError):
        opened(tmp_path / "x.safetensors")


def test_scan_hashes_the_file_and_its_configuration(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", official_keys(FACTORS))
    adapter = opened(path)
    assert scan(adapter, SilentReporter()) == blake3(path.read_bytes()).hexdigest() == hash_adapter(path, None)
    first = scan(opened(peft(tmp_path / "a", FACTORS)), SilentReporter())
    second = scan(opened(peft(tmp_path / "b", FACTORS, lora_alpha=2.0)), SilentReporter())
    assert first != second


@pytest.mark.parametrize(
    ("value", "dtype"), [(math.nan, torch.bfloat16), (math.inf, torch.float32), (-math.inf, torch.float16)]
)
def test_nan_and_infinity_are_refused_with_the_list_and_large_values_pass(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = official_keys(low_rank(MODULES, dtype=dtype))
    bad = sorted(tensors)[3], sorted(tensors)[-1]
    for key in bad:
        tensors[key][-1, -1] = value
    adapter = opened(save(tmp_path / "x.safetensors", tensors))
    with pytest.raises(AdapterError, match="NaN or infinity in 2 tensors") as caught:
        scan(adapter, SilentReporter())
    assert set(caught.value.items) == set(bad)
    for key in bad:
        tensors[key].fill_(60000)
    scan(opened(save(tmp_path / "large.safetensors", tensors)), SilentReporter())


def all_finite(data: memoryview, dtype: str) -> bool:
    return largest_bits(data, dtype) < _NOT_FINITE[dtype][1]


@given(st.sampled_from(sorted(DTYPES)), st.binary(min_size=8, max_size=64))
def test_a_value_is_finite_where_torch_says_so(dtype: str, drawn: bytes) -> None:
    data = bytearray(drawn[: len(drawn) // 8 * 8])
    values = torch.frombuffer(data, dtype=DTYPES[dtype])
    assert all_finite(memoryview(data), dtype) == bool(torch.isfinite(values.double()).all())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 1, 200_000, 299_999])
def test_one_bad_value_among_many_is_found(dtype: str, value: float, at: int) -> None:
    values = torch.ones(300_000).to(DTYPES[dtype])
    assert all_finite(values.view(torch.uint8).numpy().data, dtype)
    values[at] = value
    if not torch.isfinite(values[at].double()):  # F8_E4M3 has no infinity
        assert not all_finite(values.view(torch.uint8).numpy().data, dtype)
