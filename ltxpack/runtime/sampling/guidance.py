"""From velocities of the model to one guided x0 per modality (spec 05, section 3).

Decides which passes a setting needs, runs them in the official order, and combines them. Knows neither schedule nor
sampler: a ``Denoiser`` sees one set of latents and one sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ltxpack.runtime.model.model import Pass, Stream
from ltxpack.runtime.sampling.conditioning import LatentState
from ltxpack.runtime.sampling.recipes import COND, ISOLATED, OTHER_PASSES, PERTURBED, UNCOND, Guidance, passes_of
from ltxpack.runtime.sampling.shape import AV


class Model(Protocol):
    """The interface of a transformer for a denoiser."""

    def passes(self, passes: Sequence[Pass], /) -> list[AV[Tensor]]:
        """The velocities of each pass, see :meth:`.model.DiT.passes`."""


ABSENT: AV[Any] = AV(None, None)


def combine(
    guidance: Guidance, cond: Tensor, uncond: Tensor | None, perturbed: Tensor | None, isolated: Tensor | None
) -> Tensor:
    """One guided x0 from the passes' x0 [1, T, C] each; computed in fp32, returned in ``cond``'s dtype.

    ``rescale`` pulls the standard deviation, over all elements and tokens at once, back towards that of ``cond``.
    Raises ValueError if a pass that the guidance needs is missing.
    """
    terms = (
        (UNCOND, guidance.cfg - 1, uncond),
        (PERTURBED, guidance.stg, perturbed),
        (ISOLATED, guidance.modality - 1, isolated),
    )
    base = cond.float()
    guided = base
    for name, scale, other in terms:
        if not guidance.needs(name):
            continue
        if other is None:
            raise ValueError("a pass that the guidance needs is missing")
        guided = guided + scale * (base - other.float())
    if guidance.rescale != 0:
        ratio = base.std() / guided.std()
        guided = guided * (guidance.rescale * ratio + (1 - guidance.rescale))
    return guided.to(cond.dtype)


class Denoiser:
    """The model as a function from noisy latents to x0, with or without guidance.

    ``positive`` and ``negative`` are the contexts [1, S, D]. Without ``guidance`` (stage 2) there is one pass and
    ``negative`` is not used. Raises ValueError if guidance asks for the negative contexts and there are none.
    """

    def __init__(
        self,
        model: Model,
        positive: AV[Tensor],
        negative: AV[Tensor] | None = None,
        guidance: AV[Guidance] | None = None,
    ) -> None:
        self.model = model
        self.positive = positive
        self.negative = negative
        self.guidance = guidance
        self._step = 0
        self._before: AV[Any] = ABSENT
        self._needed = passes_of(guidance)
        if negative is None and UNCOND in self._needed:
            raise ValueError("classifier-free guidance without negative contexts")

    def __call__(self, latents: AV[Tensor], sigma: Tensor, state: AV[LatentState], rope: AV[Any]) -> AV[Tensor]:
        """Guided x0 [1, T, C] in the latents' dtype, not yet blended with the clean tokens.

        ``sigma`` [1] is fp32 at the start of a step and fp64 on substeps; as it has a dimension, per-token times
        mask·sigma take its precision (a 0-dim fp64 sigma would not widen an fp32 mask).
        """
        # A substep counts as step 0, which is never skipped (spec 05, section 3).
        substep = sigma.dtype == torch.float64
        step = 0 if substep else self._step
        self._step += not substep
        off = AV(False, False) if self.guidance is None else self.guidance.map(lambda g: g.skips(step))
        if off.video and off.audio:
            return self._before
        wanted = self._passes(latents, sigma, state, rope, off)
        velocities = self.model.passes(list(wanted.values()))
        times = state.map(lambda s: s.mask * sigma)
        x0 = {name: latents.map(denoised, v, times) for name, v in zip(wanted, velocities, strict=True)}
        if self.guidance is None:
            return x0[COND]
        guided = self.guidance.map(combine, x0[COND], *(x0.get(name, ABSENT) for name in OTHER_PASSES))
        self._before = guided.map(lambda now, before, off: before if off else now, self._before, off)
        return self._before

    def _passes(
        self, latents: AV[Tensor], sigma: Tensor, state: AV[LatentState], rope: AV[Any], off: AV[bool]
    ) -> dict[str, Pass]:
        """The passes that the guidance needs, in the official order. Passes of one prompt share their streams."""

        def stream(latents: Tensor, state: LatentState, context: Tensor, rope: Any, off: bool) -> Stream:
            # Times are unscaled, one per distinct mask value [1, K].
            timesteps = (state.mask_values * sigma)[None]
            return Stream(latents, timesteps, state.mask_index, sigma, context, rope, off)

        def streams(contexts: AV[Tensor]) -> AV[Stream]:
            return latents.map(stream, state, contexts, rope, off)

        positive = streams(self.positive)
        wanted = {COND: Pass(positive)}
        if UNCOND in self._needed and self.negative is not None:
            wanted[UNCOND] = Pass(streams(self.negative))
        if PERTURBED in self._needed and self.guidance is not None:
            wanted[PERTURBED] = Pass(positive, perturbed=self.guidance.map(lambda g: g.perturbed))
        if ISOLATED in self._needed:
            wanted[ISOLATED] = Pass(positive, isolated=True)
        return wanted


def denoised(latents: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """x0 = latents − velocity·time in fp32, in the latents' dtype; ``time`` broadcasts over channels."""
    return (latents.float() - velocity.float() * time.float()).to(latents.dtype)
