"""The latent upsampler between the two stages: twice the height and width in latent space (spec 05, section 6)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel
from torch import Tensor

from ltxpack.runtime.codecs.video import LatentStatistics
from ltxpack.runtime.load import Reader, load_component


def load_upsampler(
    folder: Path, device: torch.device, dtype: torch.dtype, reader: Reader | None = None
) -> LTX2LatentUpsamplerModel:
    """The upsampler of ``latent_upsampler/``. Raises as :func:`ltxpack.runtime.load.load_module`."""
    return load_component(LTX2LatentUpsamplerModel, folder, device, dtype, reader=reader)


@torch.no_grad()
def upsample(upsampler: LTX2LatentUpsamplerModel, statistics: LatentStatistics, latents: Tensor) -> Tensor:
    """Normalised latents ``[1, C, f, h, w]`` to normalised latents ``[1, C, f, 2h, 2w]``, same dtype.

    The network works on plain latents, so the video VAE's statistics are taken out and put back.
    """
    return statistics.normalise(upsampler(statistics.denormalise(latents)))
