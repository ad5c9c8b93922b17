"""The published LTX-2.3 by its sizes: what its files state, and from that every tensor, without any of the files.

For plans before 70 GB are fetched. The configs are data; a test holds what is derived from them to the published
checkpoint's own number of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ltxpack.ltx23.classes import TEXT_ROOT
from ltxpack.ltx23.configs import Shapes, checkpoint_configs, upsampler_config
from ltxpack.ltx23.expected import inventory

NAME = "LTX-2.3 22B"
TEXT_ENCODER = "text_encoder"
# The rows of modulation are float32 in the published checkpoint, everything else bfloat16.
FLOAT32_TENSORS = "scale_shift_table"
VIDEO, AUDIO, TEXT = 4096, 2048, 3840
TEXT_LAYERS, REGISTERS = 48, 128

TRANSFORMER: dict[str, Any] = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "apply_gated_attention": True,
    "attention_bias": True,
    "attention_head_dim": 128,
    "attention_type": "default",
    "audio_attention_head_dim": 64,
    "audio_connector_attention_head_dim": 64,
    "audio_connector_num_attention_heads": 32,
    "audio_cross_attention_dim": AUDIO,
    "audio_num_attention_heads": 32,
    "audio_out_channels": 128,
    "audio_positional_embedding_max_pos": [20],
    "av_ca_timestep_scale_multiplier": 1000.0,
    "av_cross_ada_norm": True,
    "caption_channels": TEXT,
    "caption_proj_before_connector": True,
    "caption_proj_input_norm": False,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "causal_temporal_positioning": True,
    "connector_apply_gated_attention": True,
    "connector_attention_head_dim": 128,
    "connector_learnable_registers_std": 1,
    "connector_norm_output": True,
    "connector_num_attention_heads": 32,
    "connector_num_layers": 8,
    "connector_num_learnable_registers": REGISTERS,
    "connector_positional_embedding_max_pos": [4096],
    "cross_attention_adaln": True,
    "cross_attention_dim": VIDEO,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "frequencies_precision": "float64",
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "num_attention_heads": 32,
    "num_embeds_ada_norm": 1000,
    "num_layers": 48,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 128,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "positional_embedding_theta": 10000.0,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "rope_type": "split",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "text_encoder_norm_type": "per_token_rms",
    "timestep_scale_multiplier": 1000,
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_embeddings_connector": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}


def blocks(text: str) -> list[list[Any]]:
    """``res_x:1 compress_space:2`` as the official lists spell it."""
    pairs = (word.split(":") for word in text.split())
    return [[kind, {"num_layers" if kind == "res_x" else "multiplier": int(count)}] for kind, count in pairs]


VAE: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "causal_decoder": False,
    "decoder_base_channels": 128,
    "decoder_blocks": blocks(
        "res_x:4 compress_space:2 res_x:6 compress_time:2 res_x:4 compress_all:1 res_x:2 compress_all:2 res_x:2"
    ),
    "dims": 3,
    "encoder_base_channels": 128,
    "encoder_blocks": blocks(
        "res_x:4 compress_space_res:2 res_x:6 compress_time_res:2 res_x:4 "
        "compress_all_res:2 res_x:2 compress_all_res:1 res_x:2"
    ),
    "in_channels": 3,
    "latent_channels": 128,
    "latent_log_var": "uniform",
    "norm_layer": "pixel_norm",
    "normalize_latent_channels": False,
    "out_channels": 3,
    "patch_size": 4,
    "scaling_factor": 1.0,
    "spatial_padding_mode": "zeros",
    "timestep_conditioning": False,
    "use_quant_conv": False,
}
AUDIO_VAE: dict[str, Any] = {
    "model": {
        "params": {
            "ddconfig": {
                "attn_resolutions": [],
                "causality_axis": "height",
                "ch": 128,
                "ch_mult": [1, 2, 4],
                "double_z": True,
                "downsample_time": False,
                "dropout": 0.0,
                "in_channels": 2,
                "mel_bins": 64,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "num_res_blocks": 2,
                "out_ch": 2,
                "resolution": 256,
                "z_channels": 8,
            },
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {
        "audio": {
            "causal_padding": 3,
            "duration": 5.12,
            "max_wav_value": 32768.0,
            "sampling_rate": 16000,
            "stereo": True,
        },
        "mel": {"mel_fmax": 8000, "mel_fmin": 0, "n_mel_channels": 64},
        "stft": {"causal": True, "filter_length": 1024, "hop_length": 160, "win_length": 1024},
    },
}
_GENERATOR: dict[str, Any] = {
    "activation": "snakebeta",
    "resblock": "AMP1",
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "resblock_kernel_sizes": [3, 7, 11],
    "stereo": True,
    "use_bias_at_final": False,
    "use_tanh_at_final": False,
}
VOCODER: dict[str, Any] = {
    "bwe": {
        **_GENERATOR,
        "apply_final_activation": False,
        "hop_length": 80,
        "input_sampling_rate": 16000,
        "n_fft": 512,
        "num_mels": 64,
        "output_sampling_rate": 48000,
        "upsample_initial_channel": 512,
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "upsample_rates": [6, 5, 2, 2, 2],
        "win_size": 512,
    },
    "vocoder": {
        **_GENERATOR,
        "upsample_initial_channel": 1536,
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        "upsample_rates": [5, 2, 2, 2, 2, 2],
    },
}
CONFIG: dict[str, dict[str, Any]] = {
    "audio_vae": AUDIO_VAE,
    "scheduler": {"_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000, "sampler": "LinearQuadratic"},
    "transformer": TRANSFORMER,
    "vae": VAE,
    "vocoder": VOCODER,
}
UPSAMPLER = {
    "_class_name": "LatentUpsampler",
    "dims": 3,
    "in_channels": 128,
    "mid_channels": 1024,
    "num_blocks_per_stage": 4,
    "rational_resampler": False,
    "spatial_scale": 2.0,
    "spatial_upsample": True,
    "temporal_upsample": False,
}
# Gemma 3 12B's language model; its vision tower is not counted.
GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "hidden_size": TEXT,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_hidden_layers": TEXT_LAYERS,
    "num_key_value_heads": 8,
    "vocab_size": 262208,
}


def published_configs() -> dict[str, dict[str, Any]]:
    """The diffusers config of every component."""
    features = TEXT * (TEXT_LAYERS + 1)
    stated: Shapes = {
        "text_embedding_projection.video_aggregate_embed.weight": (VIDEO, features),
        "text_embedding_projection.audio_aggregate_embed.weight": (AUDIO, features),
        "model.diffusion_model.video_embeddings_connector.learnable_registers": (REGISTERS, VIDEO),
        "model.diffusion_model.audio_embeddings_connector.learnable_registers": (REGISTERS, AUDIO),
    }
    configs = checkpoint_configs(CONFIG, stated, NAME)
    configs["latent_upsampler"] = upsampler_config(UPSAMPLER, VAE["latent_channels"], NAME)
    return {**configs, TEXT_ENCODER: {"text_config": GEMMA}}


def published_tensors(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """By component: name, stored dtype and shape of every tensor of an overlay of it."""
    components = [name for name in configs if name not in ("scheduler", TEXT_ENCODER)]
    tensors = {
        name: [(tensor, _dtype(name, tensor), shape) for tensor, shape in inventory(name, configs[name]).items()]
        for name in components
    }
    tensors[TEXT_ENCODER] = [(name, "BF16", shape) for name, shape in _gemma()]
    return tensors


def _dtype(component: str, tensor: str) -> str:
    return "F32" if component == "transformer" and tensor.endswith(FLOAT32_TENSORS) else "BF16"


def _gemma() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The language model's tensors."""
    inner, own = GEMMA["intermediate_size"], GEMMA["num_attention_heads"] * GEMMA["head_dim"]
    shared = GEMMA["num_key_value_heads"] * GEMMA["head_dim"]
    layer = {
        "self_attn.q_proj": (own, TEXT),
        "self_attn.k_proj": (shared, TEXT),
        "self_attn.v_proj": (shared, TEXT),
        "self_attn.o_proj": (TEXT, own),
        "self_attn.q_norm": (GEMMA["head_dim"],),
        "self_attn.k_norm": (GEMMA["head_dim"],),
        "mlp.gate_proj": (inner, TEXT),
        "mlp.up_proj": (inner, TEXT),
        "mlp.down_proj": (TEXT, inner),
        "input_layernorm": (TEXT,),
        "post_attention_layernorm": (TEXT,),
        "pre_feedforward_layernorm": (TEXT,),
        "post_feedforward_layernorm": (TEXT,),
    }
    yield f"{TEXT_ROOT}embed_tokens.weight", (GEMMA["vocab_size"], TEXT)
    for number in range(TEXT_LAYERS):
        for module, shape in layer.items():
            yield f"{TEXT_ROOT}layers.{number}.{module}.weight", shape
    yield f"{TEXT_ROOT}norm.weight", (TEXT,)
