"""The samplers, on video and audio as one value: res_2s (exponential Runge-Kutta with SDE noise) and Euler.

In k-diffusion's shape: the denoiser, the schedule and the first state come in as arguments, so a test can pass a
closed form. Knows no model, no guidance and no prompts. Latents between evaluations are in the model dtype; the
arithmetic of a res_2s step is fp64 (spec 05, section 4), that of an Euler step fp32 (spec 08, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ltxpack.runtime.sampling.conditioning import LatentState, post
from ltxpack.runtime.sampling.recipes import EULER, RES2S
from ltxpack.runtime.sampling.schedule import (
    REFINE_ITERATIONS,
    STEP_NOISE_SEED,
    SUBSTEP_NOISE_SEED,
    Renoise,
    Step,
    res2s_plan,
)
from ltxpack.runtime.sampling.shape import AV

Denoise = Callable[[AV[Tensor], Tensor], AV[Tensor]]
OnStep = Callable[[int, int], None]


class NoiseSource:
    """Endless fp64 noise, each draw normalised; ``like`` gives the token shape [1, T, C] of a draw."""

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def draw(self, like: Tensor) -> Tensor:
        """The next draw: to mean 0 and deviation 1 over everything, then again over (T, C)."""
        generator = self.generator
        noise = torch.randn(like.shape, dtype=torch.float64, device=generator.device, generator=generator)
        noise = (noise - noise.mean()) / noise.std()
        return (noise - noise.mean(dim=(-2, -1), keepdim=True)) / noise.std(dim=(-2, -1), keepdim=True)


def inject(start: Tensor, end: Tensor, noise: Tensor, renoise: Renoise) -> Tensor:
    """``end`` with part of its noise replaced by fresh ``noise``; ``start`` is where the step began. All fp64."""
    direction = (start - end) / renoise.gap
    x0 = start - renoise.sigma * direction
    return renoise.alpha * (x0 + renoise.down * direction) + renoise.up * noise


def refine(middle: Tensor, x0: Tensor, anchor: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(anchor, direction) moved until ``middle`` lies ``scale`` along the direction from the anchor to ``x0``."""
    direction = x0 - anchor
    for _ in range(REFINE_ITERATIONS):
        anchor = middle - scale * direction
        direction = x0 - anchor
    return anchor, direction


@dataclass(frozen=True)
class _Middle:
    """One modality half-way through a step, all fp64: the (refined) anchor, its direction, the noised middle."""

    anchor: Tensor
    direction: Tensor
    middle: Tensor


def _first_half(latents: Tensor, x0: Tensor, noise: Tensor, state: LatentState, step: Step) -> _Middle:
    anchor, target = latents.double(), x0.double()
    direction = target - anchor
    middle = anchor + (step.h * step.a) * direction
    middle = post(inject(anchor, middle, noise, step.to_middle), state)
    if step.refine:
        anchor, direction = refine(middle, target, anchor, step.h * step.a)
    return _Middle(anchor, direction, middle)


def _second_half(half: _Middle, x0: Tensor, noise: Tensor, state: LatentState, step: Step) -> Tensor:
    end = half.anchor + step.h * (step.b1 * half.direction + step.b2 * (x0.double() - half.anchor))
    return post(inject(half.anchor, end, noise, step.to_target), state)


def res2s(denoise: Denoise, state: AV[LatentState], sigmas: Tensor, *, on_step: OnStep | None = None) -> AV[Tensor]:
    """The denoised tokens [1, T, C], appended keyframe tokens included, in the dtype of ``state``'s latents.

    ``denoise(latents, sigma)`` gives x0 before blending with the clean tokens; sigma is [1], fp32 at the start of a
    step and fp64 half-way. ``sigmas`` fp32 [n + 1] falls strictly; if it ends in 0 one evaluation at 0.0011 ends the
    run: 2n + 1 in all. SDE noise has its own fixed seeds and is drawn on the latents' device.
    ``on_step(done, n)`` is called after each step. Inside the loop nothing waits for the device.
    """
    latents = state.map(lambda s: s.latents)
    device, dtype = latents.video.device, latents.video.dtype
    plan = res2s_plan(sigmas)
    levels = [_on(device, step.sigma, torch.float32) for step in plan.steps]
    middles = [_on(device, step.middle, torch.float64) for step in plan.steps]
    terminal = None if plan.terminal is None else _on(device, plan.terminal, torch.float32)
    step_noise = NoiseSource(STEP_NOISE_SEED, device)
    substep_noise = NoiseSource(SUBSTEP_NOISE_SEED, device)

    def x0(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        return denoise(latents, sigma).map(post, state)

    for i, step in enumerate(plan.steps):
        first = x0(latents, levels[i])
        noise = latents.map(substep_noise.draw)
        half = latents.map(partial(_first_half, step=step), first, noise, state)
        second = x0(half.map(lambda h: h.middle.to(dtype)), middles[i])
        noise = latents.map(step_noise.draw)
        end = half.map(partial(_second_half, step=step), second, noise, state)
        latents = end.map(lambda tokens: tokens.to(dtype))
        if i == len(plan.steps) - 1 and terminal is not None:
            latents = x0(latents, terminal)
        if on_step is not None:
            on_step(i + 1, len(plan.steps))
    return latents


def euler(denoise: Denoise, state: AV[LatentState], sigmas: Tensor, *, on_step: OnStep | None = None) -> AV[Tensor]:
    """The denoised tokens as :func:`res2s`, by Euler steps: one evaluation each, no noise (spec 08, section 4).

    The velocity is rounded to the dtype of the latents before the step is taken.
    """
    latents = state.map(lambda s: s.latents)
    sigmas = sigmas.to("cpu", torch.float32)
    levels = [_on(latents.video.device, sigma, torch.float32) for sigma in sigmas.tolist()]
    gaps = (sigmas[1:] - sigmas[:-1]).tolist()
    for i, gap in enumerate(gaps):
        x0 = denoise(latents, levels[i]).map(post, state)
        velocity = latents.map(partial(_velocity, sigma=float(sigmas[i])), x0)
        latents = latents.map(lambda x, v, gap=gap: (x.float() + v.float() * gap).to(x.dtype), velocity)
        if on_step is not None:
            on_step(i + 1, len(gaps))
    return latents


def _velocity(latents: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """The velocity of ``latents`` at ``sigma``, in their dtype."""
    return ((latents.float() - x0.float()) / sigma).to(latents.dtype)


def _on(device: torch.device, value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([value], dtype=dtype, device=device)


# The sampler's name in a stage of a recipe -> the sampler.
SAMPLERS: dict[str, Callable[..., AV[Tensor]]] = {RES2S: res2s, EULER: euler}
