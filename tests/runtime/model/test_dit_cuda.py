"""The same DiT on a GPU: CPU's numbers with every kernel, compiled and not, and no wait of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from dit_parts import LTX23, SMALL, built, random_streams, random_weights, with_timesteps
from support import relative_l2
from torch import Tensor

from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT, Pass, Stream
from ltxpack.runtime.model.rope import RopeTables, Rotation
from ltxpack.runtime.sampling.av import AV

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTHS = AV(96, 9)
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# Head widths that every kernel takes.
WIDE = SMALL | {
    "attention_head_dim": 64,
    "cross_attention_dim": 128,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 64,
}


@pytest.fixture(autouse=True)
def waiting_is_an_error() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.compiler.reset()
    yield
    torch.cuda.set_sync_debug_mode("default")


def moved(streams: AV[Stream], dtype: torch.dtype) -> AV[Stream]:
    """``streams`` on the GPU with latents, context and tables in ``dtype``."""

    def turn(rotation: Rotation) -> Rotation:
        return Rotation(*(part.to("cuda", dtype) for part in rotation))

    return streams.map(
        lambda stream: replace(
            stream,
            latents=stream.latents.to("cuda", dtype),
            timesteps=stream.timesteps.cuda(),
            timestep_index=None if stream.timestep_index is None else stream.timestep_index.cuda(),
            sigma=stream.sigma.cuda(),
            context=stream.context.to("cuda", dtype),
            rope=RopeTables(turn(stream.rope.self_attention), turn(stream.rope.cross_attention)),
        )
    )


def recipe(streams: AV[Stream]) -> list[Pass]:
    """cond, uncond, isolated."""
    other = streams.map(lambda stream: replace(stream, context=-stream.context))
    return [Pass(streams), Pass(other), Pass(streams, isolated=True)]


def quietly(dit: DiT, passes: list[Pass]) -> list[AV[Tensor]]:
    """A forward during which waiting for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    found = dit.passes(passes)
    torch.cuda.set_sync_debug_mode("default")
    return [each.map(lambda value: value.cpu()) for each in found]


def check(dtype: torch.dtype, prepare: Callable[[DiT], object]) -> None:
    """The passes of a guided step with image conditioning, on the GPU as ``prepare`` makes it, and on the CPU."""
    weights = random_weights(WIDE)
    cpu = built(WIDE, weights)
    streams = random_streams(cpu, LENGTHS)
    streams = AV(with_timesteps(streams.video, [0.0, 0.9], [0] * 6 + [1] * 90), streams.audio)
    expected = cpu.passes(recipe(streams))
    dit = built(WIDE, {name: value.to("cuda", dtype) for name, value in weights.items()})
    prepare(dit)
    passes = recipe(moved(streams, dtype))
    dit.passes(passes)
    for found, wanted in zip(quietly(dit, passes), expected, strict=True):
        assert relative_l2(found.video, wanted.video) <= LIMITS[dtype]
        assert relative_l2(found.audio, wanted.audio) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_agrees_with_the_cpu_in_float32(dtype: torch.dtype, compiled: bool) -> None:
    check(dtype, lambda dit: dit.compile_blocks() if compiled else None)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", kernels.KERNELS)
@pytest.mark.parametrize("compiled", [False, True])
def test_every_kernel_that_runs_here_agrees(dtype: torch.dtype, name: str, compiled: bool) -> None:
    for kind in kernels.attention_kinds(DiTConfig.from_dict(WIDE), torch.device("cuda"), dtype):
        why = kernels.fault(kind, name)
        if why is not None:
            pytest.skip(f"{name} does not run here: {why}")

    def prepare(dit: DiT) -> None:
        dit.use_attention(name)
        if compiled:
            dit.compile_blocks()

    check(dtype, prepare)


def test_a_kernel_is_chosen_by_measuring() -> None:
    kinds = kernels.attention_kinds(DiTConfig.from_dict(LTX23), torch.device("cuda"), torch.bfloat16)
    choice = kernels.choose(kinds)
    for kind in kinds:
        found = kernels.measured(kind, kernels.MEASURED)
        assert found.best == choice.kernels[kind.name]
        assert found.milliseconds[found.best] <= kernels.MARGIN * min(found.milliseconds.values())
