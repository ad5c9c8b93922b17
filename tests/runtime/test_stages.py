"""Both stages whole: first noise, DiT, guidance and sampler together, against every recorded run.

The upsampler's output and the text contexts are taken as recorded; all else is computed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from dit_parts import golden_dit
from golden_runs import Stage, runs
from support import load, relative_l2
from torch import Tensor

from ltxpack.runtime.sampling import sample
from ltxpack.runtime.sampling.conditioning import unpatchify
from ltxpack.runtime.sampling.guidance import Denoiser
from ltxpack.runtime.sampling.shape import AV


def denoiser_of(stage: Stage, golden: Path, dtype: str) -> Denoiser:
    text = load(golden / "golden" / f"text_{dtype}.safetensors")
    positive, negative = (
        AV(text[f"{name}.video_encoding"], text[f"{name}.audio_encoding"]) for name in ("prompt", "negative")
    )
    dit = golden_dit(golden, str(stage.run.params[f"s{stage.number}"]), stage.run.dtype)
    return Denoiser(dit, positive, negative, stage.run.guidance if stage.number == 1 else None)


def worst_of(stage: Stage, golden: Path, dtype: str, generator: torch.Generator) -> tuple[float, float]:
    """Relative L2 of the latents fed to the denoiser (worst of all calls) and of the final latents."""
    denoiser, state = denoiser_of(stage, golden, dtype), stage.state(generator)
    rope = denoiser.model.rope(state.map(lambda s: s.positions), stage.run.dtype, "cpu")
    fed: list[AV[Tensor]] = []

    def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        fed.append(latents)
        return denoiser(latents, sigma, state, rope)

    tokens = sample.res2s(denoise, state, stage.sigmas)
    errors = []
    for number, latents in enumerate(fed):
        recorded = stage.recorded(f"call{number:02}.{{}}_in")
        if recorded is not None:
            each = latents.map(relative_l2, recorded)
            errors += [each.video, each.audio]
    final = stage.recorded("{}_final_latent")
    assert final is not None
    last = unpatchify(tokens, stage.shape).map(relative_l2, final)
    return max(errors, default=0.0), max(last.video, last.audio)


def worst_of_runs(golden: Path, dtype: str) -> dict[str, tuple[float, float]]:
    found = {}
    for run in runs(golden, dtype):
        generator = torch.Generator().manual_seed(run.params["seed"])
        for number in (1, 2):
            found[f"{run.name} stage {number}"] = worst_of(run.stage(number), golden, dtype, generator)
    return found


def test_stages_in_fp32(latents_golden: Path) -> None:
    errors = worst_of_runs(latents_golden, "fp32")
    assert max(map(max, errors.values())) <= 1e-4, errors


def test_stages_in_bf16(golden: Path) -> None:
    """Bit-equal where the kernels are the recorder's; from one rounding on chaotic, up to 1.4e-1 for the sound."""
    errors = worst_of_runs(golden, "bf16")
    assert max(map(max, errors.values())) <= 0.2, errors
