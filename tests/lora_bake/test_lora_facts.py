"""What stands beside the factors: alpha, rank, base and use, from header and configuration, and the factor it gives."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_support import dotted, linears, low_rank, make_overlay, official, official_keys, opened, save, shapes, unfit
from support import Notes

from ltxpack.errors import AdapterError, FormatError
from ltxpack.files.tensorfile import read_tensorfile
from ltxpack.lora_bake.find import find_loras
from ltxpack.lora_bake.plan import BakeOptions
from ltxpack.ltx23.lora_facts import MAX_STATEMENTS, _Beside, named_base
from ltxpack.ltx23.lora_keys import METHODS
from ltxpack.manifest import read_manifest
from ltxpack.materialize.checkpoint import read_lora
from ltxpack.materialize.inspect import inspect_path

RANK = 4
MODULES = [f"transformer_blocks.{i}.attn1.to_q" for i in range(3)]
FACTORS = low_rank(MODULES, RANK)
HEADER = official_keys(FACTORS)
DIFFUSERS = dotted(FACTORS, "transformer.{}".format)
PEFT = dotted(FACTORS, "base_model.model.{}".format)


def made(folder: Path, metadata: dict[str, str], tensors: Any = None, config: Any = None) -> Path:
    path = save(folder / "x.safetensors", tensors or HEADER, {"format": "pt", **metadata})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


def alphas(value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {f"diffusion_model.{official(module)}.alpha": torch.tensor(value, dtype=dtype) for module in MODULES}


def flat(**fields: str) -> dict[str, str]:
    return {f"transformer.{name}": value for name, value in fields.items()}


# What the metadata say -> the factor and what the note says of it.
HEADERS: dict[str, tuple[dict[str, str], float, str]] = {
    **{
        name: ({name: "1"}, 0.25, f"alpha 1 from the header ({name}), rank 4: the strength is multiplied by 0.25")
        for name in ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha")
    },
    "with its rank": ({"ss_network_alpha": "8.0", "ss_network_dim": "4.0"}, 2, "alpha 8 from the header"),
    "equal": ({"ss_network_alpha": "4.0", "ss_network_dim": "4"}, 1, "the strength is used unchanged"),
    "quoted": ({"lora_alpha": '"8"', "lora_rank": '"4"'}, 2, "alpha 8"),
    "twice alike": ({"lora_alpha": "8", "ss_network_alpha": "8.0"}, 2, "alpha 8"),
    "flat": (flat(lora_alpha="16", r="4"), 4, "alpha 16 from the header (lora_alpha)"),
    "flat rslora": (flat(lora_alpha="16", use_rslora="True"), 8, "rslora"),
    "json": ({"lora_adapter_metadata": json.dumps(flat(lora_alpha=16, r=4))}, 4, "header's lora_adapter_metadata"),
    "json unet": ({"lora_adapter_metadata": '{"unet.lora_alpha": 16, "unet.r": 4}'}, 4, "alpha 16"),
    "json comfy": ({"lora_adapter_metadata": '{"diffusion_model.lora_alpha": "16"}'}, 4, "alpha 16"),
    "json of two": ({"any": '{"transformer.lora_alpha": 16, "text_encoder.lora_alpha": 2}'}, 4, "header's any"),
    "json nested": ({"any": '{"network": {"lora_alpha": 16, "r": 4}}'}, 4, "alpha 16"),
    "peft's own": ({"adapter_config": '{"peft_type": "LORA", "r": 4, "lora_alpha": 2}'}, 0.5, "alpha 2"),
    "pattern": ({"adapter_config": '{"lora_alpha": 2, "alpha_pattern": {"to_q": 8}}'}, 2, "alpha 2"),
    "kohya's rslora": ({"ss_network_alpha": "4", "ss_network_args": '{"rs_lora": "True"}'}, 2, "rslora"),
    # Nothing is stated.
    **{
        f"nothing {value!r}": ({"ss_network_alpha": value, "ss_network_dim": value}, 1, "")
        for value in ("None", "", "Dynamic", "null")
    },
    "kohya's zero": ({"ss_network_alpha": "0"}, 1, ""),
    "rank alone": ({"ss_network_dim": "4", "rank": "4"}, 1, ""),
    "a workflow": ({"workflow": '{"nodes": [{"alpha": 3}], "alpha": 7}', "prompt": "{broken"}, 1, ""),
    "a note on alpha": ({"comment": "lora_alpha 3"}, 1, ""),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("tensors", [HEADER, DIFFUSERS], ids=["official", "diffusers"])
def test_alpha_of_the_header(case: str, tensors: Any, tmp_path: Path) -> None:
    metadata, factor, note = HEADERS[case]
    path = made(tmp_path, metadata, tensors)
    adapter = opened(path)
    assert {target.factor for target in adapter.targets.values()} == {factor}
    assert len(adapter.notes) == (1 if note else 0) and note in "".join(adapter.notes)
    assert not adapter.warnings
    described = inspect_path(path)
    assert described["notes"] == list(adapter.notes) and described["problem"] is None
    assert (described["alpha"] == "none") == (not note)


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "another rank": ({"lora_alpha": "8", "lora_rank": "8"}, "has rank 4, the header (lora_rank) says 8"),
    "two alphas": ({"lora_alpha": "8", "ss_network_alpha": "4"}, "states more than one alpha"),
    "two ranks": ({"r": "4", "rank": "8"}, "states more than one rank"),
    "no number": ({"lora_alpha": "x"}, "lora_alpha is not a finite number"),
    "not finite": ({"lora_alpha": "nan"}, "lora_alpha is not a finite number"),
    "huge": ({"alpha": "1e30"}, "alpha is not a finite number"),
    "another method": ({"adapter_config": '{"peft_type": "IA3"}'}, "is not a LoRA"),
    "a list": ({"adapter_config": "[]"}, "not a JSON object"),
    "a rank of halves": ({"rank": "4.5"}, "rank is not a positive whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_is_refused(case: str, tmp_path: Path) -> None:
    metadata, told = REFUSED[case]
    path = made(tmp_path, metadata)
    error = unfit(path)
    assert told in str(error)
    assert told in inspect_path(path)["problem"]


def test_broken_json_of_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="metadata adapter_config: is not sound JSON"):
        opened(made(tmp_path, {"adapter_config": "{"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alpha_beside_the_factors_and_in_the_header(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = HEADER | alphas(7.7, dtype)
    adapter = opened(made(tmp_path / "same", {"ss_network_alpha": "7.7", "ss_network_dim": "4"}, tensors))
    assert adapter.factor == pytest.approx(7.7 / 4, rel=2**-7)
    error = unfit(made(tmp_path / "other", {"ss_network_alpha": "4"}, tensors), "ambiguous alpha")
    assert "says 4" in str(error)


def test_lycoris_corrects_the_alphas_it_stores_for_rslora(tmp_path: Path) -> None:
    stated = {"ss_network_alpha": "4", "ss_network_args": '{"rs_lora": "True"}'}
    adapter = opened(made(tmp_path, stated, HEADER | alphas(4 * math.sqrt(RANK))))
    assert adapter.factor == 4 / math.sqrt(RANK)


def test_one_alpha_for_mixed_ranks_is_ambiguous(tmp_path: Path) -> None:
    wide = official_keys(low_rank(MODULES[:1], 8))
    path = made(tmp_path / "a", {"ss_network_alpha": "4"}, HEADER | wide)
    unfit(path, "one alpha for ranks 4, 8")
    assert "one alpha for ranks 4, 8" in inspect_path(path)["problem"]
    assert {target.factor for target in opened(made(tmp_path / "c", {}, HEADER | wide)).targets.values()} == {1.0}
    # With alphas beside them there is nothing to guess.
    adapter = opened(made(tmp_path / "b", {"ss_network_dim": "Dynamic"}, HEADER | wide | alphas(4)))
    assert {target.factor for target in adapter.targets.values()} == {0.5, 1.0}


CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16}


def test_a_configuration_beside_a_renamed_file(tmp_path: Path) -> None:
    """It counts if no other file is there that it may belong to."""
    path = made(tmp_path, {}, PEFT, CONFIG)
    adapter = opened(path)
    assert adapter.factor == 4 and adapter.config == tmp_path / "adapter_config.json"
    assert "alpha 16 from adapter_config.json (lora_alpha)" in adapter.notes[0]
    assert inspect_path(path)["alpha"] == "16 from adapter_config.json (lora_alpha)"
    save(tmp_path / "._hidden.safetensors", HEADER)
    save(tmp_path / "a-checkpoint.safetensors", {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(2, 2)})
    assert opened(path).factor == 4
    save(tmp_path / "other.safetensors", HEADER)
    assert opened(path).factor == 1
    [warning] = opened(path).warnings
    assert warning.startswith("its names are PEFT's, but neither its header nor an adapter_config.json of its own")


def test_header_and_configuration_must_agree(tmp_path: Path) -> None:
    assert opened(made(tmp_path / "a", {"lora_alpha": "16"}, PEFT, CONFIG)).factor == 4
    error = unfit(made(tmp_path / "b", {"lora_alpha": "4"}, PEFT, CONFIG), "more than one alpha")
    assert "lora_alpha 16 (adapter_config.json)" in str(error)
    assert "lora_alpha 4 (the header)" in str(error)
    path = made(tmp_path / "c", {"lora_alpha": "x"}, PEFT, CONFIG)
    assert str(unfit(path)).startswith(f"{path}: lora_alpha is not a finite number")


def found(folder: Path, path: Path, **options: Any) -> Notes:
    """What ``bake-lora`` says of a LoRA before anything is written."""
    overlay = folder / "overlay"
    overlay = overlay if overlay.is_dir() else make_overlay(overlay)
    told = Notes()
    find_loras(BakeOptions(overlay, (1.0,), lora=str(path), **options), read_manifest(overlay), shapes(), told)
    return told


BASES = {
    ("model_version", "2.3.0"): "LTX-2.3", ("model_version", "2.3"): "LTX-2.3", ("model_version", "2.0.0"): "LTX-2",
    ("model_version", "2.5.0-rc1"): "LTX-2.5", ("model_version", "0.9.7"): "LTX-Video", ("model_version", "1.0"): None,
    ("model_version", "v3"): None, ("model_version", ""): None, ("model_version", "ltx-2.5"): "LTX-2.5",
    ("modelspec.architecture", "ltx-2.5/lora"): "LTX-2.5", ("modelspec.architecture", "LTX-2.3/lora"): "LTX-2.3",
    ("modelspec.architecture", "ltx2"): "LTX-2", ("modelspec.architecture", "Flux.1-dev/lora"): "Flux",
    ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"): "Stable Diffusion",
    ("ss_base_model_version", "ltx2.3"): "LTX-2.3", ("ss_base_model_version", "ltx_2_3"): "LTX-2.3",
    ("ss_base_model_version", "ltx23"): "LTX-2.3", ("ss_base_model_version", "ltx2"): "LTX-2",
    ("ss_base_model_version", "ltxv-13b-0.9.8"): "LTX-Video", ("ss_base_model_version", "ltx-video"): "LTX-Video",
    ("ss_base_model_version", "wan2.2"): "Wan", ("ss_base_model_version", "wan_2_1"): "Wan",
    ("ss_base_model_version", "sdxl_base_v1-0"): "Stable Diffusion", ("ss_base_model_version", "qwen_image"): "Qwen",
    ("ss_base_model_version", "hunyuan_video"): "Hunyuan", ("ss_base_model_version", "my model"): None,
    ("ss_base_model_version", "wander"): None, ("ss_base_model_version", "ltx"): None,
    ("base_model_name_or_path", "Lightricks/LTX-2"): "LTX-2",
    ("base_model_name_or_path", "Lightricks/LTX-2.3"): "LTX-2.3",
    ("base_model_name_or_path", "ltx-2.3-22b-dev"): "LTX-2.3", ("base_model_name_or_path", "LTX-2-19b-dev"): "LTX-2",
    ("base_model_name_or_path", "https://huggingface.co/Lightricks/LTX-2"): "LTX-2",
    ("base_model_name_or_path", "hf://Wan-AI/Wan2.2-T2V-A14B"): "Wan",
    ("base_model_name_or_path", "google/gemma-3-12b-it"): "Gemma",
    ("base_model_name_or_path", "/home/me/LTX-2/model"): None, ("base_model_name_or_path", "./LTX-2"): None,
    ("base_model_name_or_path", "models/LTX-2"): None, ("base_model_name_or_path", r"C:\LTX-2\x"): None,
    ("base_model_name_or_path", "LTX-2/transformer.safetensors"): None, ("base_model_name_or_path", ""): None,
    ("base_model_name_or_path", "me/our-own"): None,
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BASES)
def test_names_of_bases(field: str, value: str, tmp_path: Path) -> None:
    base = BASES[field, value]
    assert named_base(field, value) == base
    foreign = opened(made(tmp_path, {field: value})).foreign
    assert (foreign is not None) == (base not in (None, "LTX-2.3"))
    assert foreign is None or (str(base) in foreign and field in foreign)


@given(st.text(max_size=40) | st.text("ltxv wan/.-_0123456789b", max_size=40))
def test_any_text_is_some_base_or_none(text: str) -> None:
    assert all(named_base(field, text) != "" for field in ("model_version", "base_model_name_or_path", "base_model"))


def test_a_lora_of_another_base_is_refused_unless_forced(tmp_path: Path) -> None:
    path = made(tmp_path, {"ss_base_model_version": "ltx2", "lora_alpha": "4"})
    with pytest.raises(AdapterError, match="was made for another model") as caught:
        found(tmp_path, path)
    assert caught.value.expected == "LTX-2.3"
    assert "LTX-2, by ss_base_model_version ltx2 (the header)" in str(caught.value)
    assert caught.value.next.startswith("ltxpack bake-lora") and "--force (" in caught.value.next
    told = found(tmp_path, path, force=True)
    assert "was made for another model" in told.warnings[0] and "alpha 4" in told.notes[0]
    assert inspect_path(path)["made_for"] == "LTX-2, by ss_base_model_version ltx2 (the header)"
    # LTX-2 is the family's name as well.
    assert inspect_path(path)["takes"] == {"ltxpack bake-lora": "yes: with --force, if its targets fit"}
    both = made(tmp_path / "both", {"ss_base_model_version": "ltx2", "model_version": "2.3.0"})
    assert found(tmp_path, both).warnings == []


IC_LORA = {
    "one": ({"reference_downscale_factor": "1"}, True),
    "two": ({"ss_reference_downscale_factor": "2"}, True),
    "strategy": ({"ss_ic_lora_strategy": "v2v"}, True),
    "spatial": ({"reference_spatial_scale_factor": "2"}, True),
    "json": ({"lora_adapter_metadata": '{"transformer.reference_downscale_factor": 2}'}, True),
    "kohya's defaults": ({"ss_reference_downscale_factor": "1", "ss_ic_lora_strategy": "None"}, False),
    "nothing": ({"reference_downscale_factor": "None"}, False),
}


@pytest.mark.parametrize("case", IC_LORA)
def test_ic_loras_are_told(case: str, tmp_path: Path) -> None:
    path, told = made(tmp_path, IC_LORA[case][0]), IC_LORA[case][1]
    warnings = opened(path).warnings
    assert (len(warnings) == 1 and "is an IC-LoRA" in warnings[0]) == told
    assert inspect_path(path)["warnings"] == list(warnings)


STARTS = {
    **dict.fromkeys((True, False, None, "gaussian", "eva", "orthogonal", "mica", "true"), True),
    **dict.fromkeys(("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "my_own"), False),
}


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_start_values_that_change_the_base_are_refused(start: Any, tmp_path: Path) -> None:
    path = made(tmp_path, {}, PEFT, {**CONFIG, "init_lora_weights": start})
    if STARTS[start]:
        assert opened(path).factor == 4
        return
    error = unfit(path, "base changed by its initialisation")
    assert error.file == str(tmp_path / "adapter_config.json") and f"init_lora_weights {start} (" in str(error)


def test_a_dora_without_its_magnitudes_is_refused(tmp_path: Path) -> None:
    for stated in ({"use_dora": "True"}, {"ss_network_args": '{"dora_wd": "True"}'}):
        path = made(tmp_path, stated)
        error = unfit(path, "is a DoRA without its magnitudes")
        assert [str(item) for item in error.items] == [name for name in HEADER if "lora_A" in name]
        assert "without its magnitudes" in inspect_path(path)["problem"]
    magnitudes = {f"diffusion_model.{official(m)}.dora_scale": torch.ones(len(FACTORS[m][1]), 1) for m in MODULES}
    assert len(opened(made(tmp_path / "whole", {"use_dora": "True"}, HEADER | magnitudes)).dora) == 3


ABSENT = {
    "bias": ({"bias": "lora_only"}, "biases"),
    "lora_bias": ({"lora_bias": True}, "biases"),
    "modules_to_save": ({"modules_to_save": ["proj_out", "audio_proj_out"]}, "proj_out, audio_proj_out"),
    "target_parameters": ({"target_parameters": ["ff.experts.weight"]}, "ff.experts.weight"),
    "none": ({"bias": "none", "lora_bias": False, "modules_to_save": None, "target_parameters": []}, None),
    "held": ({"target_parameters": ["attn1.to_q.weight"]}, None),
}


@pytest.mark.parametrize("case", ABSENT)
def test_what_is_stated_and_absent_is_told(case: str, tmp_path: Path) -> None:
    stated, lost = ABSENT[case]
    warnings = opened(made(tmp_path, {}, PEFT, CONFIG | stated)).warnings
    assert len(warnings) == (1 if lost else 0)
    if lost:
        told = f"{case} in adapter_config.json names what the file does not hold ({lost})"
        assert warnings[0] == f"{told}: what was trained there is not baked"


endings = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3).map(".".join)


@given(st.lists(endings, max_size=6), endings)
def test_a_module_is_found_by_any_ending_of_its_name(modules: list[str], wanted: str) -> None:
    beside = _Beside(f"{module}.lora_A.weight" for module in modules)
    assert beside.holds(wanted) == any(f".{module}".endswith(f".{wanted}") for module in modules)


def test_a_file_that_states_without_end_is_refused_and_the_most_is_judged_in_time(tmp_path: Path) -> None:
    stated = {f"p{number}": {"r": RANK} for number in range(MAX_STATEMENTS + 1)}
    unfit(made(tmp_path, {"lora_adapter_metadata": json.dumps(stated)}), "states too much of itself")
    del stated["p0"]
    crowd = {f"p{1 + i % MAX_STATEMENTS}.m{i}.q": (torch.ones(1, 1), torch.ones(1, 1)) for i in range(3_000)}
    path = save(tmp_path / "y.safetensors", dotted(crowd, str), {"lora_adapter_metadata": json.dumps(stated)})
    started = time.process_time()
    assert f"says {RANK}" in inspect_path(path)["problem"] and time.process_time() - started < 6


# Method -> tensors of one module with the weight [out, in].
MADE_BY = {
    "lora": lambda out, wide: {"lora_A.weight": (4, wide), "lora_B.weight": (out, 4)},
    "loha": lambda out, wide: {f"hada_w{i}_{j}": (out, 2) if j == "a" else (2, wide) for i in "12" for j in "ab"},
    "lokr": lambda out, wide: {"lokr_w1": (2, 2), "lokr_w2_a": (out // 2, 2), "lokr_w2_b": (2, wide // 2)},
    "oft": lambda out, wide: {"oft_blocks": (out // 4, 4, 4)},
    "peft-oft": lambda out, wide: {"oft_R.weight": (wide // 4, 6)},
    "diff": lambda out, wide: {"diff": (out, wide), "diff_b": (out,)},
}
LETTERS = {"diffusion_model.": official, "base_model.model.": str, "transformer.": str, "": str, "pipe.dit.": official}


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([name for name in linears() if "gate" not in name]),
        st.sampled_from(sorted(MADE_BY)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(sorted(LETTERS)),
    st.sampled_from(sorted(HEADERS)),
    st.booleans(),
)
def test_what_bake_lora_accepts_is_a_lora_to_all(
    methods: dict[str, str], prefix: str, header: str, alpha: bool
) -> None:
    tensors = {}
    for module, method in methods.items():
        name = prefix + LETTERS[prefix](module)
        for ending, shape in MADE_BY[method](*shapes()[f"{module}.weight"]).items():
            tensors[f"{name}.{ending}"] = torch.full(shape, 0.01)
        if alpha and method != "diff":
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    with tempfile.TemporaryDirectory() as folder:
        path = made(Path(folder), HEADERS[header][0], tensors)
        described = inspect_path(path)
        try:
            adapter = opened(path)
        except AdapterError as error:
            # The transformer has every module, so only what is stated can be at fault, which inspect sees as well.
            assert described["problem"] is not None, error
            return
        assert (described["kind"], described["problem"]) == ("lora", None)
        assert described["notes"] == list(adapter.notes) and set(described["warnings"]) <= set(adapter.warnings)
        assert read_lora(read_tensorfile(path)).is_lora
    assert MADE_BY.keys() <= {method.name for method in METHODS}
