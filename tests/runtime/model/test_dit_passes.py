"""Passes that go through the blocks together: each gives what it gives alone, and nothing is done twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from dit_parts import SMALL, built, full_size, random_streams, random_weights, recipe, with_timesteps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ltxpack.runtime.model.block import TransformerBlock
from ltxpack.runtime.model.model import DiT, Pass
from ltxpack.runtime.sampling.shape import AV

LENGTHS = AV(12, 5)
LAYERS = 3
CONFIG = SMALL | {"num_layers": LAYERS}
NONE: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def dit() -> DiT:
    return built(CONFIG, random_weights(CONFIG))


def equal(found: AV[Tensor], expected: AV[Tensor]) -> bool:
    return torch.equal(found.video, expected.video) and torch.equal(found.audio, expected.audio)


def alone(dit: DiT, each: Pass) -> AV[Tensor]:
    return dit(each.streams, isolated=each.isolated, perturbed=each.perturbed)


@pytest.mark.parametrize("masked", [False, True])
def test_each_pass_gives_what_it_gives_alone(dit: DiT, masked: bool) -> None:
    streams = random_streams(dit, LENGTHS)
    if masked:
        streams = AV(with_timesteps(streams.video, [0.0, 0.9], [0] * 4 + [1] * 8), streams.audio)
    perturbed = Pass(streams, perturbed=AV(frozenset({1}), frozenset({0, 2})))
    passes = [*recipe(streams), perturbed, replace(perturbed, isolated=True)]
    expected = [alone(dit, each) for each in passes]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [0, 0, 2]):
        found = dit.passes([passes[i] for i in order])
        assert all(equal(one, expected[i]) for one, i in zip(found, order, strict=True)), order
    assert not any(equal(expected[0], one) for one in expected[1:]), "the passes differ, or this shows nothing"


def calls(dit: DiT, passes: list[Pass]) -> Counter[str]:
    """How often each layer and each block ran."""
    found: Counter[str] = Counter()
    layers = {name: module for name, module in dit.named_modules() if isinstance(module, nn.Linear | TransformerBlock)}
    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: found.update([name]))
        for name, module in layers.items()
    ]
    dit.passes(passes)
    for hook in hooks:
        hook.remove()
    return found


def test_the_recipe_shares_text_and_the_beginning_of_block_0(dit: DiT) -> None:
    found = calls(dit, recipe(random_streams(dit, LENGTHS)))
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


def test_a_perturbed_pass_parts_at_its_first_perturbed_block(dit: DiT) -> None:
    streams = random_streams(dit, LENGTHS)
    found = calls(dit, [Pass(streams), Pass(streams, perturbed=AV(frozenset({1}), NONE))])
    assert [found[f"transformer_blocks.{n}.ff.net.2"] for n in range(LAYERS)] == [1, 2, 2]
    assert [found[f"transformer_blocks.{n}.attn1.to_q"] for n in range(LAYERS)] == [1, 1, 2]
    assert [found[f"transformer_blocks.{n}.attn2.to_k"] for n in range(LAYERS)] == [1, 1, 1]


def test_the_same_pass_twice_costs_one(dit: DiT) -> None:
    streams = random_streams(dit, LENGTHS)
    assert set(calls(dit, [Pass(streams), Pass(streams)]) - calls(dit, [Pass(streams)])) == {
        "proj_out",
        "audio_proj_out",
    }


def test_what_sharing_saves_at_full_width() -> None:
    """Text keys and values, 2·2·1024·(4096² + 2048²) per block; and block 0 up to a2v, of the 48 as of these two."""
    dit, streams = full_size(timesteps=1)

    def flops(passes: list[Pass]) -> int:
        with FlopCounterMode(display=False) as counter:
            dit.passes(passes)
        return int(counter.get_total_flops())

    passes = recipe(streams)
    saved = sum(flops([each]) for each in passes) - flops(passes)
    text = 2 * 2 * 1024 * (4096**2 + 2048**2)
    video, audio = (
        # q, k, v, out and the gate of self-attention; q, out and gate of text attention; scores and values of both.
        2 * count * dim * (6 * dim + 2 * 32) + 4 * count * (count + 1024) * dim
        for count, dim in ((8160, 4096), (126, 2048))
    )
    embedding = 2 * 128 * (8160 * 4096 + 126 * 2048)
    adaln = sum(2 * (256 * dim + dim * dim + rows * dim * dim) for dim in (4096, 2048) for rows in (9, 2, 4, 1))
    assert saved == 2 * text + video + audio + embedding + adaln
    assert saved / 1e12 == pytest.approx(2.91 + 2 * 0.086, rel=0.01)
