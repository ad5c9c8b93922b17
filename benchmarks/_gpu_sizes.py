"""What benchmarks/gpu.py measures at: the configs of LTX-2.3 (spec 01, section 5), and tiny ones for a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ltxpack.runtime.parallel.schemes import Lengths
from ltxpack.runtime.sampling.shape import VideoShape

Config = Mapping[str, Any]

# Fields in which LTX-2.3 differs from what diffusers takes when they are absent.
TRANSFORMER: Config = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "rope_type": "split",
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
VAE: Config = {
    "block_out_channels": (256, 512, 1024, 1024),
    "decoder_block_out_channels": (256, 512, 512, 1024),
    "layers_per_block": (4, 6, 4, 2, 2),
    "decoder_layers_per_block": (4, 6, 4, 2, 2),
    "spatio_temporal_scaling": (True, True, True, True),
    "decoder_spatio_temporal_scaling": (True, True, True, True),
    "decoder_inject_noise": (False, False, False, False, False),
    "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
    "upsample_residual": (False, False, False, False),
    "upsample_factor": (2, 2, 1, 2),
    "decoder_causal": False,
    "decoder_spatial_padding_mode": "zeros",
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
UPSAMPLER: Config = {"use_rational_resampler": False}
VOCODER: Config = {"final_act_fn": "clamp"}
AUDIO_VAE: Config = {}


@dataclass(frozen=True)
class Sizes:
    """Configs, the video that is made, and the sides of the matrix product and bytes of the copy measured beside.

    The overlay on the disk holds ``kept_blocks`` of the widths that ``kept_widths`` names in _checkpoint; ``modes``:
    the residency modes that are gone through.
    """

    transformer: Config
    vae: Config
    audio_vae: Config
    vocoder: Config
    upsampler: Config
    shape: VideoShape
    steps: int
    text: int
    matrix: int
    copied: int
    kept_blocks: int
    kept_widths: str
    modes: tuple[str, ...]

    def lengths(self, stage: int) -> Lengths:
        """Tokens of a stage."""
        shape = self.shape.divided(2) if stage == 1 else self.shape
        return Lengths(shape.tokens, shape.audio_length, self.text)


REAL = Sizes(
    transformer=TRANSFORMER,
    vae=VAE,
    audio_vae=AUDIO_VAE,
    vocoder=VOCODER,
    upsampler=UPSAMPLER,
    shape=VideoShape(121, 1088, 1920, 24.0),
    steps=15,
    text=1024,
    matrix=8192,
    copied=4 * 2**30,
    kept_blocks=8,
    kept_widths="REAL",
    modes=("resident", "swap", "stream"),
)
TINY = Sizes(
    transformer={
        **TRANSFORMER,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
    },
    vae={
        **VAE,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 16, 16, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    },
    audio_vae={"ch_mult": (1, 1, 1), "num_res_blocks": 1},
    vocoder={**VOCODER, "hidden_channels": 64, "bwe_hidden_channels": 64},
    upsampler={**UPSAMPLER, "mid_channels": 32, "num_blocks_per_stage": 1},
    shape=VideoShape(9, 128, 128, 24.0),
    steps=2,
    text=7,
    matrix=64,
    copied=2**16,
    kept_blocks=2,
    kept_widths="TINY",
    modes=("swap",),
)
