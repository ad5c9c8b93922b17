"""diffusers' LTX2VideoTransformer3DModel, unpatched, as a second oracle: names, shapes and outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from dit_parts import LTX23, SMALL, built, distance, random_streams, random_weights, with_timesteps
from torch import Tensor

from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT, Stream
from ltxpack.runtime.sampling.shape import AV

UNBIASED = {"attention_bias": False, "attention_out_bias": False, "ff_bias": False, "audio_ff_bias": False}


@pytest.mark.parametrize("config", [SMALL, SMALL | UNBIASED, LTX23, LTX23 | UNBIASED])
def test_names_and_shapes_are_diffusers(config: dict[str, Any]) -> None:
    config = config | {"num_layers": 2}
    with torch.device("meta"):
        ours = DiT(DiTConfig.from_dict(config)).state_dict()
        theirs = LTX2VideoTransformer3DModel.from_config(config).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


def per_token(stream: Stream) -> Tensor:
    if stream.timestep_index is None:
        return stream.timesteps.expand(-1, stream.latents.shape[1])
    return stream.timesteps[:, stream.timestep_index]


@pytest.mark.parametrize("index", [None, [0] * 10 + [1] * 20], ids=["one timestep", "images"])
@pytest.mark.parametrize("audio_sigma", [0.7, 0.35])
def test_the_gate_of_what_comes_across_follows_the_other_modality(index: list[int] | None, audio_sigma: float) -> None:
    """Its unmasked sigma, spec 06 section 2. diffusers has other gates as soon as a token's timestep or a modality's
    sigma is another; a hook that hands its two gate modules those sigmas gives ours. All else is as in diffusers;
    isolated and perturbed passes are held to the official model's (test_dit_golden).
    """
    lengths, weights = AV(30, 9), random_weights(SMALL)
    ours, theirs = built(SMALL, weights), LTX2VideoTransformer3DModel.from_config(SMALL).eval()
    theirs.load_state_dict(weights, strict=True)
    positions = AV(torch.rand(1, 3, lengths.video, 2) * 20, torch.rand(1, 1, lengths.audio, 2) * 20)
    streams = random_streams(ours, lengths).map(
        lambda stream, sigma, tables: replace(stream, timesteps=sigma[None], sigma=sigma, rope=tables),
        AV(torch.tensor([0.7]), torch.tensor([audio_sigma])),
        ours.rope(positions, torch.float32, "cpu"),
    )
    video, audio = streams.video, streams.audio
    video = video if index is None else with_timesteps(video, [0.0, 0.7], index)

    def diffusers(cross_timestep: bool = False) -> AV[Tensor]:
        with torch.no_grad():
            return AV(
                *theirs(
                    hidden_states=video.latents,
                    audio_hidden_states=audio.latents,
                    encoder_hidden_states=video.context,
                    audio_encoder_hidden_states=audio.context,
                    timestep=1000 * per_token(video),
                    audio_timestep=1000 * per_token(audio),
                    sigma=1000 * video.sigma,
                    audio_sigma=1000 * audio.sigma,
                    video_coords=positions.video,
                    audio_coords=positions.audio,
                    use_cross_timestep=cross_timestep,
                    return_dict=False,
                )
            )

    found, same = ours(AV(video, audio)), index is None and audio_sigma == 0.7
    for cross_timestep in (False, True):
        assert (distance(found, diffusers(cross_timestep)) <= 1e-5) is same
    for gate, other in ((theirs.av_cross_attn_video_a2v_gate, audio), (theirs.av_cross_attn_audio_v2a_gate, video)):
        gate.register_forward_pre_hook(
            lambda module, args, kwargs, sigma=other.sigma: ((1000 * sigma, *args[1:]), kwargs), with_kwargs=True
        )
    assert distance(found, diffusers()) <= 1e-5
