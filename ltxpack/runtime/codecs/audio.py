"""Audio latents to a waveform: audio VAE to a log-mel spectrogram, vocoder with bandwidth extension to sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltxpack.runtime.torch_settings import exact_float32
from ltxpack.runtime.weights.load import Reader, build_on_meta, load_component, load_module, read_config

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTX2Audio
    from diffusers.pipelines.ltx2 import LTX2VocoderWithBWE


def load_audio_vae(
    folder: Path, device: torch.device, dtype: torch.dtype | None, reader: Reader | None = None
) -> AutoencoderKLLTX2Audio:
    """The audio VAE of an overlay's ``audio_vae/``. Raises as ``load_component``."""
    from diffusers import AutoencoderKLLTX2Audio

    return load_component(AutoencoderKLLTX2Audio, folder, device, dtype, reader=reader)


def load_vocoder(
    folder: Path, device: torch.device, dtype: torch.dtype, reader: Reader | None = None
) -> LTX2VocoderWithBWE:
    """The vocoder of ``vocoder/``: weights rounded to ``dtype``, arithmetic always float32 (spec 06, section 6).

    Raises as :func:`ltxpack.runtime.weights.load.load_module`.
    """
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE, UpSample1d

    config = read_config(folder, LTX2VocoderWithBWE.__name__)
    with _filters_by_shape():
        module = build_on_meta(LTX2VocoderWithBWE, config, folder)
    ratio = module.config.output_sampling_rate // module.config.input_sampling_rate
    resampler = UpSample1d(ratio, window_type="hann", persistent=False)
    return load_module(module, folder, device, dtype, {"resampler.filter": resampler.filter}, reader).float()


@cache
def _filter() -> Callable[[float, float, int], Tensor]:
    """diffusers' own function, which :func:`_filters_by_shape` replaces for a while."""
    from diffusers.pipelines.ltx2 import vocoder

    plain: Callable[[float, float, int], Tensor] = vocoder.kaiser_sinc_filter1d
    return plain


@contextmanager
def _filters_by_shape() -> Iterator[None]:
    """In the block, a filter on the meta device has only a shape; other filters have their values.

    diffusers computes 400 filters as it builds the vocoder. On the meta device torch does so in Python, for seconds.
    """
    from diffusers.pipelines.ltx2 import vocoder

    plain = _filter()

    def made(cutoff: float, half_width: float, kernel_size: int) -> Tensor:
        on_meta = torch.get_default_device().type == "meta"
        return torch.empty(kernel_size) if on_meta else plain(cutoff, half_width, kernel_size)

    vocoder.kaiser_sinc_filter1d = made
    try:
        yield
    finally:
        vocoder.kaiser_sinc_filter1d = plain


@torch.no_grad()
@exact_float32()
def decode_mel(audio_vae: AutoencoderKLLTX2Audio, latents: Tensor) -> Tensor:
    """The log-mel spectrogram ``[1, 2, 4 Ta - 3, 64]`` of normalised ``latents`` ``[1, 8, Ta, 16]``, same dtype.

    The statistics belong to the token layout, feature = channel * 16 + bin.
    """
    _, channels, _, bins = latents.shape
    tokens = latents.transpose(1, 2).flatten(2)
    tokens = tokens * audio_vae.latents_std.to(tokens) + audio_vae.latents_mean.to(tokens)
    return audio_vae.decode(tokens.unflatten(2, (channels, bins)).transpose(1, 2), return_dict=False)[0]


@torch.no_grad()
@exact_float32()
def decode_audio(audio_vae: AutoencoderKLLTX2Audio, vocoder: LTX2VocoderWithBWE, latents: Tensor) -> Tensor:
    """The waveform ``[2, N]`` float32 in [-1, 1] of normalised ``latents`` ``[1, 8, Ta, 16]``.

    N is ``(4 Ta - 3) * 160 * 3`` samples at :func:`sample_rate`. The vocoder runs in float32; its result is rounded to
    the dtype of ``latents``, as in the official pipeline.
    """
    mel = decode_mel(audio_vae, latents)
    waveform = vocoder(mel.float())
    return waveform[0].to(latents.dtype).float()


def sample_rate(vocoder: LTX2VocoderWithBWE) -> int:
    """Samples per second of ``vocoder``'s sound."""
    return int(vocoder.config.output_sampling_rate)
