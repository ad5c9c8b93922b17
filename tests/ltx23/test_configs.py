"""Component configs: what is taken over, what is derived, what is refused and how it is named."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from materialize import tiny_source
from materialize.modules import module_class, needs_spec, spec

from ltxpack.errors import LtxpackError, UnsupportedError
from ltxpack.ltx23 import config_tables
from ltxpack.ltx23.configs import checkpoint_configs, json_bytes, model_index, scheduler_config, upsampler_config
from ltxpack.ltx23.fields import flatten
from ltxpack.ltx23.releases import parse_version, read_metadata

# Every field whose value could be set otherwise, with a value that is not LTX-2.3's.
FIXED_ELSEWHERE = [
    ("transformer.rope_type", "interleaved"), ("transformer.frequencies_precision", "float32"),
    ("transformer.apply_gated_attention", False), ("transformer.cross_attention_adaln", False),
    ("transformer.caption_proj_before_connector", False), ("transformer.qk_norm", "layer_norm"),
    ("transformer.norm_eps", 1e-5), ("transformer.use_middle_indices_grid", False), ("transformer.attention_bias", 1),
    ("vae.spatial_padding_mode", "reflect"), ("vae.timestep_conditioning", True), ("vae.causal_decoder", True),
    ("vae.normalize_latent_channels", True), ("audio_vae.model.params.ddconfig.norm_type", "group"),
    ("audio_vae.model.params.ddconfig.attn_resolutions", [16]), ("vocoder.vocoder.resblock", "1"),
    ("vocoder.bwe.use_tanh_at_final", True),
]  # fmt: skip
# Fields that are absent in LTX-2.3 and change the model where they stand.
OPTIONAL = [
    ("transformer.ff_bias", False), ("transformer.use_prompt_adaln_single", False),
    ("transformer.use_keyframes_abs_pos_embedding", True), ("transformer.double_self_attention", True),
    ("transformer.num_vector_embeds", 4),
]  # fmt: skip


SHAPES = tiny_source.tensor_shapes(tiny_source.CONFIG)
LEAVES = [f"{section}.{name}" for section in tiny_source.CONFIG for name in flatten(tiny_source.CONFIG[section])]


def build(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return checkpoint_configs(config, SHAPES, "base.safetensors")


def changed(path: str, value: Any) -> dict[str, Any]:
    """The tiny config with the field at ``path`` set (or removed, with ``...``)."""
    config = copy.deepcopy(tiny_source.CONFIG)
    *folders, name = path.split(".")
    section = config
    for folder in folders:
        section = section[folder]
    if value is ...:
        del section[name]
    else:
        section[name] = value
    return config


@needs_spec
def test_real_model_configs_are_the_ones_of_the_spec() -> None:
    published, shapes, _ = spec()
    found = checkpoint_configs(published["config"], shapes, "spec")
    stated = {
        "transformer": {"num_layers": 48, "vae_scale_factors": [8, 32, 32], "use_prompt_embeddings": False},
        "connectors": {
            "text_proj_in_factor": 49, "video_connector_num_learnable_registers": 128, "audio_connector_num_layers": 8,
        },
        "vae": {
            "block_out_channels": [256, 512, 1024, 1024], "decoder_block_out_channels": [256, 512, 512, 1024],
            "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
            "upsample_factor": [2, 2, 1, 2], "decoder_spatial_padding_mode": "zeros",
        },
        "vocoder": {"final_act_fn": "clamp", "bwe_final_act_fn": None},
    }  # fmt: skip
    for component, values in stated.items():
        assert {name: found[component][name] for name in values} == values


def test_every_diffusers_argument_is_decided() -> None:
    """A default of the library may change under us, so none is relied on."""
    configs = {**build(tiny_source.CONFIG), "scheduler": scheduler_config(False)}
    configs["latent_upsampler"] = upsampler_config(tiny_source.UPSAMPLER_CONFIG, 16, "u")
    for component, config in configs.items():
        arguments = set(inspect.signature(module_class(component).__init__).parameters) - {"self"}
        assert {name for name in config if not name.startswith("_")} == arguments, component


@pytest.mark.parametrize(
    ("path", "value"), [*FIXED_ELSEWHERE, *OPTIONAL, *((path, ...) for path, _ in FIXED_ELSEWHERE)]
)
def test_a_value_that_changes_the_maths_is_refused_by_name_and_no_value_too(path: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        build(changed(path, value))
    assert path in caught.value.problem
    assert caught.value.found == ("no such field" if value is ... else json.dumps(value))
    assert caught.value.expected is not None


@pytest.mark.parametrize("path", ["transformer.new_thing", "vae.new_thing", "vocoder.bwe.new_thing", "duration_head"])
def test_an_unknown_field_or_section_is_refused_by_name(path: str) -> None:
    with pytest.raises(UnsupportedError, match="unknown to this version") as caught:
        build(changed(path, {"a": 1} if path == "duration_head" else 1))
    assert path in caught.value.problem


def test_all_problems_are_told_at_once() -> None:
    config = changed("transformer.rope_type", "interleaved")
    config["vae"]["spatial_padding_mode"] = "reflect"
    config["surprise"] = {}
    with pytest.raises(UnsupportedError) as caught:
        build(config)
    listed = "\n".join(map(str, caught.value.items))
    for name in ("transformer.rope_type", "vae.spatial_padding_mode", "surprise"):
        assert name in listed


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        # No sizes.
        *(("transformer.num_layers", value, "transformer.num_layers") for value in (0, 10**9, True)),
        *(("transformer.num_attention_heads", value, "transformer.num_attention_heads") for value in ("2", 2.5)),
        ("transformer.positional_embedding_max_pos", [20], "transformer.positional_embedding_max_pos"),
        ("transformer.positional_embedding_theta", -1, "transformer.positional_embedding_theta"),
        *(("vae.encoder_blocks", value, "vae.encoder_blocks") for value in ([], [["res_x"]] * 9)),
        ("vocoder.vocoder.resblock_dilation_sizes", [[1], [0]], "vocoder.vocoder.resblock_dilation_sizes"),
        ("vocoder.vocoder.upsample_rates", [1] * 100, "vocoder.vocoder.upsample_rates"),
        # Sections that disagree.
        ("transformer.cross_attention_dim", 48, "transformer.cross_attention_dim"),
        ("transformer.out_channels", 8, "transformer.out_channels"),
        ("transformer.in_channels", 32, "transformer.in_channels"),
        ("transformer.audio_out_channels", 16, "transformer.audio_out_channels"),
        ("vae.encoder_base_channels", 32, "vae.encoder_base_channels"),
        ("vae.patch_size", 2, "vae.encoder_blocks"),
        ("audio_vae.preprocessing.mel.n_mel_channels", 32, "n_mel_channels"),
        ("vocoder.bwe.upsample_rates", [10, 25], "vocoder.bwe.upsample_rates"),
        ("vocoder.bwe.input_sampling_rate", 8000, "vocoder.bwe.input_sampling_rate"),
        ("vocoder.vocoder.upsample_kernel_sizes", [4], "vocoder.vocoder.upsample_kernel_sizes"),
    ],
)
def test_values_that_are_no_sizes_or_disagree_are_refused(path: str, value: Any, named: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        build(changed(path, value))
    assert named in "\n".join([caught.value.problem, *map(str, caught.value.items)])


def test_block_parameters_are_read_strictly() -> None:
    config = copy.deepcopy(tiny_source.CONFIG)
    config["vae"]["decoder_blocks"][1][1]["residual"] = True
    with pytest.raises(UnsupportedError, match=r"vae\.decoder_blocks\[1\]\.residual"):
        build(config)
    config["vae"]["decoder_blocks"][1] = ["compress_space_res", {"multiplier": 2}]
    with pytest.raises(UnsupportedError, match=r"vae\.decoder_blocks\[1\]"):
        build(config)


def test_defaults_of_absent_fields() -> None:
    found = build(tiny_source.CONFIG)
    assert not tiny_source.CONFIG["transformer"].keys() & {path.split(".")[1] for path, _ in OPTIONAL}
    assert found["transformer"]["ff_bias"] is True
    assert found["transformer"]["use_keyframes_abs_pos_embedding"] is False
    assert config_tables.TRANSFORMER["audio_in_channels"].absent == 128


def test_final_clamp_stands_on_the_main_vocoder_only() -> None:
    found = build(tiny_source.CONFIG)["vocoder"]
    assert (found["final_act_fn"], found["bwe_final_act_fn"]) == ("clamp", None)
    assert build(changed("vocoder.vocoder.apply_final_activation", False))["vocoder"]["final_act_fn"] is None
    assert build(changed("vocoder.bwe.apply_final_activation", ...))["vocoder"]["bwe_final_act_fn"] == "clamp"


def test_register_count_and_text_factor_come_from_the_tensors() -> None:
    shapes = tiny_source.tensor_shapes(tiny_source.CONFIG, registers=64, factor=7)
    found = checkpoint_configs(tiny_source.CONFIG, shapes, "x")["connectors"]
    assert (found["video_connector_num_learnable_registers"], found["text_proj_in_factor"]) == (64, 7)
    odd = {**shapes, "model.diffusion_model.video_embeddings_connector.learnable_registers": (100, 24)}
    with pytest.raises(UnsupportedError, match="divides 1024"):
        checkpoint_configs(tiny_source.CONFIG, odd, "x")
    bare = {name: shape for name, shape in shapes.items() if "video_aggregate_embed" not in name}
    with pytest.raises(UnsupportedError, match="video_aggregate_embed"):
        checkpoint_configs(tiny_source.CONFIG, bare, "x")


@pytest.mark.parametrize(
    ("field", "value"),
    [("rational_resampler", True), ("temporal_upsample", True), ("spatial_scale", 1.5), ("in_channels", 8), ("x", 1)],
)
def test_other_upsamplers_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"config.{field}"):
        upsampler_config({**tiny_source.UPSAMPLER_CONFIG, field: value}, 16, "u.safetensors")


def test_schedulers_and_the_model_index() -> None:
    for distilled, shifting, terminal in ((False, True, 0.1), (True, False, None)):
        found = scheduler_config(distilled)
        assert (found["use_dynamic_shifting"], found["shift_terminal"]) == (shifting, terminal)
    index = model_index()
    assert index["vocoder"] == ["ltx2", "LTX2VocoderWithBWE"]
    assert index["duration_head"] == [None, None]
    assert "latent_upsampler" not in index


def test_json_is_reproducible() -> None:
    assert json_bytes({"b": 1, "a": 2}) == json_bytes({"a": 2, "b": 1}) == b'{\n  "a": 2,\n  "b": 1\n}\n'


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.sampled_from(LEAVES), json_values)
def test_any_value_in_any_field_is_an_error_or_a_config(path: str, value: Any) -> None:
    try:
        found = build(changed(path, value))
    except LtxpackError as error:
        assert path.split(".", maxsplit=1)[0] in str(error)
    else:
        assert found.keys() == config_tables.CONSTANTS.keys()


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.3.0", (2, 3, 0)), ("2.3", (2, 3)), ("2.4-rc1", (2, 4)), ("2.3.0-beta.1", (2, 3, 0)), ("x", ()), ("", ())],
)
def test_versions_are_read_up_to_the_first_non_number(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("version", ["2.0.0", "2.5.0", "2.4", "1.0", "nonsense", ""])
def test_another_generation_is_refused_by_its_version(version: str) -> None:
    with pytest.raises(UnsupportedError, match="another generation") as caught:
        read_metadata({"config": "{}", "model_version": version}, [], "x")
    assert version in str(caught.value.found)


def test_metadata_is_read_bare_and_quoted() -> None:
    for version in ("2.3.0", '"2.3.0"'):
        found = read_metadata({"config": "{}", "model_version": version, "license": "text"}, [], "x")
        assert (found.model_version, found.licence) == ("2.3.0", "text")


@pytest.mark.parametrize("metadata", [{}, {"model_version": "2.3.0"}, {"config": "{}"}])
def test_a_file_without_metadata_is_no_checkpoint(metadata: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="all-in-one"):
        read_metadata(metadata, [], "x")
    with pytest.raises(UnsupportedError, match=r"LTX-2\.5"):
        read_metadata({"config": "{}"}, ["duration_head.x"], "x")


@pytest.mark.parametrize("text", ["{", "[" * 10000, '{"a":1,"a":2}', "[]", '"x"'])
def test_hostile_config_metadata_is_one_error(text: str) -> None:
    with pytest.raises(LtxpackError):
        read_metadata({"config": text, "model_version": "2.3.0"}, [], "x")
