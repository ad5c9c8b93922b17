"""Stages whole: first noise, DiT, guidance and sampler together, against every recorded run.

The upsampler's output and the text contexts are taken as recorded; all else is computed.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from dit_parts import golden_dit
from golden_runs import errors_of_stage, runs
from support import load

from ltxpack.runtime.sampling.guidance import Denoiser
from ltxpack.runtime.sampling.shape import AV

# One for all stages that have the same LoRAs.
dit_of = functools.lru_cache(maxsize=4)(golden_dit)


def errors_of(golden: Path, dtype: str, kind: str = "*") -> dict[str, tuple[float, float]]:
    """By stage of every recorded run, see :func:`errors_of_stage`."""
    text = load(golden / "golden" / f"text_{dtype}.safetensors")
    contexts = [AV(text[f"{name}.video_encoding"], text[f"{name}.audio_encoding"]) for name in ("prompt", "negative")]
    found = {}
    for run in runs(golden, dtype, kind):
        generator = torch.Generator().manual_seed(run.params["seed"])
        for stage in run.stages:
            denoiser = Denoiser(dit_of(golden, tuple(stage.loras), run.dtype), *contexts, stage.guidance)
            found[f"{run.name} stage {stage.number}"] = errors_of_stage(stage, denoiser, generator)
    return found


def test_stages_in_fp32(latents_golden: Path) -> None:
    errors = errors_of(latents_golden, "fp32")
    assert max(map(max, errors.values())) <= 1e-4, errors


def test_stages_in_bf16(golden: Path) -> None:
    """Bit-equal where the kernels are the recorder's; from one rounding on chaotic, up to 1.4e-1 for the sound.

    The other recipes were recorded elsewhere than these contexts: tests/test_end_to_end.py compares them bit for bit.
    """
    errors = errors_of(golden, "bf16", "run")
    assert max(map(max, errors.values())) <= 0.2, errors
