"""Guidance: the recorded passes combined, and which passes a setting makes the model run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from golden_runs import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from support import load, relative_l2
from torch import Tensor

from ltxpack.runtime.model.model import UNPERTURBED, Pass
from ltxpack.runtime.sampling import recipes
from ltxpack.runtime.sampling.conditioning import ImageItem, LatentState, initial_state
from ltxpack.runtime.sampling.guidance import Denoiser, Guidance, combine, denoised
from ltxpack.runtime.sampling.shape import AV, VideoShape
from ltxpack.runtime.settings import Settings

HQ = Settings().guidance

OFF = Guidance(cfg=1.0, rescale=0.0, modality=1.0)
SHAPE = VideoShape(frames=9, height=64, width=96, fps=24.0)
strengths = st.floats(-3, 8)


def worst_combination(golden: Path, dtype: str) -> dict[str, float]:
    """Relative L2 of ``combine`` for every call whose passes were recorded."""
    errors = {}
    for run in runs(golden, dtype):
        for key in [key for key in run.tensors if key.endswith("_cond")]:
            call, name = key.removesuffix("_cond").rsplit(".", 1)
            cond, *others = (run.tensors.get(f"{call}.{name}_{part}") for part in ("cond", "uncond", "ptb", "mod"))
            assert cond is not None
            found = combine(getattr(run.guidance, name), cond, *others)
            assert found.dtype == run.dtype
            errors[f"{run.name} {call} {name}"] = relative_l2(found, run.tensors[f"{call}.{name}_denoised"])
    assert errors
    return errors


def test_combine_equals_the_recorded_fp32_calls(latents_golden: Path) -> None:
    errors = worst_combination(latents_golden, "fp32")
    assert max(errors.values()) <= 1e-6, errors


def test_combine_equals_the_recorded_bf16_calls(golden: Path) -> None:
    """Equal up to single roundings of the bf16 result."""
    errors = worst_combination(golden, "bf16")
    assert max(errors.values()) <= 1e-3, errors


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-6), ("bf16", 1e-3)])
def test_x0_from_the_recorded_velocities(golden: Path, dtype: str, bound: float) -> None:
    recorded = load(golden / "golden" / f"transformer_{dtype}.safetensors")
    cases = [key.removesuffix(".video_velocity") for key in recorded if key.endswith(".video_velocity")]
    assert cases
    for case in cases:
        sigma = recorded[f"{case}.sigma"][:, None, None]
        times = AV(recorded[f"{case}.video_denoise_mask"] * sigma, sigma)
        for name, time in zip(("video", "audio"), (times.video, times.audio), strict=True):
            found = denoised(recorded[f"in.{name}_latent"], recorded[f"{case}.{name}_velocity"], time)
            assert relative_l2(found, recorded[f"{case}.{name}_x0"]) <= bound, (case, name)


def tensors(count: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 6, 8, generator=generator).to(dtype) for _ in range(count)]


@settings(deadline=None)
@given(cfg=strengths, stg=strengths, modality=strengths, seed=st.integers(0, 99))
def test_combine_is_the_sum_of_its_directions(cfg: float, stg: float, modality: float, seed: int) -> None:
    c, u, q, m = tensors(4, seed)
    guidance = Guidance(cfg=cfg, rescale=0.0, modality=modality, stg=stg)
    wide = [t.double() for t in (c, u, q, m)]
    expected = wide[0] + (cfg - 1) * (wide[0] - wide[1]) + stg * (wide[0] - wide[2])
    expected = expected + (modality - 1) * (wide[0] - wide[3])
    assert relative_l2(combine(guidance, c, u, q, m), expected) <= 1e-4


@settings(deadline=None)
@given(cfg=st.floats(1.1, 8), rescale=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_rescale_pulls_the_deviation_towards_that_of_cond(cfg: float, rescale: float, seed: int) -> None:
    c, u = tensors(2, seed)
    plain = combine(Guidance(cfg=cfg, rescale=0.0, modality=1.0), c, u, None, None)
    scaled = combine(Guidance(cfg=cfg, rescale=rescale, modality=1.0), c, u, None, None)
    wanted = rescale * c.std() + (1 - rescale) * plain.std()
    assert scaled.std().item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_strengths_cond_comes_through_untouched(dtype: torch.dtype) -> None:
    c, u, q, m = tensors(4, 0, dtype)
    assert torch.equal(combine(OFF, c, None, None, None), c)
    assert torch.equal(combine(OFF, c, u, q, m), c)


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(cfg=3.0, rescale=0.0, modality=1.0),
        Guidance(cfg=1.0, rescale=0.0, modality=3.0),
        Guidance(cfg=1.0, rescale=0.0, modality=1.0, stg=1.0),
    ],
)
def test_a_missing_pass_is_an_error_not_a_zero(guidance: Guidance) -> None:
    with pytest.raises(ValueError, match="missing"):
        combine(guidance, *tensors(1, 0), None, None, None)


# The denoiser, with a model that only writes down how it was called


@dataclass
class Recorder:
    """A model whose velocity is the context's first number; keeps its calls."""

    calls: list[Sequence[Pass]] = field(default_factory=list)

    def passes(self, passes: Sequence[Pass]) -> list[AV[Tensor]]:
        self.calls.append(passes)
        return [
            each.streams.map(lambda s: torch.full_like(s.latents, s.context.flatten()[0].item())) for each in passes
        ]

    @property
    def only(self) -> Sequence[Pass]:
        """The passes of the one call there was."""
        (passes,) = self.calls
        return passes


