"""diffusers' LTX2VideoTransformer3DModel, unpatched, as a second oracle: names, shapes and outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from dit_parts import LTX23, SMALL, built, distance, random_streams, random_weights, with_timesteps
from support import REPOSITORY
from torch import Tensor

from ltxpack.ltx23.renames import TRANSFORMER, component_of
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT, Stream
from ltxpack.runtime.sampling.shape import AV

INVENTORY = REPOSITORY.parent / "shared" / "spec" / "ltx23_inventory.json"
UNBIASED = {"attention_bias": False, "attention_out_bias": False, "ff_bias": False, "audio_ff_bias": False}
LENGTHS = AV(30, 9)


class Pair:
    """Our DiT and diffusers' with the same weights, and a call of each on the same streams."""

    def __init__(self, config: dict[str, Any]) -> None:
        weights = random_weights(config)
        self.ours = built(config, weights)
        self.theirs = LTX2VideoTransformer3DModel.from_config(config).eval()
        self.theirs.load_state_dict(weights, strict=True)
        self.positions = AV(torch.rand(1, 3, LENGTHS.video, 2) * 20, torch.rand(1, 1, LENGTHS.audio, 2) * 20)
        rope = self.ours.rope(self.positions, torch.float32, "cpu")
        self.streams = random_streams(self.ours, LENGTHS, batch=2).map(
            lambda stream, tables: replace(stream, rope=tables), rope
        )

    def diffusers(self, streams: AV[Stream], **arguments: Any) -> AV[Tensor]:
        video, audio = streams.video, streams.audio
        batch = video.latents.shape[0]
        with torch.no_grad():
            found = self.theirs(
                hidden_states=video.latents,
                audio_hidden_states=audio.latents,
                encoder_hidden_states=video.context,
                audio_encoder_hidden_states=audio.context,
                timestep=1000 * per_token(video),
                audio_timestep=1000 * per_token(audio),
                sigma=1000 * video.sigma,
                audio_sigma=1000 * audio.sigma,
                video_coords=self.positions.video.expand(batch, -1, -1, -1),
                audio_coords=self.positions.audio.expand(batch, -1, -1, -1),
                return_dict=False,
                **arguments,
            )
        return AV(*found)


def per_token(stream: Stream) -> Tensor:
    if stream.timestep_index is None:
        return stream.timesteps.expand(-1, stream.latents.shape[1])
    return stream.timesteps[:, stream.timestep_index]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(SMALL)


@pytest.mark.parametrize("config", [SMALL, SMALL | UNBIASED, LTX23, LTX23 | UNBIASED])
def test_names_and_shapes_are_diffusers(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours = DiT(DiTConfig.from_dict(config)).state_dict()
        theirs = LTX2VideoTransformer3DModel.from_config(config).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


def test_ltx_2_3_has_18_989_billion_parameters() -> None:
    """Spec 01 section 3 and 07 section 4."""
    with torch.device("meta"):
        dit = DiT(DiTConfig.from_dict(LTX23))
    assert len(dit.state_dict()) == 48 * 86 + 58
    assert round(sum(value.numel() for value in dit.parameters()) / 1e6) == 18989
    assert list(dit.buffers()) == []


@pytest.mark.skipif(not INVENTORY.is_file(), reason="the tensor inventory is not on this machine")
def test_names_and_shapes_are_those_of_the_published_file() -> None:
    listed = json.loads(INVENTORY.read_text())["transformer"]
    expected = {
        TRANSFORMER.rename(key): tuple(shape) for key, shape in listed.items() if component_of(key) == "transformer"
    }
    with torch.device("meta"):
        found = {name: tuple(value.shape) for name, value in DiT(DiTConfig.from_dict(LTX23)).state_dict().items()}
    assert found == expected


def test_one_timestep_for_all_tokens(pair: Pair) -> None:
    assert distance(pair.ours(pair.streams), pair.diffusers(pair.streams)) <= 1e-5


def test_modalities_at_different_sigmas_need_the_gate_of_the_other(pair: Pair) -> None:
    """Even without masks diffusers' own-timestep gates differ from spec 06 section 2 once the sigmas do."""
    audio = pair.streams.audio
    streams = AV(pair.streams.video, replace(audio, timesteps=audio.timesteps / 2, sigma=audio.sigma / 2))
    assert distance(pair.ours(streams), pair.diffusers(streams)) > 1e-3
    assert distance(pair.ours(streams), with_gates_of_the_other(pair, streams)) <= 1e-5


def test_isolated(pair: Pair) -> None:
    found = pair.ours(pair.streams, isolated=True)
    assert distance(found, pair.diffusers(pair.streams, isolate_modalities=True)) <= 1e-5
    assert distance(found, pair.ours(pair.streams)) > 1e-3


def test_perturbed_blocks(pair: Pair) -> None:
    found = pair.ours(pair.streams, perturbed=AV(frozenset({1}), frozenset({1})))
    assert distance(found, pair.diffusers(pair.streams, spatio_temporal_guidance_blocks=[1])) <= 1e-5
    video_only = pair.ours(pair.streams, perturbed=AV(frozenset({1}), frozenset()))
    assert distance(found, video_only) > 1e-3
    assert distance(video_only, pair.ours(pair.streams)) > 1e-3


def test_where_diffusers_differs_with_image_conditioning(pair: Pair) -> None:
    """Spec 06 section 2: the gate of what comes across follows the other modality's unmasked sigma. diffusers
    has both extremes and not this middle; a hook that hands its two gate modules those sigmas gives it.
    """
    sigma = torch.tensor([0.7])
    index = [0] * 10 + [1] * (LENGTHS.video - 10)
    base = random_streams(pair.ours, LENGTHS).map(
        lambda stream, given: replace(stream, timesteps=sigma[None], sigma=sigma, rope=given.rope), pair.streams
    )
    streams = AV(with_timesteps(base.video, [0.0, 0.7], index), base.audio)
    found = pair.ours(streams)
    for cross in (False, True):
        assert distance(found, pair.diffusers(streams, use_cross_timestep=cross)) > 1e-3
    assert distance(found, with_gates_of_the_other(pair, streams)) <= 1e-5


def with_gates_of_the_other(pair: Pair, streams: AV[Stream]) -> AV[Tensor]:
    """diffusers with its two gate modules given the other modality's sigma."""
    gates = AV(pair.theirs.av_cross_attn_video_a2v_gate, pair.theirs.av_cross_attn_audio_v2a_gate)
    hooks = gates.map(
        lambda gate, other: gate.register_forward_pre_hook(
            lambda module, args, kwargs: ((1000 * other.sigma, *args[1:]), kwargs), with_kwargs=True
        ),
        AV(streams.audio, streams.video),
    )
    try:
        return pair.diffusers(streams)
    finally:
        hooks.map(lambda hook: hook.remove())
