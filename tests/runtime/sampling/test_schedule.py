"""Sigmas, res_2s coefficients and the plan of a loop, against the recorded constants and as mathematics."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import load, relative_l2
from torch import Tensor

from ltxpack.errors import UsageError
from ltxpack.runtime.sampling import schedule
from ltxpack.runtime.sampling.recipes import ANCHORED, DISTILLED, REFINING

DEFAULT_TOKENS = 4096


@pytest.fixture(scope="module")
def constants(latents_golden: Path) -> dict[str, Tensor]:
    return load(latents_golden / "golden" / "constants.safetensors")


def test_shifted_sigmas_equal_the_recorded_ones(constants: dict[str, Tensor]) -> None:
    checked = 0
    for key, expected in constants.items():
        named = re.fullmatch(r"sigmas\.steps(\d+)\.(?:.*tokens(\d+)|no_latent_(\d+)_tokens)", key)
        if named is None:
            continue
        steps, tokens = int(named[1]), int(named[2] or named[3])
        if steps == 1:
            assert expected[0].isnan(), "the official schedule of one step is NaN, so ours refuses it"
            continue
        found = schedule.shifted_sigmas(tokens, steps)
        assert found.dtype == expected.dtype == torch.float32
        assert relative_l2(found, expected) <= 1e-6, key
        checked += 1
    assert checked > 0
    assert torch.equal(schedule.sigmas_of(REFINING), constants["sigmas.stage2_distilled"])


def test_the_schedules_of_the_other_recipes_are_the_recorded_ones(golden: Path) -> None:
    """The sizes that are given change nothing."""
    for key, expected in load(golden / "golden" / "constants_recipes.safetensors").items():
        if fixed := re.fullmatch(r"distilled\.stage(\d)\.sigmas", key):
            found = schedule.sigmas_of(DISTILLED.stages[int(fixed[1]) - 1].schedule)
        else:
            steps = int(key.removeprefix("two_stage.sigmas.steps"))
            found, other = (schedule.sigmas_of(ANCHORED, tokens, steps) for tokens in (24, 24576))
            assert torch.equal(found, other)
        assert torch.equal(found, expected), key


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_fewer_than_two_steps_are_wrong_use(steps: int) -> None:
    with pytest.raises(UsageError, match="too few steps"):
        schedule.shifted_sigmas(DEFAULT_TOKENS, steps)


@pytest.mark.parametrize(("tokens", "steps"), [(100_000, 15), (10**12, 15), (DEFAULT_TOKENS, 10**12)])
def test_a_size_beyond_float32_is_refused_not_sampled_with_nan(tokens: int, steps: int) -> None:
    with pytest.raises(UsageError, match="no schedule for this size"):
        schedule.shifted_sigmas(tokens, steps)


@settings(deadline=None)
@given(tokens=st.integers(1, 17_000), steps=st.integers(2, 40))
def test_shifted_sigmas_fall_from_one_over_a_tenth_to_zero(tokens: int, steps: int) -> None:
    """The first may miss 1 by one fp32 rounding times the stretch (up to 7e2), as in the official schedule."""
    sigmas = schedule.shifted_sigmas(tokens, steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0].item() == pytest.approx(1, abs=1e-4)
    assert sigmas[-1] == 0
    assert sigmas[-2].item() == pytest.approx(0.1, abs=2e-6)
    assert bool((sigmas[1:] < sigmas[:-1]).all())


def test_padding_puts_the_terminal_sigma_before_the_zero_only() -> None:
    assert schedule.padded(torch.tensor([1.0, 0.5, 0.0])).tolist() == torch.tensor([1.0, 0.5, 0.0011, 0.0]).tolist()
    assert schedule.padded(torch.tensor([1.0, 0.5])).tolist() == [1.0, 0.5]


def test_phi_and_weights_equal_the_recorded_ones(constants: dict[str, Tensor]) -> None:
    steps = constants["res2s.h"].tolist()
    phis = torch.tensor([[schedule.phi(1, -h), schedule.phi(2, -h)] for h in steps], dtype=torch.float64)
    weights = torch.tensor([schedule.res2s_weights(h) for h in steps], dtype=torch.float64)
    assert relative_l2(phis, constants["res2s.phi1_phi2_at_minus_h"]) <= 1e-15
    assert relative_l2(weights, constants["res2s.a21_b1_b2"]) <= 1e-15


@settings(deadline=None)
@given(z=st.floats(-8, 8).filter(lambda z: abs(z) > 0.05), order=st.sampled_from([1, 2]))
def test_phi_is_its_power_series(z: float, order: int) -> None:
    series = math.fsum(z**k / math.factorial(k + order) for k in range(80))
    assert schedule.phi(order, z) == pytest.approx(series, rel=1e-12)


@settings(deadline=None)
@given(h=st.floats(1e-2, 8))
def test_weights_meet_the_order_conditions(h: float) -> None:
    a, b1, b2 = schedule.res2s_weights(h)
    # Exact for a constant x0; second order for one that is linear in log sigma, sampled half-way.
    assert b1 + b2 == pytest.approx(-math.expm1(-h) / h)
    assert b2 / 2 == pytest.approx((math.expm1(-h) + h) / h**2, rel=1e-9)
    assert a * h == pytest.approx(-math.expm1(-h / 2))


def schedule_named(name: str) -> Tensor:
    return {"hq15": schedule.shifted_sigmas(8160, 15), "stage2": schedule.sigmas_of(REFINING)}[name]


@pytest.mark.parametrize("name", ["hq15", "stage2"])
def test_plan_equals_the_recorded_loops(constants: dict[str, Tensor], name: str) -> None:
    recorded = {key.removeprefix(f"res2s.{name}."): v for key, v in constants.items() if f"res2s.{name}." in key}
    sigmas = schedule_named(name)
    plan = schedule.res2s_plan(sigmas)
    assert relative_l2(schedule.padded(sigmas), recorded["padded_sigmas"]) <= 1e-6
    assert plan.terminal == recorded["padded_sigmas"][-2].item()
    assert [step.refine for step in plan.steps] == recorded["bong_active"].tolist()

    def column(values: list[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    assert relative_l2(column([step.h for step in plan.steps]), recorded["h"]) <= 1e-12
    assert relative_l2(column([step.middle for step in plan.steps]), recorded["sub_sigma"]) <= 1e-12
    weights = column([(step.a, step.b1, step.b2) for step in plan.steps])
    assert relative_l2(weights, recorded["a21_b1_b2"]) <= 1e-12
    fp32 = column([(s.to_target.alpha, s.to_target.down, s.to_target.up) for s in plan.steps])
    assert torch.equal(fp32, recorded["sde_alpha_down_up_step_f32_as_official"])


@pytest.mark.parametrize("name", ["hq15", "stage2"])
def test_renoise_equals_the_recorded_fp64_coefficients(constants: dict[str, Tensor], name: str) -> None:
    levels = constants[f"res2s.{name}.padded_sigmas"].double()
    found = [schedule.renoise(levels[i], levels[i + 1]) for i in range(len(levels) - 2)]
    table = torch.tensor([(r.alpha, r.down, r.up) for r in found], dtype=torch.float64)
    assert relative_l2(table, constants[f"res2s.{name}.sde_alpha_down_up_step_f64"]) <= 1e-15


@settings(deadline=None)
@given(sigma=st.floats(0.01, 1), ratio=st.floats(0.001, 0.999))
def test_renoise_keeps_the_noise_level(sigma: float, ratio: float) -> None:
    start, end = torch.tensor([sigma, sigma * ratio], dtype=torch.float64)
    made = schedule.renoise(start, end)
    kept = made.alpha * made.down
    assert kept**2 + made.up**2 == pytest.approx(end.item() ** 2, rel=1e-9)
    assert made.alpha - kept == pytest.approx(1 - end.item())
    assert made.gap == pytest.approx(sigma - sigma * ratio)


def test_a_schedule_that_does_not_end_in_zero_has_no_terminal_evaluation() -> None:
    plan = schedule.res2s_plan(torch.tensor([1.0, 0.5, 0.2]))
    assert plan.terminal is None
    assert [step.sigma - step.to_target.gap for step in plan.steps] == pytest.approx([0.5, 0.2])