POSITIVE = AV(torch.full((1, 4, 8), 1.0), torch.full((1, 4, 6), 2.0))
NEGATIVE = AV(torch.full((1, 4, 8), 3.0), torch.full((1, 4, 6), 4.0))
ROPE = AV("video rope", "audio rope")


def state_with(images: list[ImageItem], device: str = "cpu") -> AV[LatentState]:
    return initial_state(SHAPE, None, images, 1.0, torch.Generator().manual_seed(0), device, torch.float32)


def image(frame: int, strength: float) -> ImageItem:
    return ImageItem(frame, strength, torch.ones(1, 128, 1, *SHAPE.grid[1:]))


def run_denoiser(guidance: AV[Guidance] | None, sigma: Tensor) -> tuple[Recorder, AV[Tensor], AV[LatentState]]:
    model, state = Recorder(), state_with([image(0, 1.0), image(8, 0.25)])
    denoiser = Denoiser(model, POSITIVE, NEGATIVE, guidance)
    x0 = denoiser(state.map(lambda s: s.latents), sigma, state, ROPE)
    guided, plain = recipes.HQ.stages
    assert len(model.only) == (plain.passes(HQ) if guidance is None else guided.passes(guidance))
    return model, x0, state


def test_hq_runs_cond_uncond_isolated_in_this_order() -> None:
    model, _, _ = run_denoiser(HQ, torch.tensor([0.5]))
    contexts = [each.streams.map(lambda s: s.context) for each in model.only]
    assert [c.video is POSITIVE.video and c.audio is POSITIVE.audio for c in contexts] == [True, False, True]
    assert contexts[1].map(torch.equal, NEGATIVE) == AV(True, True)
    assert [each.isolated for each in model.only] == [False, False, True]
    assert all(each.perturbed == UNPERTURBED for each in model.only)
    cond, uncond, isolated = (each.streams for each in model.only)
    assert cond is isolated and cond is not uncond, "by which the model knows what it need not do twice"


def test_the_perturbed_pass_comes_third_with_each_modalitys_blocks() -> None:
    blocks = AV(frozenset({28}), frozenset({3, 4}))
    guidance = blocks.map(lambda b: Guidance(cfg=3.0, rescale=0.7, modality=3.0, stg=1.0, stg_blocks=b))
    model, _, _ = run_denoiser(guidance, torch.tensor([0.5]))
    assert [(each.isolated, each.perturbed) for each in model.only] == [
        (False, UNPERTURBED),
        (False, UNPERTURBED),
        (False, blocks),
        (True, UNPERTURBED),
    ]


