"""The config fields of an LTX-2.3 checkpoint and the use of each (spec 01, sections 2 and 5).

One table per section of the checkpoint's config: ``take`` copies a field into the diffusers config of a component,
``only`` names the one value that this version converts, ``no_effect`` lists fields without effect. Targets
are ``component.field``; a target that starts with ``_`` is an intermediate of the derivations in configs.py.
Constants are diffusers fields that no official field determines.
"""

from __future__ import annotations

from typing import Any

from ltxpack.ltx23.fields import (
    Field,
    block_list,
    dimension,
    each_only,
    flag,
    list_of,
    no_effect,
    only,
    or_none,
    positive,
    repeats,
    same_name,
    take,
    whole,
)  # fmt: skip

TRANSFORMER: dict[str, Field] = {
    "_class_name": only("AVTransformer3DModel"),
    # Sizes.
    "num_layers": take(repeats, "transformer.num_layers"),
    **same_name("transformer", dimension, "num_attention_heads", "attention_head_dim", "cross_attention_dim"),
    **same_name("transformer", dimension, "in_channels", "out_channels"),
    **same_name("transformer", dimension, "audio_num_attention_heads", "audio_attention_head_dim"),
    **same_name("transformer", dimension, "audio_cross_attention_dim", "audio_out_channels"),
    "audio_in_channels": take(dimension, "transformer.audio_in_channels", absent=128),
    "caption_channels": take(dimension, "transformer.caption_channels", "connectors.caption_channels"),
    "connector_num_layers": take(repeats, "connectors.video_connector_num_layers"),
    "connector_num_attention_heads": take(dimension, "connectors.video_connector_num_attention_heads"),
    "connector_attention_head_dim": take(dimension, "connectors.video_connector_attention_head_dim"),
    "audio_connector_num_layers": take(or_none(repeats), "connectors._audio_layers", absent=None),
    **same_name("connectors", dimension, "audio_connector_num_attention_heads", "audio_connector_attention_head_dim"),
    # Positions and time.
    "positional_embedding_theta": take(positive, "transformer.rope_theta"),
    "positional_embedding_max_pos": take(list_of(dimension, 3), "transformer._max_pos"),
    "audio_positional_embedding_max_pos": take(list_of(dimension, 1), "transformer._audio_max_pos"),
    "connector_positional_embedding_max_pos": take(list_of(dimension, 1), "connectors._max_pos"),
    "timestep_scale_multiplier": take(dimension, "transformer.timestep_scale_multiplier"),
    "av_ca_timestep_scale_multiplier": take(dimension, "transformer.cross_attn_timestep_scale_multiplier"),
    "positional_embedding_type": only("rope"),
    "rope_type": only("split", "transformer.rope_type", "connectors.rope_type"),
    "frequencies_precision": only(
        "float64", "transformer.rope_double_precision", "connectors.rope_double_precision", becomes=True
    ),
    "causal_temporal_positioning": only(True, "transformer.causal_offset", becomes=1),
    # The maths of LTX-2.3.
    "activation_fn": only("gelu-approximate", "transformer.activation_fn"),
    "apply_gated_attention": only(True, "transformer.gated_attn", "transformer.audio_gated_attn"),
    "connector_apply_gated_attention": only(True, "connectors.video_gated_attn", "connectors.audio_gated_attn"),
    "cross_attention_adaln": only(True, "transformer.cross_attn_mod", "transformer.audio_cross_attn_mod"),
    "caption_proj_before_connector": only(True, "transformer.use_prompt_embeddings", becomes=False),
    "text_encoder_norm_type": only("per_token_rms", "connectors.per_modality_projections", becomes=True),
    "qk_norm": only("rms_norm", "transformer.qk_norm", becomes="rms_norm_across_heads"),
    "standardization_norm": only("rms_norm"),
    "norm_elementwise_affine": only(False, "transformer.norm_elementwise_affine"),
    "norm_eps": only(1e-6, "transformer.norm_eps"),
    "attention_bias": only(True, "transformer.attention_bias", "transformer.attention_out_bias"),
    "ff_bias": only(True, "transformer.ff_bias", optional=True),
    "audio_ff_bias": only(True, "transformer.audio_ff_bias", optional=True),
    "use_prompt_adaln_single": only(True, "transformer.use_prompt_adaln_single", optional=True),
    "use_keyframes_abs_pos_embedding": only(False, "transformer.use_keyframes_abs_pos_embedding", optional=True),
    **each_only(True, "use_middle_indices_grid", "use_embeddings_connector", "connector_norm_output"),
    **each_only(True, "use_audio_video_cross_attention", "av_cross_ada_norm"),
    **each_only(False, "caption_projection_first_linear", "caption_projection_second_linear"),
    "caption_proj_input_norm": only(False),
    # Inherited fields: any other value would mean another architecture.
    "attention_type": only("default", optional=True),
    "num_vector_embeds": only(None, optional=True),
    **each_only(True, "connector_ff_bias", "cross_attention_norm", optional=True),
    **each_only(False, "double_self_attention", "only_cross_attention", "share_ff", optional=True),
    "use_linear_projection": only(False, optional=True),
    # For training or initialisation, or never read. The tensor determines the number of registers.
    **no_effect("connector_learnable_registers_std", "connector_num_learnable_registers", "dropout"),
    **no_effect("norm_num_groups", "num_embeds_ada_norm", "upcast_attention"),
}

