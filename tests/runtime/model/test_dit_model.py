"""What the DiT promises of any weights: which inputs matter, which do not, and what passes together share."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from dit_parts import (
    SMALL,
    SMALL_WEIGHTS,
    built,
    cast,
    distance,
    random_streams,
    random_weights,
    recipe,
    with_timesteps,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ltxpack.runtime.calibration import SAME_INPUT, LargestInputs, linears
from ltxpack.runtime.model.block import TransformerBlock
from ltxpack.runtime.model.model import DiT, Pass, Stream
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


# Passes that go through the blocks together


LAYERS = 3
CONFIG = SMALL | {"num_layers": LAYERS}
NONE: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def deep() -> DiT:
    return built(CONFIG, random_weights(CONFIG))


def equal(found: AV[Tensor], expected: AV[Tensor]) -> bool:
    return torch.equal(found.video, expected.video) and torch.equal(found.audio, expected.audio)


def alone(deep: DiT, each: Pass) -> AV[Tensor]:
    return deep(each.streams, isolated=each.isolated, perturbed=each.perturbed)


@pytest.mark.parametrize("masked", [False, True])
def test_each_pass_gives_what_it_gives_alone(deep: DiT, masked: bool) -> None:
    streams = random_streams(deep, LENGTHS)
    if masked:
        streams = AV(with_timesteps(streams.video, [0.0, 0.9], [0] * 4 + [1] * 8), streams.audio)
    perturbed = Pass(streams, perturbed=AV(frozenset({1}), frozenset({0, 2})))
    passes = [*recipe(streams), perturbed, replace(perturbed, isolated=True)]
    expected = [alone(deep, each) for each in passes]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [0, 0, 2]):
        found = deep.passes([passes[i] for i in order])
        assert all(equal(one, expected[i]) for one, i in zip(found, order, strict=True)), order
    assert not any(equal(expected[0], one) for one in expected[1:]), "the passes differ, or this shows nothing"


def calls(deep: DiT, passes: list[Pass]) -> Counter[str]:
    """How often each layer and each block ran."""
    found: Counter[str] = Counter()
    layers = {name: module for name, module in deep.named_modules() if isinstance(module, nn.Linear | TransformerBlock)}
    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: found.update([name]))
        for name, module in layers.items()
    ]
    deep.passes(passes)
    for hook in hooks:
        hook.remove()
    return found


def test_the_recipe_shares_text_and_the_beginning_of_block_0(deep: DiT) -> None:
    found = calls(deep, recipe(random_streams(deep, LENGTHS)))
    for number in range(LAYERS):
        block = f"transformer_blocks.{number}"
        for modality in ("", "audio_"):
            assert found[f"{block}.{modality}attn2.to_k"] == found[f"{block}.{modality}attn2.to_v"] == 2
            assert found[f"{block}.{modality}attn1.to_q"] == (2 if number == 0 else 3)
            assert found[f"{block}.{modality}attn2.to_q"] == (2 if number == 0 else 3)
            assert found[f"{block}.{modality}ff.net.2"] == 3
        assert found[block] == 1, "streamed weights come once for all passes: in a block's hook"
        assert found[f"{block}.audio_to_video_attn.to_q"] == found[f"{block}.video_to_audio_attn.to_q"] == 2
    assert found["proj_in"] == found["time_embed.linear"] == found["audio_prompt_adaln.linear"] == 2


def test_a_perturbed_pass_parts_at_its_first_perturbed_block(deep: DiT) -> None:
    streams = random_streams(deep, LENGTHS)
    found = calls(deep, [Pass(streams), Pass(streams, perturbed=AV(frozenset({1}), NONE))])
    assert [found[f"transformer_blocks.{n}.ff.net.2"] for n in range(LAYERS)] == [1, 2, 2]
    assert [found[f"transformer_blocks.{n}.attn1.to_q"] for n in range(LAYERS)] == [1, 1, 2]
    assert [found[f"transformer_blocks.{n}.attn2.to_k"] for n in range(LAYERS)] == [1, 1, 1]


def test_the_same_pass_twice_costs_one(deep: DiT) -> None:
    streams = random_streams(deep, LENGTHS)
    assert set(calls(deep, [Pass(streams), Pass(streams)]) - calls(deep, [Pass(streams)])) == {
        "proj_out",
        "audio_proj_out",
    }


def test_the_largest_inputs_are_those_that_hooks_see(deep: DiT) -> None:
    """Of every linear of the blocks, in all passes; what shares an input shares its number, though STG leaves q out."""
    seen: dict[str, float] = defaultdict(float)

    def see(name: str, x: Tensor) -> None:
        seen[name] = max(seen[name], x.abs().max().item())

    for name, module in deep.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks."):
            module.register_forward_pre_hook(lambda module, args, name=name: see(name, args[0]))
    largest = LargestInputs(torch.device("cpu"))
    largest.watch(deep)
    streams = random_streams(deep, LENGTHS)
    for block in range(LAYERS):
        perturbed = frozenset(range(block, LAYERS))
        deep.passes([*recipe(streams), Pass(streams, perturbed=AV(perturbed, perturbed))])
    found = largest.read()
    assert sorted(found) == sorted(seen) == linears(LAYERS) and len(found) == 34 * LAYERS
    for number in range(LAYERS):
        for names in SAME_INPUT.values():
            group = [f"transformer_blocks.{number}.{name}" for name in names]
            assert {found[name] for name in group} == {max(seen[name] for name in group)}
    largest.clear()
    assert not any(largest.read().values())
