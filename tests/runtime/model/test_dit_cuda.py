"""The same DiT on a GPU: the CPU's numbers with every kernel, compiled and not, and never a wait of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from dit_parts import LTX23, SMALL, built, cast, distance, random_streams, random_weights, recipe, with_timesteps
from torch import Tensor

from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT, Pass
from ltxpack.runtime.sampling.conditioning import ImageItem, initial_state
from ltxpack.runtime.sampling.guidance import Denoiser, Guidance
from ltxpack.runtime.sampling.recipes import REFINING
from ltxpack.runtime.sampling.sample import res2s
from ltxpack.runtime.sampling.schedule import shifted_sigmas, sigmas_of
from ltxpack.runtime.sampling.shape import AV, VideoShape
from ltxpack.runtime.settings import Settings

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
    passes = recipe(cast(streams, dtype, "cuda"))
    dit.passes(passes)
    for found, wanted in zip(quietly(dit, passes), expected, strict=True):
        assert distance(found, wanted) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", ["as built", *kernels.KERNELS])
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_agrees_with_the_cpu_in_float32(dtype: torch.dtype, name: str, compiled: bool) -> None:
    if name in kernels.KERNELS:
        for kind in kernels.attention_kinds(DiTConfig.from_dict(WIDE), torch.device("cuda"), dtype):
            why = kernels.fault(kind, name)
            if why is not None:
                pytest.skip(f"{name} does not run here: {why}")

    def prepare(dit: DiT) -> None:
        if name in kernels.KERNELS:
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


SHAPE = VideoShape(frames=17, height=64, width=96, fps=24.0)
STG = Settings().guidance.map(lambda guidance: replace(guidance, stg=1.0, stg_blocks=frozenset({1})))


@pytest.mark.parametrize("guidance", [STG, None], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("compiled", [False, True])
@torch.inference_mode()
def test_a_stage_never_waits_for_the_device(guidance: AV[Guidance] | None, compiled: bool) -> None:
    """Sampler, guidance and DiT together, with two images; on a pretended card: test_a_video_of_full_size."""
    config = SMALL | {f"{side}_channels": 128 for side in ("in", "out", "audio_in", "audio_out")}
    dit = built(config, {name: value.to("cuda", torch.bfloat16) for name, value in random_weights(config).items()})
    if compiled:
        dit.compile_blocks(fullgraph=True)
    sigmas = sigmas_of(REFINING) if guidance is None else shifted_sigmas(SHAPE.tokens, 3)
    images = [ImageItem(frame, strength, torch.ones(1, 128, 1, 2, 3)) for frame, strength in ((0, 0.9), (8, 0.5))]
    generator = torch.Generator().manual_seed(0)
    state = initial_state(SHAPE, None, images, float(sigmas[0]), generator, "cuda", torch.bfloat16)
    positive, negative = (
        dit.config.streams.map(lambda stream: torch.randn(1, 7, stream.dim, device="cuda").bfloat16()) for _ in range(2)
    )
    denoiser = Denoiser(dit, positive, negative, guidance)
    rope = dit.rope(state.map(lambda s: s.positions), torch.bfloat16, "cuda")
    for turn in range(2):
        calls = iter(range(99))

        def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
            # The first calls may compile, load kernels and fill the allocator.
            torch.cuda.set_sync_debug_mode("error" if turn and next(calls) else "default")  # noqa: B023
            return denoiser(latents, sigma, state, rope)

        res2s(denoise, state, sigmas)
