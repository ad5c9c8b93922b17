"""Names: strengths, ``--add``, bakes; and what a LoRA key means."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_support import linears, low_rank, official, official_keys, save, shapes, unfit

from ltxpack.errors import UsageError
from ltxpack.files.tensorfile import read_tensorfile
from ltxpack.lora_bake.plan import bake_name, check_bake_name, lora_name, parse_added
from ltxpack.ltx23.lora_keys import FLAT_PREFIXES, ModuleNames, belongs_elsewhere, linear_modules, parse_key
from ltxpack.manifest import BAKE_NAME, printed_name
from ltxpack.materialize.checkpoint import read_lora
from ltxpack.materialize.inspect import inspect_path
from ltxpack.strength import Strength, format_strength

FULL = {
    "num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096, "in_channels": 128,
    "out_channels": 128, "audio_num_attention_heads": 32, "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048, "audio_in_channels": 128, "audio_out_channels": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("strength", "text"),
    [(1.0, "1"), (0.25, "0.25"), (0.5, "0.5"), (0.0, "0"), (-0.0, "0"), (1e-7, "0.0000001"), (1e22, "1" + "0" * 22),
     (100.0, "100"), (-0.5, "-0.5"), (0.1 + 0.2, "0.30000000000000004")],
)  # fmt: skip
def test_strength_text(strength: float, text: str) -> None:
    assert format_strength(strength) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_strength_text_reads_back_and_is_plain(strength: float) -> None:
    text = format_strength(strength)
    assert float(text) == strength
    assert "e" not in text and "E" not in text
    assert not ("." in text and text.endswith(("0", ".")))


@given(st.text(min_size=1, max_size=40), st.floats(min_value=-10, max_value=10))
def test_add_splits_at_the_last_equals_sign(file: str, strength: float) -> None:
    assert parse_added(f"{file}={strength!r}") == (file, Strength(strength))


@pytest.mark.parametrize(
    "text", ["style.safetensors", "=0.5", "a=", "a=nan", "a=inf", "a=-inf", "a=1e19", "a=half", ""]
)
def test_add_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        parse_added(text)


@given(st.text(min_size=0, max_size=60), st.integers(-100_000, 100_000))
def test_every_bake_name_is_allowed(stem: str, thousandths: int) -> None:
    name = bake_name([("style", 0.8), (lora_name(stem), thousandths / 1000)])
    assert BAKE_NAME.fullmatch(name)
    assert check_bake_name(name) == name


def test_bake_names() -> None:
    assert bake_name([("distilled", 1.0)]) == "distilled-1"
    assert bake_name([("style", 0.8), ("distilled", 0.5)]) == "distilled-0.5+style-0.8"
    assert bake_name([("style", 0.8), ("distilled", 0.5)], "fp8") == "distilled-0.5+style-0.8-fp8"
    assert (bake_name([], "fp8"), bake_name([], "int8")) == ("base-fp8", "base-int8")
    assert bake_name([("a", 1.0), ("b", -0.5), ("distilled", 0.0)]) == "distilled-0+a-1+b--0.5"
    assert lora_name("my LoRA (v2)") == "my-LoRA-v2"
    with pytest.raises(UsageError, match="too long"):
        bake_name([("distilled", 1e-300)])


def test_a_recorded_name_is_the_same_in_every_locale() -> None:
    """Python reads names in ASCII where the locale says so, and keeps other bytes as surrogates."""
    assert printed_name(Path("Grün.safetensors")) == printed_name(Path("Gr\udcc3\udcbcn.safetensors"))
    assert printed_name(Path("a/Grün\n\udcff")) == "Grün\\n\\udcff"


@pytest.mark.parametrize("name", ["auto", "base", ".", "..", "a/b", "", "ä", "a b", "x" * 201])
def test_refused_names(name: str) -> None:
    with pytest.raises(UsageError):
        check_bake_name(name)


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "model.diffusion_model.", "", "transformer.", "base_model.model."]
)
@pytest.mark.parametrize("ending", ["lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora.down.weight"])
def test_every_linear_is_found_in_both_spellings(prefix: str, ending: str) -> None:
    names = ModuleNames(shapes())
    for module in linears():
        for spelling in {module, official(module), module.removesuffix(".0"), official(module).removesuffix(".0")}:
            key = parse_key(f"{prefix}{spelling}.{ending}")
            assert key is not None and key.role == "down" and names.find(key) == (module,)


@pytest.mark.parametrize("prefix", FLAT_PREFIXES)
def test_flattened_names_are_collision_free_at_full_size(prefix: str) -> None:
    full = shapes(48, **FULL)
    names = ModuleNames(full)
    assert len(names.linears) == 1660
    for module in sorted(names.linears):
        for spelling in (module, official(module)):
            key = parse_key(f"{prefix}{spelling.replace('.', '_')}.lora_up.weight")
            assert key is not None and key.flat and key.role == "up" and names.find(key) == (module,)


@pytest.mark.parametrize(
    ("path", "module", "base"),
    [
        ("x", "x", "bare"), ("model.x", "x", "model"), ("models.x", "models.x", "bare"), ("model.", "model.", "bare"),
        ("model.model.", "model.", "model"), ("model.diffusion_model.", "diffusion_model.", "model"),
        ("base_model.model.model.diffusion_model.x.model.y", "x.model.y", "base_model.model.model.diffusion_model"),
        ("base_model.transformer.x", "base_model.transformer.x", "bare"),
    ],
)  # fmt: skip
def test_prefixes_are_taken_off_while_something_is_left(path: str, module: str, base: str) -> None:
    key = parse_key(f"{path}.lora_A.weight")
    assert key is not None and (key.module, key.style) == (module, f"{base} lora_A")


def test_many_prefixes_take_no_more_calls_than_one() -> None:
    counts = []
    for repeats in (1, 160):
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            key = parse_key.__wrapped__("model." * repeats + "x.lora_A.weight")  # not from its cache
        finally:
            sys.setprofile(None)
        assert key is not None and key.module == "x"
        counts.append(calls)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "module",
    ["video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q", "text_embedding_projection.aggregate_embed",
     "connectors.video_connector.transformer_blocks.0.ff.net.2", "lora_te1_layers_0", "text_encoder.layers.0.mlp"],
)  # fmt: skip
def test_text_path_is_recognised(module: str) -> None:
    assert belongs_elsewhere(module)


def test_transformer_modules_are_not_taken_for_the_text_path_nor_tables_for_linears() -> None:
    assert not [module for module in linears() if belongs_elsewhere(module) or belongs_elsewhere(official(module))]
    tables = {name for name, shape in shapes().items() if len(shape) == 2 and not name.endswith(".weight")}
    assert tables and not tables & {f"{module}.weight" for module in linear_modules(shapes())}


@given(st.text(max_size=80))
def test_any_key_is_parsed_or_refused(key: str) -> None:
    parsed = parse_key(key)
    if parsed is not None:
        assert parsed.module
        ModuleNames({"a.weight": (1, 1)}).find(parsed)


# Keys as trainers write them, and keys that only look so.
parts = st.sampled_from(["transformer", "diffusion_model", "model", "base_model", "lora_unet_x", "x", "attn1", "lora_A",
                         "lora_B", "lora", "lora_down", "up", "down", "default", "weight", "alpha", "diff", "diff_b",
                         "dora_scale", "lora_magnitude_vector", "bias", " "])  # fmt: skip
any_key = st.one_of(
    st.lists(parts, min_size=1, max_size=6).map(".".join), st.text("ab._-lorA", min_size=1, max_size=20)
).filter(lambda key: ".." not in key)


@settings(max_examples=60, deadline=None)
@given(st.lists(any_key, min_size=1, max_size=5, unique=True))
def test_materialize_inspect_and_bake_lora_agree_on_what_a_lora_key_is(keys: list[str]) -> None:
    tensors = official_keys(low_rank(["proj_in"])) | {"a.needed.stranger": torch.zeros(1)}
    with tempfile.TemporaryDirectory() as folder:
        path = save(
            Path(folder) / "x.safetensors", tensors | {key: torch.zeros(1) for key in keys if key not in tensors}
        )
        others = sorted(read_lora(read_tensorfile(path)).others)
        assert sorted(inspect_path(path)["others"]) == others
        error = unfit(path, "unknown key")
        unknown = [item.removeprefix("unknown key: ") for item in error.items if item.startswith("unknown key")]
        assert sorted(unknown) == others
