"""The samplers: replays of the recorded runs call by call, and closed forms with known answers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from golden_runs import Run, Stage, runs
from hypothesis import given, settings
from hypothesis import strategies as st
from support import load, relative_l2
from torch import Tensor

from ltxpack.runtime.sampling import sample, schedule
from ltxpack.runtime.sampling.conditioning import ImageItem, LatentState, initial_state, unpatchify
from ltxpack.runtime.sampling.shape import AV, VideoShape

SMALL = VideoShape(frames=9, height=64, width=96, fps=24.0)


class Replay:
    """A denoiser that answers as recorded, and notes how far what it is asked lies from what was recorded."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.numbers = stage.calls()
        self.worst = 0.0
        self.calls = 0

    def __call__(self, latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        call = f"call{next(self.numbers):02}"
        expected = self.stage.recorded(f"{call}.{{}}_in")
        assert expected is not None
        errors = latents.map(relative_l2, expected)
        self.worst = max(self.worst, errors.video, errors.audio)
        recorded = self.stage.run.tensors[f"stage{self.stage.number}.{call}.sigma"]
        assert (sigma.dtype, sigma.item()) == (recorded.dtype, recorded.item()), call
        assert sigma.shape == (1,)
        self.calls += 1
        answer = self.stage.recorded(f"{call}.{{}}_denoised")
        assert answer is not None
        return answer


def replay(run: Run) -> dict[str, float]:
    """Worst relative L2 of what each stage feeds the denoiser, and of its final latents; noise from the run's seed."""
    generator = torch.Generator().manual_seed(run.params["seed"])
    errors = {}
    for stage in run.stages:
        state = stage.state(generator)
        denoiser = Replay(stage)
        tokens = sample.SAMPLERS[stage.rule.sampler](denoiser, state, stage.sigmas)
        assert denoiser.calls == len(list(stage.calls()))
        assert tokens.map(lambda t: t.dtype) == AV(run.dtype, run.dtype)
        final = stage.recorded("{}_final_latent")
        assert final is not None
        found = unpatchify(tokens, stage.shape).map(relative_l2, final)
        errors[f"{run.name} stage {stage.number}"] = max(denoiser.worst, found.video, found.audio)
    return errors


def fully_recorded(golden: Path, dtype: str) -> list[Run]:
    found = [run for run in runs(golden, dtype) if run.av(f"stage{len(run.stages)}.call00.{{}}_denoised") is not None]
    assert found
    return found


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-6), ("bf16", 1e-3)])
def test_replay(golden: Path, dtype: str, bound: float) -> None:
    """In bf16 equal up to single roundings of res_2s: a unit in the last place is 4e-3, and few elements may differ."""
    errors = {name: error for run in fully_recorded(golden, dtype) for name, error in replay(run).items()}
    assert max(errors.values()) <= bound, errors
    assert dtype == "fp32" or not any(error for name, error in errors.items() if name.startswith("recipe_")), errors


def test_all_runs_evaluate_at_the_recorded_sigmas(golden: Path) -> None:
    """Also where only the inputs were recorded (15 steps): number, order, value and precision of the calls."""
    for run in runs(golden, "fp32"):
        for stage in run.stages:
            asked: list[Tensor] = []

            def zeros(latents: AV[Tensor], sigma: Tensor, asked: list[Tensor] = asked) -> AV[Tensor]:
                asked.append(sigma)
                return latents.map(torch.zeros_like)

            sample.SAMPLERS[stage.rule.sampler](zeros, stage.state(torch.Generator().manual_seed(0)), stage.sigmas)
            recorded = [run.tensors[f"stage{stage.number}.call{i:02}.sigma"] for i in stage.calls()]
            assert [s.dtype for s in asked] == [s.dtype for s in recorded]
            for found, expected in zip(asked, recorded, strict=True):
                assert relative_l2(found[0], expected) <= 1e-6, (run.name, stage.number)


def test_noise_sources_equal_the_recorded_draws(latents_golden: Path) -> None:
    constants = load(latents_golden / "golden" / "constants.safetensors")
    seeds = {
        "step_seed_minus1": schedule.STEP_NOISE_SEED,
        f"substep_seed_{schedule.SUBSTEP_NOISE_SEED}": schedule.SUBSTEP_NOISE_SEED,
    }
    for name, seed in seeds.items():
        draws = {key: value for key, value in constants.items() if key.startswith(f"noise.{name}.draw")}
        order = sorted(draws, key=lambda key: (int(re.search(r"draw(\d+)", key)[1]), "audio" in key))  # type: ignore[index]
        source = sample.NoiseSource(seed, "cpu")
        for key in order:
            found = source.draw(draws[key])
            assert found.dtype == torch.float64
            assert relative_l2(found, draws[key]) <= 1e-12, key