VAE: dict[str, Field] = {
    "_class_name": only("CausalVideoAutoencoder"),
    "latent_channels": take(dimension, "vae.latent_channels"),
    "patch_size": take(whole(1, 64), "vae.patch_size"),
    "encoder_base_channels": take(dimension, "vae._encoder_base"),
    "decoder_base_channels": take(dimension, "vae._decoder_base"),
    "encoder_blocks": take(
        block_list(
            {"compress_space_res": "spatial", "compress_time_res": "temporal", "compress_all_res": "spatiotemporal"}
        ),
        "vae._encoder",
    ),
    "decoder_blocks": take(
        block_list({"compress_space": "spatial", "compress_time": "temporal", "compress_all": "spatiotemporal"}),
        "vae._decoder",
    ),
    # LTX-2 lacks this field: its decoder pads by reflection.
    "spatial_padding_mode": only("zeros", "vae.encoder_spatial_padding_mode", "vae.decoder_spatial_padding_mode"),
    "timestep_conditioning": only(False, "vae.timestep_conditioning"),
    "causal_decoder": only(False, "vae.decoder_causal"),
    "norm_layer": only("pixel_norm"),
    "scaling_factor": only(1.0, "vae.scaling_factor"),
    "latent_log_var": only("uniform"),
    **each_only(False, "use_quant_conv", "normalize_latent_channels"),
    "dims": only(3),
    "in_channels": only(3, "vae.in_channels"),
    "out_channels": only(3, "vae.out_channels"),
}

_DD = "model.params.ddconfig."

AUDIO_VAE: dict[str, Field] = {
    _DD + "ch": take(dimension, "audio_vae.base_channels"),
    _DD + "ch_mult": take(list_of(whole(1, 1024), 3), "audio_vae.ch_mult"),
    _DD + "num_res_blocks": take(repeats, "audio_vae.num_res_blocks"),
    _DD + "z_channels": take(dimension, "audio_vae.latent_channels"),
    _DD + "resolution": take(dimension, "audio_vae.resolution"),
    _DD + "mel_bins": take(dimension, "audio_vae.mel_bins"),
    _DD + "in_channels": only(2, "audio_vae.in_channels"),
    _DD + "out_ch": only(2, "audio_vae.output_channels"),
    _DD + "double_z": only(True, "audio_vae.double_z"),
    _DD + "attn_resolutions": only([], "audio_vae.attn_resolutions", becomes=None),
    _DD + "mid_block_add_attention": only(False, "audio_vae.mid_block_add_attention"),
    _DD + "norm_type": only("pixel", "audio_vae.norm_type"),
    _DD + "causality_axis": only("height", "audio_vae.causality_axis"),
    _DD + "downsample_time": only(False, optional=True),
    **no_effect(_DD + "dropout"),
    "model.params.sampling_rate": take(dimension, "audio_vae.sample_rate", "transformer.audio_sampling_rate"),
    "preprocessing.audio.sampling_rate": take(dimension, "audio_vae._preprocessing_rate"),
    "preprocessing.stft.hop_length": take(dimension, "audio_vae.mel_hop_length", "transformer.audio_hop_length"),
    "preprocessing.stft.causal": only(True, "audio_vae.is_causal"),
    "preprocessing.mel.n_mel_channels": take(dimension, "audio_vae._mel_channels"),
    # For reading sound, which nothing here does.
    **no_effect(*(f"preprocessing.audio.{name}" for name in ("max_wav_value", "duration", "stereo", "causal_padding"))),
    **no_effect("preprocessing.stft.filter_length", "preprocessing.stft.win_length"),
    **no_effect("preprocessing.mel.mel_fmin", "preprocessing.mel.mel_fmax"),
}


