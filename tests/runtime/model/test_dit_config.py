"""Reading transformer/config.json: what is accepted, what is refused and how that is said."""

from __future__ import annotations

import inspect

import pytest
from diffusers import LTX2VideoTransformer3DModel
from dit_parts import LTX23, SMALL

from ltxpack.errors import UnsupportedError
from ltxpack.runtime.model.config import DiTConfig

DIFFUSERS_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(LTX2VideoTransformer3DModel.__init__).parameters.items()
    if name != "self"
}
REFUSED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("cross_attn_mod", "audio_cross_attn_mod", "audio_gated_attn"), (False,)),
    **dict.fromkeys(("use_prompt_adaln_single", "rope_double_precision"), (False,)),
    **dict.fromkeys(("use_prompt_embeddings", "use_keyframes_abs_pos_embedding", "norm_elementwise_affine"), (True,)),
    **dict.fromkeys(("patch_size", "patch_size_t", "audio_patch_size", "audio_patch_size_t"), (2,)),
    "gated_attn": (False, 1),
    "rope_type": ("interleaved",),
    "qk_norm": ("layer_norm",),
    "activation_fn": ("gelu",),
    "cross_attention_dim": (2048,),
    "audio_cross_attention_dim": (4096,),
    "num_layers": ("48", 0, True, 48.0),
    "attention_head_dim": (127,),
    "attention_bias": (1, None),
    "norm_eps": (0, float("nan")),
    "rope_theta": ("10000",),
}


def test_every_diffusers_field_is_known_with_diffusers_default() -> None:
    assert DiTConfig.from_dict(LTX23) == DiTConfig.from_dict(DIFFUSERS_DEFAULTS | LTX23)


def test_sizes_of_ltx_2_3() -> None:
    config = DiTConfig.from_dict(LTX23 | {"_class_name": "LTX2VideoTransformer3DModel", "_diffusers_version": "0.42.1"})
    assert (config.streams.video.dim, config.streams.audio.dim, config.num_layers) == (4096, 2048, 48)
    assert (config.streams.video.heads, config.streams.audio.heads) == (32, 32)
    assert config.streams.video.max_positions == (20, 2048, 2048)
    assert config.streams.audio.max_positions == (20,)
    assert (config.timestep_scale, config.cross_gate_timestep_scale) == (1000, 1000)


def test_no_number_of_output_channels_means_as_many_as_go_in() -> None:
    config = DiTConfig.from_dict(SMALL | {"out_channels": None, "audio_out_channels": None})
    assert config.streams.map(lambda stream: stream.out_channels - stream.in_channels).video == 0
    assert config.streams.audio.out_channels == config.streams.audio.in_channels


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in REFUSED for value in REFUSED[field]])
def test_a_value_that_would_need_another_computation_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UnsupportedError) as caught:
        DiTConfig.from_dict(LTX23 | {field: value})
    assert field in caught.value.problem
    assert caught.value.found == repr(value)
    assert caught.value.expected is not None and caught.value.next is not None


@pytest.mark.parametrize("field", sorted(LTX23.keys() - {"perturbed_attn"}))
def test_an_absent_field_means_what_it_means_to_diffusers(field: str) -> None:
    """These defaults describe an older model, so leaving one out asks for that one."""
    with pytest.raises(UnsupportedError, match=field):
        DiTConfig.from_dict({name: value for name, value in LTX23.items() if name != field})


def test_unknown_fields_are_all_named() -> None:
    with pytest.raises(UnsupportedError) as caught:
        DiTConfig.from_dict(LTX23 | {"sliding_window": 16, "another": None})
    assert caught.value.items == ("another", "sliding_window")
