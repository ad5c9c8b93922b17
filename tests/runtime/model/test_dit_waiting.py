"""Nothing in a stage makes the host wait for the device: sampler, guidance and DiT together, as the pipeline runs them.

Tensors on the meta device have no values, so reading one back raises. What a CUDA device would wait for besides, a
copy between host and device, is seen by watching every operation's devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from dit_parts import SMALL, random_weights
from memory_meter import Watch
from torch import Tensor

from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.sampling.conditioning import ImageItem, LatentState, initial_state
from ltxpack.runtime.sampling.guidance import Denoiser, Guidance
from ltxpack.runtime.sampling.recipes import REFINING
from ltxpack.runtime.sampling.sample import res2s
from ltxpack.runtime.sampling.schedule import shifted_sigmas, sigmas_of
from ltxpack.runtime.sampling.shape import AV, VideoShape
from ltxpack.runtime.settings import Settings

HQ = Settings().guidance

SHAPE = VideoShape(frames=17, height=64, width=96, fps=24.0)
CONFIG = SMALL | {"in_channels": 128, "out_channels": 128, "audio_in_channels": 128, "audio_out_channels": 128}
STEPS = 3
STG = HQ.map(lambda guidance: replace(guidance, stg=1.0, stg_blocks=frozenset({1})))


class Crossings:
    """The dtypes of what crosses between two devices while ``armed``."""

    def __init__(self, armed: bool) -> None:
        self.armed = armed
        self.seen: list[torch.dtype] = []

    def note(self, given: list[Tensor], made: list[Tensor]) -> None:
        tensors = [*given, *made]
        if self.armed and len({tensor.device.type for tensor in tensors}) > 1:
            self.seen.append(tensors[0].dtype)


def model(device: str) -> DiT:
    with torch.device("meta"):
        dit = DiT(DiTConfig.from_dict(CONFIG))
    if device != "meta":
        dit.load_state_dict({name: value.to(device) for name, value in random_weights(CONFIG).items()}, assign=True)
    return dit.bfloat16()


def contexts(dit: DiT, device: str) -> AV[Tensor]:
    return dit.config.streams.map(lambda stream: torch.randn(1, 7, stream.dim, device=device).bfloat16())


def state_of(device: str, noise: float, images: bool) -> AV[LatentState]:
    items = [ImageItem(0, 0.9, torch.ones(1, 128, 1, 2, 3)), ImageItem(8, 0.5, torch.ones(1, 128, 1, 2, 3))]
    generator = torch.Generator().manual_seed(0)
    return initial_state(SHAPE, None, items if images else [], noise, generator, device, torch.bfloat16)


def run_stage(
    dit: DiT,
    device: str,
    guidance: AV[Guidance] | None,
    images: bool,
    around: Callable[[int], None] = lambda call: None,
) -> tuple[AV[Tensor], list[int]]:
    """One stage as the pipeline runs it; ``around`` is told before each call of the denoiser. Steps told at the end."""
    sigmas = sigmas_of(REFINING) if guidance is None else shifted_sigmas(SHAPE.tokens, STEPS)
    state = state_of(device, float(sigmas[0]), images)
    denoiser = Denoiser(dit, contexts(dit, device), contexts(dit, device), guidance)
    rope = dit.rope(state.map(lambda s: s.positions), torch.bfloat16, device)
    told: list[int] = []
    calls = iter(range(99))

    def denoise(latents: AV[Tensor], sigma: Tensor) -> AV[Tensor]:
        around(next(calls))
        return denoiser(latents, sigma, state, rope)

    noise_device = "cpu" if device == "meta" else None
    tokens = res2s(denoise, state, sigmas, noise_device=noise_device, on_step=lambda done, total: told.append(done))
    return tokens, told


@pytest.mark.parametrize(
    ("guidance", "images"), [(HQ, False), (STG, True), (None, True)], ids=["stage 1", "with STG", "stage 2"]
)
def test_no_value_is_read_back_and_nothing_is_copied(guidance: AV[Guidance] | None, images: bool) -> None:
    dit = model("meta")
    watch = Crossings(armed=False)

    def arm(call: int) -> None:
        watch.armed = True

    with torch.inference_mode(), Watch(watch.note):
        tokens, told = run_stage(dit, "meta", guidance, images, arm)
    assert tokens.map(lambda t: (t.device.type, t.dtype)) == AV(("meta", torch.bfloat16), ("meta", torch.bfloat16))
    assert told == list(range(1, STEPS + 1))
    # The meta device has no random generator: two draws of two modalities per step come from the CPU.
    assert watch.seen == [torch.float64] * (4 * STEPS)


READING = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.isnan().any()),
    "cpu": lambda t: t.cpu(),
    "float": lambda t: float(t.std()),
    "nonzero": lambda t: t.nonzero(),
    "tolist": lambda t: t.flatten()[:2].tolist(),
    "unique": lambda t: t.unique(),
    "masked": lambda t: t[t > 0],
}


@pytest.mark.parametrize("how", READING)
def test_reading_a_value_back_would_be_seen(how: str) -> None:
    """The test above can fail."""
    dit = model("meta")
    dit.blocks()[1].register_forward_hook(lambda module, args, out: READING[how](out[0].video) and None)
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_stage(dit, "meta", HQ, False)


def test_a_copy_from_the_host_would_be_seen() -> None:
    dit = model("meta")
    dit.blocks()[1].register_forward_hook(lambda module, args, out: torch.ones(2).to("meta") is None or None)
    watch = Crossings(armed=True)
    with torch.inference_mode(), Watch(watch.note):
        run_stage(dit, "meta", None, False)
    assert torch.float32 in watch.seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("guidance", [STG, None], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_device_is_never_waited_for(guidance: AV[Guidance] | None, compiled: bool) -> None:
    dit = model("cuda")
    if compiled:
        dit.compile_blocks(fullgraph=True)

    def arm(call: int) -> None:
        # The first calls may compile, load kernels and fill the allocator.
        torch.cuda.set_sync_debug_mode("error" if call > 0 else "default")

    try:
        with torch.inference_mode():
            run_stage(dit, "cuda", guidance, True)
            run_stage(dit, "cuda", guidance, True, arm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
