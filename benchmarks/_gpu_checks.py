"""Is it right on this device? Tiny weights against float32 on the CPU; whether a stage ever waits for the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from _gpu_bench import Bench
from _gpu_models import Inputs, contexts, forward_inputs, random_dit, state_of
from _gpu_sizes import TINY
from torch import Tensor

from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT, Pass
from ltxpack.runtime.sampling.guidance import Denoiser
from ltxpack.runtime.sampling.recipes import REFINING
from ltxpack.runtime.sampling.sample import res2s
from ltxpack.runtime.sampling.schedule import shifted_sigmas, sigmas_of
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.settings import Settings

HQ = Settings().guidance

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """One way to run the same forward."""

    dtype: torch.dtype
    kernel: str
    compiled: bool = False

    def __str__(self) -> str:
        extras = ["compiled"] if self.compiled else []
        return ", ".join([str(self.dtype).removeprefix("torch."), self.kernel, *extras])


def variants(bench: Bench) -> Iterator[Variant]:
    """Every kernel eager; compiled with torch's own choice, as far as there is time for."""
    config = DiTConfig.from_dict({**TINY.transformer, **WIDER})
    for dtype in LIMITS:
        for name in kernels.KERNELS:
            kinds = kernels.attention_kinds(config, bench.device, dtype)
            if not any(kernels.fault(kind, name) for kind in kinds):
                yield Variant(dtype, name)
        yield Variant(dtype, kernels.DEFAULT, compiled=True)


def checks(bench: Bench) -> None:
    """Both tables; what is wrong counts as failed."""
    torch.compiler.reset()
    _numbers(bench)
    _waiting(bench)


def _numbers(bench: Bench) -> None:
    table = bench.table("Forward against float32 on the CPU, tiny weights", ("variant", "relative L2", "at most", ""))
    sizes = replace(TINY, transformer={**TINY.transformer, **WIDER})
    exact = random_dit(sizes.transformer, CPU, torch.float32)
    inputs = forward_inputs(exact, sizes, 2)
    expected = exact.passes(_passes(inputs))
    torch.backends.cuda.matmul.allow_tf32 = False
    for variant in variants(bench):
        error = math.inf
        with bench.attempt(str(variant)):
            dit = _moved(exact, sizes.transformer, bench.device, variant)
            if variant.compiled:
                dit.compile_blocks(**bench.compiler)
            found = dit.passes(_passes(_on(inputs, bench.device, variant.dtype)))
            error = max(map(_distance, found, expected))
        right = error <= LIMITS[variant.dtype]
        if not right:
            bench.failures.append((str(variant), f"relative L2 {error:.1e}"))
        told = "right" if right else "WRONG"
        table.rows.append((str(variant), f"{error:.1e}", f"{LIMITS[variant.dtype]:.0e}", told))


# Head widths that flash kernels take.
WIDER = {
    "attention_head_dim": 64,
    "cross_attention_dim": 128,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 64,
}


def _waiting(bench: Bench) -> None:
    """Both stages, eager and compiled, with waiting made an error after the first step."""
    table = bench.table("Waiting for the device inside a stage", ("stage", "eager", "compiled"))
    if bench.device.type != "cuda":
        table.rows.append(("not a CUDA device: not seen here", "-", "-"))
        return
    for stage in (1, 2):
        told = []
        for compile_blocks in (False, True):
            dit = random_dit(TINY.transformer, bench.device, bench.dtype)
            if compile_blocks:
                dit.compile_blocks(**bench.compiler)
            try:
                for watched in (False, True):
                    _run_stage(dit, stage, watched)
                told.append("never")
            except Exception as error:
                told.append((str(error).splitlines() or [type(error).__name__])[0][:80])
                what = "waits for the device" if "synchroniz" in str(error) else "does not run"
                bench.failures.append((f"stage {stage} {what}", told[-1]))
        table.rows.append((str(stage), *told))


def _run_stage(dit: DiT, stage: int, watched: bool) -> None:
    shape = TINY.shape.divided(2) if stage == 1 else TINY.shape
    sigmas = shifted_sigmas(shape.tokens, 3) if stage == 1 else sigmas_of(REFINING)
    state = state_of(dit, shape)
    other = contexts(dit, TINY.text, 2) if stage == 1 else None
    denoiser = Denoiser(dit, contexts(dit, TINY.text, 1), other, HQ if stage == 1 else None)
    weight = dit.proj_in.weight
    rope = dit.rope(state.map(lambda s: s.positions), weight.dtype, weight.device)
    calls = iter(range(99))

    def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        if watched and next(calls) > 0:
            torch.cuda.set_sync_debug_mode("error")
        return denoiser(latents, sigma, state, rope)

    with _not_kept(), torch.inference_mode():
        res2s(denoise, state, sigmas)


@contextmanager
def _not_kept() -> Iterator[None]:
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _passes(inputs: Inputs) -> list[Pass]:
    other = inputs.streams.map(lambda stream: replace(stream, context=-stream.context))
    return [Pass(inputs.streams), Pass(other), Pass(inputs.streams, isolated=True)]


def _moved(exact: DiT, config: object, device: torch.device, variant: Variant) -> DiT:
    """A copy of ``exact`` as ``variant`` wants it."""
    with torch.device("meta"):
        dit = DiT(exact.config)
    state = {name: value.to(device, variant.dtype, copy=True) for name, value in exact.state_dict().items()}
    dit.load_state_dict(state, strict=True, assign=True)
    dit.requires_grad_(False).use_attention(variant.kernel)
    return dit


def _on(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    def moved(value: Tensor) -> Tensor:
        return value.to(device, dtype)

    streams = inputs.streams.map(
        lambda stream: replace(
            stream,
            latents=moved(stream.latents),
            timesteps=stream.timesteps.to(device),
            sigma=stream.sigma.to(device),
            context=moved(stream.context),
            rope=type(stream.rope)(*(type(turn)(*map(moved, turn)) for turn in vars(stream.rope).values())),
        )
    )
    return Inputs(streams, inputs.positions)


def _distance(found: AV[Tensor], expected: AV[Tensor]) -> float:
    """Relative L2, the worse of the two; infinite where a value is not finite."""

    def error(a: Tensor, b: Tensor) -> float:
        ratio = ((a.cpu().double() - b.double()).norm() / b.double().norm()).item()
        return float("inf") if math.isnan(ratio) else ratio

    each = found.map(error, expected)
    return max(each.video, each.audio)