@pytest.mark.parametrize("side", ["video", "audio"])
@pytest.mark.parametrize(
    ("guidance", "passes"),
    [
        (OFF, 1),
        (Guidance(cfg=2.0, rescale=0.0, modality=1.0), 2),
        (Guidance(cfg=1.0, rescale=0.0, modality=2.0), 2),
        (Guidance(cfg=1.0, rescale=0.0, modality=1.0, stg=0.5), 2),
        (Guidance(cfg=2.0, rescale=0.5, modality=2.0, stg=0.5), 4),
    ],
)
def test_a_pass_runs_if_either_modality_needs_it(side: str, guidance: Guidance, passes: int) -> None:
    pair = AV(guidance, OFF) if side == "video" else AV(OFF, guidance)
    model, _, _ = run_denoiser(pair, torch.tensor([0.5]))
    assert len(model.only) == passes


def test_stage_two_runs_the_positive_pass_alone() -> None:
    model, x0, state = run_denoiser(None, torch.tensor([0.5]))
    (only,) = model.only
    assert not only.isolated
    assert only.streams.map(lambda s: s.context).map(torch.equal, POSITIVE) == AV(True, True)
    expected = state.map(lambda s, velocity: s.latents - velocity * (s.mask * 0.5), AV(1.0, 2.0))
    assert x0.map(relative_l2, expected) == AV(0.0, 0.0)


def test_guidance_combines_what_the_passes_gave() -> None:
    guidance = AV(Guidance(cfg=3.0, rescale=0.0, modality=1.0), OFF)
    _, x0, state = run_denoiser(guidance, torch.tensor([0.5]))
    # Velocities 1 and 3 (video): x - t + 2·((x - t) - (x - 3t)) = x + 3t; audio keeps its positive pass.
    expected = state.map(lambda s, factor: s.latents + factor * (s.mask * 0.5), AV(3.0, -2.0))
    assert max(x0.map(relative_l2, expected).video, x0.map(relative_l2, expected).audio) <= 1e-6


def test_substeps_are_never_skipped_and_the_next_skipped_step_reuses_their_result() -> None:
    """res_2s in spec 05, section 3: a substep, whose sigma is fp64, counts as step 0."""
    model, state = Recorder(), state_with([])
    denoiser = Denoiser(model, POSITIVE, NEGATIVE, HQ.map(lambda g: replace(g, skip=1)))
    halves = [(step, dtype) for step in range(3) for dtype in (torch.float32, torch.float64)] + [(3, torch.float32)]
    before: AV[Tensor] | None = None
    for number, (step, dtype) in enumerate(halves):
        calls = len(model.calls)
        latents = state.map(lambda s, number=number: s.latents + number)
        x0 = denoiser(latents, torch.tensor([0.5], dtype=dtype), state, ROPE)
        skipped = step % 2 == 1 and dtype == torch.float32
        assert (len(model.calls) == calls) == skipped == (before is not None and torch.equal(x0.video, before.video))
        before = x0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_keep_the_precision_of_sigma(dtype: torch.dtype) -> None:
    """On substeps sigma is fp64; rounded to fp32 before the model scales it, a run ends 1e-5 off."""
    sigma = torch.tensor([0.123456789123456789], dtype=dtype)
    model, _, state = run_denoiser(HQ, sigma)
    for each in model.only:
        streams, video = each.streams, each.streams.video
        assert video.timesteps.dtype == video.sigma.dtype == streams.audio.timesteps.dtype == dtype
        assert video.timesteps.shape == (1, 3)
        assert torch.equal(video.sigma, sigma)
        assert torch.equal(video.timesteps[0], state.video.mask_values.to(dtype) * sigma)
        assert torch.equal(video.timesteps[0, video.timestep_index], (state.video.mask[0, :, 0].to(dtype) * sigma))
        assert streams.audio.timestep_index is None
        assert torch.equal(streams.audio.timesteps, sigma[None])
        assert streams.map(lambda s: s.rope) == ROPE


def test_guidance_without_the_negative_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Denoiser(Recorder(), POSITIVE, None, HQ)
    Denoiser(Recorder(), POSITIVE, None, AV(OFF, OFF))
