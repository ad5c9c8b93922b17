"""The configs of made-up checkpoints: the published ones with other widths and depths. Only data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ltxpack.ltx23.published import published_files

TEXT_WIDTH, TEXT_LAYERS = 32, 4
REGISTERS = 128


@dataclass(frozen=True)
class StreamWidths:
    """Attention heads and channels per head of the transformer's video and audio stream."""

    heads: int
    head_dim: int
    audio_head_dim: int


DEMO = StreamWidths(heads=4, head_dim=16, audio_head_dim=8)
PUBLISHED = StreamWidths(heads=32, head_dim=128, audio_head_dim=64)


def blocks(text: str) -> list[list[Any]]:
    """``res_x:1 compress_space:2`` as the official lists spell it."""
    pairs = (word.split(":") for word in text.split())
    return [[kind, {"num_layers" if kind == "res_x" else "multiplier": int(count)}] for kind, count in pairs]


def checkpoint_config(widths: StreamWidths = DEMO, layers: int = 2, connector_layers: int = 2) -> dict[str, Any]:
    """The official config of a checkpoint with this transformer; all other components have the smallest sizes."""
    config: dict[str, Any] = published_files()["checkpoint"]
    config["transformer"].update(caption_channels=TEXT_WIDTH, num_layers=layers, connector_num_layers=connector_layers)
    for prefix, head_dim in (("", widths.head_dim), ("audio_", widths.audio_head_dim)):
        config["transformer"].update(
            {
                f"{prefix}num_attention_heads": widths.heads,
                f"{prefix}attention_head_dim": head_dim,
                f"{prefix}cross_attention_dim": widths.heads * head_dim,
                f"{prefix}connector_num_attention_heads": widths.heads,
                f"{prefix}connector_attention_head_dim": head_dim,
            }
        )
    config["vae"].update(
        decoder_base_channels=8,
        decoder_blocks=blocks(
            "res_x:1 compress_space:2 res_x:1 compress_time:2 res_x:1 compress_all:1 res_x:1 compress_all:2 res_x:1"
        ),
        encoder_blocks=blocks(
            "res_x:1 compress_space_res:1 res_x:0 compress_time_res:1 res_x:0 "
            "compress_all_res:1 res_x:0 compress_all_res:1 res_x:1"
        ),
    )
    config["audio_vae"]["model"]["params"]["ddconfig"].update(ch_mult=[1, 1, 1], num_res_blocks=1)
    for generator in ("vocoder", "bwe"):
        config["vocoder"][generator].update(
            upsample_initial_channel=64, resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3], [1]]
        )
    return config


UPSAMPLER: dict[str, Any] = {**published_files()["upsampler"], "mid_channels": 32, "num_blocks_per_stage": 1}
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "dtype": "bfloat16",
    "boi_token_index": 7, "eoi_token_index": 8, "image_token_index": 9, "eos_token_id": [1, 6],
    "initializer_range": 0.02, "mm_tokens_per_image": 4,
    "text_config": {
        "model_type": "gemma3_text", "vocab_size": 272, "pad_token_id": 0, "max_position_embeddings": 131072,
        "hidden_size": TEXT_WIDTH, "intermediate_size": 64, "num_hidden_layers": TEXT_LAYERS, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False, "query_pre_attn_scalar": 8,
        "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "sliding_window": 16, "sliding_window_pattern": 2, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    },
}  # fmt: skip
SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
