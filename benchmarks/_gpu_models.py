"""Models of full size with random weights, made on the device: nothing is read from a disk.

Never zeros: kernels run faster on them than on real data.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from _gpu_sizes import Config, Sizes
from torch import Tensor, nn

from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT, Stream
from ltxpack.runtime.sampling.conditioning import LatentState, initial_state
from ltxpack.runtime.sampling.shape import AV, VideoShape

MULTIPLIER = 1000
# How much around what they are at rest: tables and biases 0, norms 1.
SPREAD = 0.1


def installed(package: str) -> bool:
    """Whether ``package`` can be imported, without doing so."""
    return importlib.util.find_spec(package) is not None


def random_dit(config: Config, device: torch.device, dtype: torch.dtype, seed: int = 0) -> DiT:
    """Our DiT with weights under which activations keep their size and every part moves the output."""
    with torch.device("meta"):
        dit = DiT(DiTConfig.from_dict(config))
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=generator, device=device, dtype=dtype)
        if "table" not in name and like.ndim > 1:
            return values.div_(like.shape[-1] ** 0.5)
        return values.mul_(SPREAD).add_(1.0 if "norm" in name else 0.0)

    state = {name: draw(name, value) for name, value in dit.state_dict().items()}
    dit.load_state_dict(state, strict=True, assign=True)
    return dit.requires_grad_(False).eval()


def diffusers_dit(config: Config, ours: DiT) -> nn.Module:
    """diffusers' model holding the very tensors of ``ours``."""
    from diffusers import LTX2VideoTransformer3DModel

    with torch.device("meta"):
        theirs: nn.Module = LTX2VideoTransformer3DModel.from_config(dict(config))
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return theirs.requires_grad_(False).eval()


@dataclass(frozen=True)
class Inputs:
    """A forward's inputs: for ours, and the positions diffusers wants instead of tables."""

    streams: AV[Stream]
    positions: AV[Tensor]

    def for_diffusers(self) -> dict[str, Any]:
        """The same as diffusers' arguments; every token at the same timestep."""
        video, audio = self.streams.video, self.streams.audio
        return {
            "hidden_states": video.latents,
            "audio_hidden_states": audio.latents,
            "encoder_hidden_states": video.context,
            "audio_encoder_hidden_states": audio.context,
            "timestep": MULTIPLIER * video.timesteps.expand(-1, video.latents.shape[1]),
            "audio_timestep": MULTIPLIER * audio.timesteps.expand(-1, audio.latents.shape[1]),
            "sigma": MULTIPLIER * video.sigma,
            "audio_sigma": MULTIPLIER * audio.sigma,
            "video_coords": self.positions.video,
            "audio_coords": self.positions.audio,
            "return_dict": False,
        }


def contexts(dit: DiT, tokens: int, seed: int) -> AV[Tensor]:
    """Random text contexts ``[1, tokens, D]``."""
    weight = dit.proj_in.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    return dit.config.streams.map(
        lambda stream: torch.randn(
            (1, tokens, stream.dim), generator=generator, device=weight.device, dtype=weight.dtype
        )
    )


def state_of(dit: DiT, shape: VideoShape, noise: float = 1.0, start: AV[Tensor] | None = None) -> AV[LatentState]:
    """The first noise of a text-to-video stage."""
    weight = dit.proj_in.weight
    generator = torch.Generator(weight.device).manual_seed(7)
    return initial_state(shape, start, [], noise, generator, weight.device, weight.dtype)


def forward_inputs(dit: DiT, sizes: Sizes, stage: int, sigma: float = 0.7) -> Inputs:
    """What a forward of ``stage`` is given at ``sigma``."""
    weight = dit.proj_in.weight
    state = state_of(dit, sizes.shape.divided(2) if stage == 1 else sizes.shape)
    positions = state.map(lambda s: s.positions)
    level = torch.full((1,), sigma, device=weight.device)
    streams = state.map(
        lambda s, context, tables: Stream(s.latents, level[None], None, level, context, tables),
        contexts(dit, sizes.text, seed=1),
        dit.rope(positions, weight.dtype, weight.device),
    )
    return Inputs(streams, positions)


@dataclass
class Codecs:
    """diffusers' codec modules with random weights."""

    vae: Any
    audio_vae: Any
    vocoder: Any
    upsampler: Any


def random_codecs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Codecs:
    """As diffusers initialises them; the vocoder in float32, as it runs."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel, LTX2VocoderWithBWE

    torch.manual_seed(0)
    with torch.device(device):
        made = Codecs(
            AutoencoderKLLTX2Video(**sizes.vae),
            AutoencoderKLLTX2Audio(**sizes.audio_vae),
            LTX2VocoderWithBWE(**sizes.vocoder),
            LTX2LatentUpsamplerModel(**sizes.upsampler),
        )
    for module in (made.vae, made.audio_vae, made.upsampler):
        nn.Module.to(module, dtype)  # not diffusers' own, which warns
    for module in (made.vae, made.audio_vae, made.vocoder, made.upsampler):
        module.requires_grad_(False).eval()
    return made
