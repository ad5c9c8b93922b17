"""Shapes, token layout, positions, the first noise, and images as conditions (spec 04).

Knows no model, no sampler and no VAE: images arrive here as normalised latents. Inside the sampling code video and
audio are tokens [1, T, C]; outside they are [1, 128, f, h, w] and [1, 8, Ta, 16].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ltxpack.ltx23.classes import AUDIO_FACTOR, SPATIAL_FACTOR, TEMPORAL_FACTOR
from ltxpack.runtime.sampling.shape import AUDIO_BINS, AUDIO_CHANNELS, AUDIO_HOP, AUDIO_SAMPLE_RATE, AV, VideoShape


def patchify(latents: AV[Tensor]) -> AV[Tensor]:
    """[1, 128, f, h, w] and [1, 8, Ta, 16] to tokens [1, f·h·w, 128] (f outermost) and [1, Ta, 8·16] (c outer)."""
    return AV(patchify_video(latents.video), latents.audio.transpose(1, 2).flatten(2))


def patchify_video(latents: Tensor) -> Tensor:
    """[B, C, f, h, w] to [B, f·h·w, C]."""
    return latents.flatten(2).transpose(1, 2)


def unpatchify(tokens: AV[Tensor], shape: VideoShape) -> AV[Tensor]:
    """Tokens back to [1, 128, f, h, w] and [1, 8, Ta, 16]; appended keyframe tokens are dropped."""
    video = tokens.video[:, : shape.tokens].transpose(1, 2).unflatten(2, shape.grid)
    audio = tokens.audio.unflatten(2, (AUDIO_CHANNELS, AUDIO_BINS)).transpose(1, 2)
    return AV(video.contiguous(), audio.contiguous())


def positions(shape: VideoShape) -> AV[Tensor]:
    """The bounds of each token, fp32 on the CPU (spec 04, section 2).

    Video [1, 3, f·h·w, 2]: seconds, then rows and columns in pixels. Audio [1, 1, Ta, 2]: seconds. The first latent
    frame is one pixel frame long and the others eight; likewise the first audio latent is shorter.
    """
    f, h, w = shape.grid
    time = (_bounds(f, TEMPORAL_FACTOR) + (1 - TEMPORAL_FACTOR)).clamp(min=0) / shape.fps
    video = _grid_bounds(time, _bounds(h, SPATIAL_FACTOR), _bounds(w, SPATIAL_FACTOR))
    audio = (_bounds(shape.audio_length, AUDIO_FACTOR) + (1 - AUDIO_FACTOR)).clamp(min=0)
    return AV(video, (audio * AUDIO_HOP / AUDIO_SAMPLE_RATE)[None, None])


def _bounds(count: int, size: int) -> Tensor:
    """[count, 2] fp32: [i·size, (i + 1)·size]."""
    start = torch.arange(count, dtype=torch.float32) * size
    return torch.stack([start, start + size], dim=-1)


def _grid_bounds(time: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[1, 3, f·h·w, 2] from the bounds [n, 2] along each axis."""
    sizes = (len(time), len(rows), len(columns))
    axes = (time[:, None, None], rows[None, :, None], columns[None, None, :])
    return torch.stack([axis.expand(*sizes, 2).flatten(0, 2) for axis in axes])[None]


@dataclass(frozen=True)
class ImageItem:
    """An image as a condition: at pixel frame ``frame``, held with ``strength`` in [0, 1].

    ``latents`` [1, 128, 1, h, w] are VAE-encoded, normalised and of the stage's size. :class:`.request.ImageSpec` has
    checked frame and strength.
    """

    frame: int
    strength: float
    latents: Tensor


@dataclass(frozen=True)
class LatentState:
    """One modality as it enters a sampler.

    ``latents`` and ``clean`` [1, T, C] in the model dtype, ``mask`` fp32 [1, T, 1] (1: denoise, 0: keep clean),
    ``positions`` fp32 [1, axes, T, 2]. ``mask_values`` fp32 [K] are the distinct values in the mask and
    ``mask_index`` int64 [T] says which one a token has (None if K is 1). The host computes both when it makes the
    state, so that no sampling loop waits for the device.
    """

    latents: Tensor
    clean: Tensor
    mask: Tensor
    positions: Tensor
    mask_values: Tensor
    mask_index: Tensor | None