def _generator(section: str, prefix: str) -> dict[str, Field]:
    """One of the vocoder's two generators: ``section`` in the checkpoint, fields ``vocoder.<prefix>…``."""
    target = f"vocoder.{prefix}"
    return {
        f"{section}.upsample_initial_channel": take(dimension, target + "hidden_channels"),
        f"{section}.upsample_rates": take(list_of(whole(1, 1024)), target + "upsample_factors"),
        f"{section}.upsample_kernel_sizes": take(list_of(whole(1, 1024)), target + "upsample_kernel_sizes"),
        f"{section}.resblock_kernel_sizes": take(list_of(whole(1, 1024)), target + "resnet_kernel_sizes"),
        f"{section}.resblock_dilation_sizes": take(list_of(list_of(whole(1, 1024))), target + "resnet_dilations"),
        f"{section}.use_bias_at_final": take(flag(True, False), target + "final_bias"),
        # Absent means true: so the main generator clamps (the public converter loses this).
        f"{section}.apply_final_activation": take(flag("clamp", None), target + "final_act_fn", absent=True),
        f"{section}.resblock": only("AMP1"),
        f"{section}.activation": only("snakebeta", target + "act_fn"),
        f"{section}.stereo": only(True, target + "out_channels", becomes=2),
        f"{section}.use_tanh_at_final": only(False),
    }


VOCODER: dict[str, Field] = {
    **_generator("vocoder", ""),
    **_generator("bwe", "bwe_"),
    "bwe.n_fft": take(dimension, "vocoder.filter_length"),
    "bwe.win_size": take(dimension, "vocoder.window_length"),
    "bwe.hop_length": take(dimension, "vocoder.hop_length"),
    "bwe.num_mels": take(dimension, "vocoder.num_mel_channels"),
    **{f"bwe.{name}": take(dimension, f"vocoder.{name}") for name in ("input_sampling_rate", "output_sampling_rate")},
}

UPSAMPLER: dict[str, Field] = {
    "_class_name": only("LatentUpsampler", optional=True),
    **same_name("latent_upsampler", dimension, "in_channels", "mid_channels"),
    "num_blocks_per_stage": take(repeats, "latent_upsampler.num_blocks_per_stage"),
    "dims": only(3, "latent_upsampler.dims"),
    "spatial_upsample": only(True, "latent_upsampler.spatial_upsample"),
    "temporal_upsample": only(False, "latent_upsampler.temporal_upsample"),
    "spatial_scale": only(2.0, "latent_upsampler.rational_spatial_scale", optional=True),
    "rational_resampler": only(False, "latent_upsampler.use_rational_resampler", optional=True),
}

# The scheduler section has no effect: the two-stage recipe brings its own sigmas.
SECTIONS = {"transformer": TRANSFORMER, "vae": VAE, "audio_vae": AUDIO_VAE, "vocoder": VOCODER}
SECTIONS_WITHOUT_EFFECT = frozenset({"scheduler"})

CONSTANTS: dict[str, dict[str, Any]] = {
    "transformer": {
        "patch_size": 1,
        "patch_size_t": 1,
        "audio_patch_size": 1,
        "audio_patch_size_t": 1,
        "audio_scale_factor": 4,
        "perturbed_attn": True,
    },
    "connectors": {"rope_theta": 10000.0, "causal_temporal_positioning": False, "proj_bias": True},
    "vae": {"patch_size_t": 1, "resnet_norm_eps": 1e-6, "encoder_causal": True},
    "audio_vae": {"dropout": 0.0},
    "vocoder": {
        f"{prefix}{name}": value
        for prefix in ("", "bwe_")
        for name, value in {
            "leaky_relu_negative_slope": 0.1,
            "antialias": True,
            "antialias_ratio": 2,
            "antialias_kernel_size": 12,
        }.items()
    },
}

SCHEDULER_BASE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": 0.1,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}
SCHEDULER_DISTILLED = {**SCHEDULER_BASE, "use_dynamic_shifting": False, "shift_terminal": None}
