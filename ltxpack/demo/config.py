"""The configs of the demo's checkpoint: the published ones in tiny widths. Only data."""

from __future__ import annotations

from typing import Any

from ltxpack.ltx23.published import published_files

HEADS, HEAD_DIM, AUDIO_HEAD_DIM = 4, 16, 8
TEXT_WIDTH, TEXT_LAYERS = 32, 4
REGISTERS = 128
_PUBLISHED = published_files()


def blocks(text: str) -> list[list[Any]]:
    """``res_x:1 compress_space:2`` as the official lists spell it."""
    pairs = (word.split(":") for word in text.split())
    return [[kind, {"num_layers" if kind == "res_x" else "multiplier": int(count)}] for kind, count in pairs]


CONFIG: dict[str, Any] = _PUBLISHED["checkpoint"]
CONFIG["transformer"].update(
    attention_head_dim=HEAD_DIM,
    audio_attention_head_dim=AUDIO_HEAD_DIM,
    audio_connector_attention_head_dim=AUDIO_HEAD_DIM,
    audio_connector_num_attention_heads=HEADS,
    audio_cross_attention_dim=HEADS * AUDIO_HEAD_DIM,
    audio_num_attention_heads=HEADS,
    caption_channels=TEXT_WIDTH,
    connector_attention_head_dim=HEAD_DIM,
    connector_num_attention_heads=HEADS,
    connector_num_layers=2,
    cross_attention_dim=HEADS * HEAD_DIM,
    num_attention_heads=HEADS,
    num_layers=2,
)
CONFIG["vae"].update(
    decoder_base_channels=8,
    decoder_blocks=blocks(
        "res_x:1 compress_space:2 res_x:1 compress_time:2 res_x:1 compress_all:1 res_x:1 compress_all:2 res_x:1"
    ),
    encoder_blocks=blocks(
        "res_x:1 compress_space_res:1 res_x:0 compress_time_res:1 res_x:0 "
        "compress_all_res:1 res_x:0 compress_all_res:1 res_x:1"
    ),
)
CONFIG["audio_vae"]["model"]["params"]["ddconfig"].update(ch_mult=[1, 1, 1], num_res_blocks=1)
CONFIG["vocoder"]["vocoder"].update(upsample_initial_channel=64)
CONFIG["vocoder"]["bwe"].update(upsample_initial_channel=64)
UPSAMPLER = {**_PUBLISHED["upsampler"], "mid_channels": 32, "num_blocks_per_stage": 1}
GEMMA = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 7,
    "dtype": "bfloat16",
    "eoi_token_index": 8,
    "eos_token_id": [1, 6],
    "image_token_index": 9,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 4,
    "model_type": "gemma3",
    "text_config": {
        "attention_bias": False,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "max_position_embeddings": 131072,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": TEXT_LAYERS,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 8,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000.0,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "vocab_size": 272,
    },
    "vision_config": {
        "hidden_size": 16,
        "image_size": 28,
        "intermediate_size": 32,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 7,
    },
}
SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
