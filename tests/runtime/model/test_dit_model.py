"""What the DiT promises of any weights: which inputs matter, which do not, and that the host never waits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dit_parts import SMALL, SMALL_WEIGHTS, built, cast, distance, random_streams, with_timesteps
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxpack.runtime.model.model import DiT, Stream
from ltxpack.runtime.sampling.shape import AV

LENGTHS = AV(12, 5)


@given(index=st.lists(st.integers(0, 2), min_size=12, max_size=12), order=st.permutations([0, 1, 2]))
@settings(max_examples=20, deadline=None)
def test_only_the_timestep_of_each_token_matters(index: list[int], order: list[int]) -> None:
    """Not how many distinct ones there are, nor in which order they stand."""
    dit = built(SMALL, SMALL_WEIGHTS)
    streams = random_streams(dit, LENGTHS)
    values = [0.0, 0.25, 0.9]
    direct = AV(with_timesteps(streams.video, values, index), streams.audio)
    moved = AV(
        with_timesteps(streams.video, [values[k] for k in order], [order.index(i) for i in index]), streams.audio
    )
    spelled = AV(with_timesteps(streams.video, [values[i] for i in index], list(range(12))), streams.audio)
    assert distance(dit(moved), dit(direct)) <= 1e-6
    assert distance(dit(spelled), dit(direct)) <= 1e-6


def test_one_timestep_needs_no_index(dit: DiT) -> None:
    streams = random_streams(dit, LENGTHS)
    indexed = streams.map(lambda stream: replace(stream, timestep_index=torch.zeros(stream.latents.shape[1]).long()))
    assert distance(dit(indexed), dit(streams)) <= 1e-6


def test_a_batch_is_its_samples(dit: DiT) -> None:
    streams = random_streams(dit, LENGTHS, batch=3)

    def sample(stream: Stream, number: int) -> Stream:
        one = slice(number, number + 1)
        return replace(
            stream,
            latents=stream.latents[one],
            timesteps=stream.timesteps[one],
            sigma=stream.sigma[one],
            context=stream.context[one],
        )

    together = dit(streams)
    for number in range(3):
        alone = dit(streams.map(sample, AV(number, number)))
        assert distance(alone, together.map(lambda value, n=number: value[n : n + 1])) <= 1e-5


def test_float64_timesteps_are_scaled_before_they_are_rounded(dit: DiT) -> None:
    """A substep's float64 sigma times 1000, then float32 (spec 06 section 1)."""
    sigma = torch.tensor([0.875123], dtype=torch.float64)
    assert not torch.equal((sigma * 1000).float(), sigma.float() * 1000)
    streams = random_streams(dit, LENGTHS).map(lambda stream: replace(stream, timesteps=sigma[None], sigma=sigma))
    scaled_first = dit(streams)
    plain = replace(dit.config, timestep_scale=1.0, cross_gate_timestep_scale=1.0)
    with torch.device("meta"):
        unscaled = DiT(plain)
    unscaled.load_state_dict(SMALL_WEIGHTS, assign=True)
    rounded = (sigma * 1000).float()
    given_scaled = streams.map(lambda stream: replace(stream, timesteps=rounded[None], sigma=rounded))
    assert distance(scaled_first, unscaled(given_scaled)) == 0


@pytest.mark.parametrize("isolated", [False, True])
def test_isolated_means_neither_modality_sees_the_other(dit: DiT, isolated: bool) -> None:
    streams = random_streams(dit, LENGTHS)
    other = random_streams(dit, LENGTHS, seed=1)
    base = dit(streams, isolated=isolated)
    swapped_audio = dit(AV(streams.video, other.audio), isolated=isolated)
    swapped_video = dit(AV(other.video, streams.audio), isolated=isolated)
    assert torch.equal(base.video, swapped_audio.video) is isolated
    assert torch.equal(base.audio, swapped_video.audio) is isolated


def test_a_perturbed_modality_without_company_no_longer_mixes_its_tokens(dit: DiT) -> None:
    """With every block perturbed and isolated, a token's output depends on no other token."""
    streams = random_streams(dit, LENGTHS)
    every = frozenset(range(dit.config.num_layers))
    last = torch.tensor([-1])
    changed = streams.map(lambda stream: replace(stream, latents=stream.latents.index_fill(1, last, 0.5)))
    base = dit(streams, isolated=True, perturbed=AV(every, every))
    found = dit(changed, isolated=True, perturbed=AV(every, every))
    assert torch.equal(found.video[:, :-1], base.video[:, :-1]) and not torch.equal(found.video, base.video)
    mixing = dit(changed, isolated=True)
    assert not torch.equal(mixing.video[:, :-1], dit(streams, isolated=True).video[:, :-1])


def test_tables_stored_in_float32_do_not_promote_the_rest() -> None:
    """The published file is reported to hold them so (spec 01 section 3)."""
    rounded = {name: value.bfloat16() for name, value in SMALL_WEIGHTS.items()}
    kept = {name: value.float() if "table" in name else value for name, value in rounded.items()}
    assert any("table" in name for name in kept)
    streams = cast(random_streams(built(SMALL, rounded), LENGTHS), torch.bfloat16)
    found = built(SMALL, kept)(streams)
    assert found.video.dtype == torch.bfloat16
    assert distance(found, built(SMALL, rounded)(streams)) == 0