def test_a_run_draws_the_recorded_noise_in_the_recorded_order(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per step: substep video, substep audio from one generator, step video, step audio from the other."""
    draw, drawn = sample.NoiseSource.draw, list[Tensor]()
    monkeypatch.setattr(
        sample.NoiseSource, "draw", lambda source, like: (drawn.append(draw(source, like)), drawn[-1])[1]
    )
    noisy = [run for run in fully_recorded(golden, "fp32") if "stage1.sde_noise0" in run.tensors]
    assert noisy
    for run in noisy:
        generator = torch.Generator().manual_seed(run.params["seed"])
        for stage in run.stages:
            drawn.clear()
            sample.res2s(Replay(stage), stage.state(generator), stage.sigmas)
            recorded = [key for key in run.tensors if key.startswith(f"stage{stage.number}.sde_noise")]
            for number in range(len(recorded)):
                expected = run.tensors[f"stage{stage.number}.sde_noise{number}"]
                assert relative_l2(drawn[number], expected) <= 1e-12, (stage.number, number)


def small_state(
    dtype: torch.dtype = torch.float32, images: tuple[ImageItem, ...] = (), device: str = "cpu"
) -> AV[LatentState]:
    return initial_state(SMALL, None, images, 1.0, torch.Generator().manual_seed(3), device, dtype)


def image(frame: int, strength: float) -> ImageItem:
    generator = torch.Generator().manual_seed(frame + 17)
    return ImageItem(frame, strength, torch.randn(1, 128, 1, *SMALL.grid[1:], generator=generator))


@pytest.mark.parametrize("steps", [2, 7])
def test_a_constant_x0_is_reached_whatever_the_noise(steps: int) -> None:
    state = small_state()
    goal = state.map(lambda s: torch.full_like(s.latents, 0.25))
    tokens = sample.res2s(lambda latents, sigma: goal, state, schedule.shifted_sigmas(4096, steps))
    assert tokens.map(torch.equal, goal) == AV(True, True)


def test_the_last_step_lands_at_the_terminal_noise_level() -> None:
    """Seen by the terminal evaluation: x0 plus noise of deviation 0.0011."""
    state = small_state()
    goal = state.map(lambda s: torch.full_like(s.latents, 0.25))
    seen: list[AV[Tensor]] = []

    def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        seen.append(latents)
        return goal

    sample.res2s(denoise, state, schedule.shifted_sigmas(4096, 5))
    deviation = seen[-1].map(lambda t, g: (t - (1 - schedule.TERMINAL_SIGMA) * g).std().item(), goal)
    assert deviation.video == pytest.approx(schedule.TERMINAL_SIGMA, rel=0.05)
    assert deviation.audio == pytest.approx(schedule.TERMINAL_SIGMA, rel=0.05)


def test_without_noise_it_solves_the_flow_to_second_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """For x0 ~ N(0, d²) denoiser and probability flow are known: x shrinks as sqrt((1 − sigma)²·d² + sigma²)."""
    monkeypatch.setattr(sample, "inject", lambda start, end, noise, renoise: end)
    state, spread, last = small_state(torch.float64), 0.7, 0.1

    def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        signal = (1 - sigma.double()) * spread**2
        factor = signal / ((1 - sigma.double()) * signal + sigma.double() ** 2)
        return latents.map(lambda x: x * factor)

    def error(steps: int) -> float:
        sigmas = torch.logspace(0, math.log10(last), steps + 1)
        end = sigmas[-1].item()
        exact = state.video.latents * math.sqrt((1 - end) ** 2 * spread**2 + end**2)
        return relative_l2(sample.res2s(denoise, state, sigmas).video, exact)

    coarse, fine = error(16), error(32)
    assert fine < 1e-3
    assert 3.5 < coarse / fine < 4.5


def test_an_image_held_with_strength_one_never_moves() -> None:
    held = image(0, 1.0)
    state = small_state(images=(held, image(8, 1.0)))
    count = SMALL.tokens_per_frame

    def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        for where in (slice(0, count), slice(SMALL.tokens, None)):
            assert torch.equal(latents.video[:, where], state.video.clean[:, where])
        return latents.map(lambda x: x * 0.5)

    tokens = sample.res2s(denoise, state, schedule.shifted_sigmas(SMALL.tokens, 4))
    assert tokens.video.shape[1] == SMALL.tokens + count
    assert torch.equal(unpatchify(tokens, SMALL).video[:, :, :1], held.latents)


@settings(deadline=None)
@given(scale=st.floats(0.001, 0.25), seed=st.integers(0, 1000))
def test_refinement_solves_for_the_anchor(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    middle, x0, anchor = (torch.randn(1, 4, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    found, direction = sample.refine(middle, x0, anchor, scale)
    assert relative_l2(found, (middle - scale * x0) / (1 - scale)) <= 1e-12
    assert relative_l2(found + scale * direction, middle) <= 1e-12


@settings(deadline=None)
@given(sigma=st.floats(0.05, 1), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_injection_replaces_noise_and_keeps_the_signal(sigma: float, ratio: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, old, fresh = (torch.randn(1, 4, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    start, end = torch.tensor([sigma, sigma * ratio], dtype=torch.float64)
    made = schedule.renoise(start, end)
    found = sample.inject((1 - start) * x0 + start * old, (1 - end) * x0 + end * old, fresh, made)
    kept = (end**2 - made.up**2).sqrt()
    assert relative_l2(found, (1 - end) * x0 + kept * old + made.up * fresh) <= 1e-9


@pytest.mark.parametrize("sigmas", [[1.0, 0.6, 0.3, 0.0], [1.0, 0.6, 0.3]])
def test_steps_are_reported_in_order(sigmas: list[float]) -> None:
    told: list[tuple[int, int]] = []
    calls = 0

    def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        nonlocal calls
        calls += 1
        return latents

    levels = torch.tensor(sigmas)
    sample.res2s(denoise, small_state(), levels, on_step=lambda done, total: told.append((done, total)))
    steps = len(sigmas) - 1
    assert told == [(i + 1, steps) for i in range(steps)]
    assert calls == 2 * steps + (sigmas[-1] == 0)


def test_state_is_left_as_it_was() -> None:
    state = small_state(images=(image(0, 0.9),))
    before = state.map(lambda s: (s.latents.clone(), s.clean.clone(), s.mask.clone()))
    sample.res2s(lambda latents, sigma: latents.map(lambda x: x * 0.9), state, torch.tensor([1.0, 0.5, 0.0]))
    for s, copies in zip((state.video, state.audio), (before.video, before.audio), strict=True):
        assert all(map(torch.equal, (s.latents, s.clean, s.mask), copies))
