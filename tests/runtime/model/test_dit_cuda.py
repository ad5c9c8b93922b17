"""The same DiT on a GPU: CPU's numbers with every kernel, compiled and not, and no wait of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from dit_parts import LTX23, SMALL, built, cast, distance, random_streams, random_weights, recipe, with_timesteps
from torch import Tensor

from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT, Pass
from ltxpack.runtime.sampling.shape import AV

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
