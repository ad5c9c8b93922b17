"""Between latents and what is seen and heard: video VAE, audio VAE with vocoder, latent upsampler.

The networks are diffusers' modules; the tiling, the latent statistics and the dtypes are ours (spec 06,
sections 5 and 6; spec 05, section 6). Knows no file format of pictures, video or sound.
"""

from ltxpack.runtime.codecs.audio import decode_audio, load_audio_vae, load_vocoder, sample_rate
from ltxpack.runtime.codecs.tiling import Cut, Tiling, auto_tiling
from ltxpack.runtime.codecs.upsample import load_upsampler, upsample
from ltxpack.runtime.codecs.video import (
    LatentStatistics,
    VideoVAE,
    channels_last,
    decode_video,
    encode_image,
    fast_tiling,
    load_video_vae,
)

__all__ = [
    "Cut",
    "LatentStatistics",
    "Tiling",
    "VideoVAE",
    "auto_tiling",
    "channels_last",
    "decode_audio",
    "decode_video",
    "encode_image",
    "fast_tiling",
    "load_audio_vae",
    "load_upsampler",
    "load_video_vae",
    "load_vocoder",
    "sample_rate",
    "upsample",
]
