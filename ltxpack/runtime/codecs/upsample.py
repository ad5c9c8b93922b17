"""The latent upsampler between the two stages: twice the height and width in latent space (spec 05, section 6)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel
from torch import Tensor, nn

from ltxpack.errors import UsageError
from ltxpack.runtime.codecs.video import LatentStatistics
from ltxpack.runtime.torch_settings import exact_float32
from ltxpack.runtime.weights.load import Reader, load_component


def load_upsampler(
    folder: Path, device: torch.device, dtype: torch.dtype, reader: Reader | None = None
) -> LTX2LatentUpsamplerModel:
    """The upsampler of ``latent_upsampler/``. Raises as :func:`ltxpack.runtime.weights.load.load_module`."""
    return load_component(LTX2LatentUpsamplerModel, folder, device, dtype, reader=reader)


@torch.no_grad()
@exact_float32()
def upsample(upsampler: LTX2LatentUpsamplerModel, statistics: LatentStatistics, latents: Tensor) -> Tensor:
    """Normalised latents ``[1, C, f, h, w]`` to normalised latents ``[1, C, f, 2h, 2w]``, same dtype.

    The network works on plain latents, so the video VAE's statistics are taken out and put back. Raises UsageError for
    a single latent where the network is too narrow for one.
    """
    _check_size(upsampler, latents)
    return statistics.normalise(upsampler(statistics.denormalise(latents)))


def _check_size(upsampler: LTX2LatentUpsamplerModel, latents: Tensor) -> None:
    """A group of one value has no variance: met by networks as narrow as the demo's, at their smallest picture."""
    norms = [module for module in upsampler.modules() if isinstance(module, nn.GroupNorm)]
    if latents[0, 0].numel() == 1 and any(norm.num_channels == norm.num_groups for norm in norms):
        raise UsageError(
            "too small a video for the upsampler of this checkpoint, which normalises each channel by itself",
            expected="more than 1 latent in stage 1",
            found="1: one frame of 64x64",
            next="choose a larger --height, --width or --num-frames",
        )
