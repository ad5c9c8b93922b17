"""When and how strongly to denoise: noise levels, res_2s coefficients, seeds. All on the host, before any loop.

Nothing here knows latents or a model. A sampler gets its plan once, with plain Python floats for each step, so that a
loop on a GPU never waits for the device (spec 05, sections 1, 2 and 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxpack.errors import UsageError
from ltxpack.runtime.sampling.recipes import Schedule

# The shift of a schedule: linear in the number of video tokens, through these two points; not clamped outside them.
SHIFT_TOKENS = (1024, 4096)
SHIFT = (0.95, 2.05)
LAST_SIGMA = 0.1
LARGEST_EXPONENT = 700.0

# Replaces the final zero of a schedule: the last res_2s step ends here, and one plain evaluation follows.
TERMINAL_SIGMA = 0.0011

# The official pipeline gives the run's seed to the first noise only; the SDE noise always starts from these.
STEP_NOISE_SEED = -1
SUBSTEP_NOISE_SEED = 9999

REFINE_BELOW_LOG_STEP = 0.5
REFINE_ABOVE_SIGMA = 0.03
REFINE_ITERATIONS = 100


def sigmas_of(schedule: Schedule, tokens: int = 0, steps: int = 0) -> Tensor:
    """The fp32 noise levels [n + 1] of a stage of ``tokens`` video tokens, appended keyframe tokens not counted.

    A fixed schedule needs neither tokens nor steps. Raises UsageError as :func:`shifted_sigmas`.
    """
    if schedule.fixed is not None:
        return torch.tensor(schedule.fixed, dtype=torch.float32)
    return shifted_sigmas(tokens if schedule.tokens is None else schedule.tokens, steps)


def shifted_sigmas(tokens: int, steps: int) -> Tensor:
    """The fp32 schedule [steps + 1] from 1 to 0, shifted by the number of ``tokens`` (spec 05, section 2).

    Raises UsageError for fewer than two steps, and if neighbouring sigmas are equal in float32.
    """
    if steps < 2:
        raise UsageError("too few steps", expected="at least 2", found=steps, next="choose --steps 2 or more")
    slope = (SHIFT[1] - SHIFT[0]) / (SHIFT_TOKENS[1] - SHIFT_TOKENS[0])
    shift = math.exp(min(SHIFT[0] + (tokens - SHIFT_TOKENS[0]) * slope, LARGEST_EXPONENT))
    # So many float32 numbers are never distinct, and the refusal needs no more of them.
    uniform = torch.linspace(1, 0, min(steps, 2**24) + 1, dtype=torch.float32)[:-1]
    distance = 1 - shift / (shift + (1 / uniform - 1))
    sigmas = torch.cat([1 - distance / (distance[-1] / (1 - LAST_SIGMA)), torch.zeros(1)])
    if not bool((sigmas[:-1] > sigmas[1:]).all()):
        raise UsageError(
            "no schedule for this size: neighbouring sigmas coincide in float32",
            found=f"{tokens} video tokens, {steps} steps",
            next="choose a smaller --height, --width or --num-frames, or fewer --steps",
        )
    return sigmas


def padded(sigmas: Tensor) -> Tensor:
    """``sigmas`` with a final 0 replaced by (0.0011, 0); unchanged if it does not end in 0. fp32."""
    if sigmas[-1] != 0:
        return sigmas
    return torch.cat([sigmas[:-1], sigmas.new_tensor([TERMINAL_SIGMA, 0.0])])


def phi(order: int, z: float) -> float:
    """φ_j(z) = (e^z − Σ_{k<j} z^k/k!) / z^j of exponential integrators, and its limit 1/j! near 0.

    Summed as written and without expm1, to agree with the official coefficients bit for bit.
    """
    if abs(z) < 1e-10:
        return 1 / math.factorial(order)
    taylor = sum(z**k / math.factorial(k) for k in range(order))
    return (math.exp(z) - taylor) / z**order


def res2s_weights(h: float) -> tuple[float, float, float]:
    """(a, b1, b2) of the second-order exponential Runge-Kutta step with its substep half-way, at log step ``h``."""
    b2 = 2 * phi(2, -h)
    return 0.5 * phi(1, -h / 2), phi(1, -h) - b2, b2


@dataclass(frozen=True)
class Renoise:
    """One SDE injection from ``sigma`` down to ``target`` (eta 0.5), as ``alpha·(d + down·e) + up·noise``.

    Made by ``renoise`` in the precision of its two sigmas; ``sample.inject`` applies it.
    """

    sigma: float
    gap: float
    alpha: float
    down: float
    up: float


def renoise(sigma: Tensor, target: Tensor) -> Renoise:
    """The coefficients for two 0-dim CPU tensors, computed in their dtype: fp32 for steps, fp64 for substeps."""
    up = torch.minimum(0.5 * target, 0.9999 * target)
    residual = _sqrt((target**2 - up**2).clamp(min=0))
    alpha = (1 - target) + residual
    return Renoise(sigma.item(), (sigma - target).item(), alpha.item(), (residual / alpha).item(), up.item())


def _sqrt(value: Tensor) -> Tensor:
    """Correctly rounded, so the plan is the same everywhere; on some CPUs torch's fp32 root is one ulp off."""
    return torch.tensor(math.sqrt(value.item()), dtype=value.dtype)


@dataclass(frozen=True)
class Step:
    """One res_2s step from ``sigma`` through ``middle``, with everything its arithmetic needs."""

    sigma: float
    middle: float
    h: float
    a: float
    b1: float
    b2: float
    refine: bool
    to_middle: Renoise
    to_target: Renoise


@dataclass(frozen=True)
class Res2sPlan:
    """A whole loop: its steps, then one plain evaluation at ``terminal`` if the schedule ends in 0."""

    steps: tuple[Step, ...]
    terminal: float | None


def res2s_plan(sigmas: Tensor) -> Res2sPlan:
    """The plan for fp32 ``sigmas`` [n + 1], strictly falling (spec 05, section 4)."""
    sigmas = sigmas.to("cpu", torch.float32)
    n = len(sigmas) - 1
    levels = padded(sigmas)
    steps = tuple(_step(levels[i], levels[i + 1]) for i in range(n))
    return Res2sPlan(steps, levels[n].item() if sigmas[-1] == 0 else None)


def _step(sigma: Tensor, target: Tensor) -> Step:
    middle = _sqrt(sigma.double() * target.double())
    h = -torch.log(target.double() / sigma.double()).item()
    a, b1, b2 = res2s_weights(h)
    return Step(
        sigma=sigma.item(),
        middle=middle.item(),
        h=h,
        a=a,
        b1=b1,
        b2=b2,
        refine=h < REFINE_BELOW_LOG_STEP and sigma.item() > REFINE_ABOVE_SIGMA,
        to_middle=renoise(sigma.double(), middle),
        to_target=renoise(sigma, target),
    )
