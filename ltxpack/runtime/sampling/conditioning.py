"""Shapes, token layout, positions, the first noise, and images as conditions (spec 04).

Knows no model, no sampler and no VAE: images arrive here as normalised latents. Inside the sampling code video and
audio are tokens [1, T, C]; outside they are [1, 128, f, h, w] and [1, 8, Ta, 16].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    state, so that no sampling loop waits for the device. The first ``kept`` tokens belong to the result.
    """

    latents: Tensor
    clean: Tensor
    mask: Tensor
    positions: Tensor
    mask_values: Tensor
    mask_index: Tensor | None
    kept: int


@dataclass(frozen=True)
class _Draft:
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
    drafts = tokens.map(_draft, positions(shape))
    for item in images:
        drafts = AV(_with_image(drafts.video, item, shape), drafts.audio)
    kept = AV(shape.tokens, shape.audio_length)
    return drafts.map(lambda draft, count: _noised(draft, count, noise_scale, generator), kept)


def _draft(tokens: Tensor, positions: Tensor) -> _Draft:
    if tokens.shape[1] != positions.shape[2]:
        raise ValueError(f"{tokens.shape[1]} tokens, but {positions.shape[2]} positions")
    return _Draft(tokens, tokens, torch.ones(1, tokens.shape[1], 1), positions)


def _with_image(draft: _Draft, item: ImageItem, shape: VideoShape) -> _Draft:
    """``draft`` with the image as first frame (frame 0), or appended as a keyframe (any other)."""
    tokens = patchify_video(item.latents).to(draft.clean)
    if tokens.shape[1] != shape.tokens_per_frame:
        raise ValueError(f"an image of {tokens.shape[1]} tokens in a video of {shape.tokens_per_frame} per frame")
    if item.frame:
        return _keyframe(draft, item, tokens, shape)
    count = tokens.shape[1]
    mask = draft.mask.clone()
    mask[:, :count] = 1 - item.strength
    return replace(draft, clean=torch.cat([tokens, draft.clean[:, count:]], dim=1), mask=mask)


def _keyframe(draft: _Draft, item: ImageItem, tokens: Tensor, shape: VideoShape) -> _Draft:
    _, h, w = shape.grid
    # The official code makes this mask in the model dtype: in bf16 a strength of 0.7 leaves 0.3008.
    mask = torch.full((1, tokens.shape[1], 1), 1 - item.strength, dtype=tokens.dtype).float()
    time = torch.tensor([[item.frame, item.frame + 1]], dtype=torch.float32) / shape.fps
    where = _grid_bounds(time, _bounds(h, SPATIAL_FACTOR), _bounds(w, SPATIAL_FACTOR))
    return _Draft(
        latents=torch.cat([draft.latents, torch.zeros_like(tokens)], dim=1),
        clean=torch.cat([draft.clean, tokens], dim=1),
        mask=torch.cat([draft.mask, mask], dim=1),
        positions=torch.cat([draft.positions, where], dim=2),
    )


def _noised(draft: _Draft, kept: int, noise_scale: float, generator: torch.Generator) -> LatentState:
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
        kept=kept,
    )


def post(x0: Tensor, state: LatentState) -> Tensor:
    """``x0`` [1, T, C] with kept tokens put back: x0·mask + clean·(1 − mask), in x0's dtype (spec 04, section 7)."""
    return (x0 * state.mask + state.clean.float() * (1 - state.mask)).to(x0.dtype)