class _Draft(NamedTuple):
    """A state being built on the host: latents and clean on the device, mask and positions on the CPU."""

    latents: Tensor
    clean: Tensor
    mask: Tensor
    positions: Tensor


def initial_state(
    shape: VideoShape,
    initial: AV[Tensor] | None,
    images: Sequence[ImageItem],
    noise_scale: float,
    generator: torch.Generator,
    device: torch.device | str,
    dtype: torch.dtype,
) -> AV[LatentState]:
    """The noised state of a stage (spec 04, sections 3 and 6).

    ``initial`` are latents [1, 128, f, h, w] and [1, 8, Ta, 16], or None for zeros; ``noise_scale`` is 1 in stage 1
    and the first sigma in stage 2. Noise is drawn from ``generator`` on its own device, video first, in token
    layout and in ``dtype``, appended keyframe tokens included.
    """
    if initial is None:
        initial = shape.latent_shapes.map(lambda size: torch.zeros(size, dtype=dtype))
    tokens = patchify(initial).map(lambda latents: latents.to(device, dtype).contiguous())
    expected = AV(shape.tokens, shape.audio_length)
    if (found := tokens.map(lambda latents: latents.shape[1])) != expected:
        raise ValueError(f"latents of {found} tokens for a video of {expected}")
    drafts = tokens.map(
        lambda latents, where: _Draft(latents, latents, torch.ones(1, latents.shape[1], 1), where), positions(shape)
    )
    if images:
        drafts = AV(_with_images(drafts.video, images, shape), drafts.audio)
    return drafts.map(lambda draft: _noised(draft, noise_scale, generator))


def _with_images(draft: _Draft, images: Sequence[ImageItem], shape: VideoShape) -> _Draft:
    """``draft`` with each image as its first frame (frame 0), or appended as a keyframe (any other)."""
    count, (_, h, w) = shape.tokens_per_frame, shape.grid
    clean, keyframes = draft.clean.clone(), []
    for item in images:
        tokens = patchify_video(item.latents).to(clean)
        if tokens.shape[1] != count:
            raise ValueError(f"an image of {tokens.shape[1]} tokens in a video of {count} per frame")
        if item.frame == 0:
            clean[:, :count], draft.mask[:, :count] = tokens, 1 - item.strength
            continue
        # The official code makes this mask in the model dtype: in bf16 a strength of 0.7 leaves 0.3008.
        mask = torch.full((1, count, 1), 1 - item.strength, dtype=tokens.dtype).float()
        time = torch.tensor([[item.frame, item.frame + 1]], dtype=torch.float32) / shape.fps
        where = _grid_bounds(time, _bounds(h, SPATIAL_FACTOR), _bounds(w, SPATIAL_FACTOR))
        keyframes.append(_Draft(torch.zeros_like(tokens), tokens, mask, where))
    parts = zip(draft._replace(clean=clean), *keyframes, strict=True)
    return _Draft(*(torch.cat(each, dim=dim) for each, dim in zip(parts, (1, 1, 1, 2), strict=True)))


def _noised(draft: _Draft, noise_scale: float, generator: torch.Generator) -> LatentState:
    dtype, device = draft.latents.dtype, draft.latents.device
    noise = torch.randn(draft.latents.shape, dtype=dtype, device=generator.device, generator=generator).to(device)
    mask = draft.mask.to(device)
    latents = torch.lerp(draft.latents.float(), noise.float(), noise_scale)
    latents = torch.lerp(draft.clean.float(), latents, mask).to(dtype)
    values, index = torch.unique(draft.mask.flatten(), return_inverse=True)
    return LatentState(
        latents=latents,
        clean=draft.clean,
        mask=mask,
        positions=draft.positions.to(device),
        mask_values=values.to(device),
        mask_index=index.to(device) if len(values) > 1 else None,
    )


def post(x0: Tensor, state: LatentState) -> Tensor:
    """``x0`` [1, T, C] with kept tokens put back: x0·mask + clean·(1 − mask), in x0's dtype (spec 04, section 7)."""
    return (x0 * state.mask + state.clean.float() * (1 - state.mask)).to(x0.dtype)
