"""Ranks that share the tokens of a pass make what one device makes, and move the bytes that the formula counts."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_parts import (
    LTX23,
    built,
    distance,
    golden_dit,
    random_streams,
    random_weights,
    recipe,
    tracing,
    with_timesteps,
)
from forked_ranks import Traffic, of_ranks
from golden_runs import errors_of_stage, runs
from PIL import Image
from support import Notes, load, relative_l2
from torch import Tensor

from ltxpack import Pipeline
from ltxpack.errors import UsageError
from ltxpack.runtime.model.block import PLAIN
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import Pass
from ltxpack.runtime.parallel import exchange, schemes
from ltxpack.runtime.parallel.exchange import Exchange
from ltxpack.runtime.parallel.front import Front, OwnTokens
from ltxpack.runtime.parallel.ranks import ALONE
from ltxpack.runtime.parallel.schemes import Split
from ltxpack.runtime.sampling.conditioning import ImageItem, initial_state
from ltxpack.runtime.sampling.guidance import Denoiser
from ltxpack.runtime.sampling.recipes import RECIPES
from ltxpack.runtime.sampling.sample import SAMPLERS
from ltxpack.runtime.sampling.schedule import sigmas_of
from ltxpack.runtime.sampling.shape import AV, VideoShape
from ltxpack.runtime.settings import Settings
from ltxpack.runtime.weights.plan import StageWork, Work

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
# Twelve heads divide by 2, 3 and 4.
TWELVE = LTX23 | {
    "num_attention_heads": 12,
    "attention_head_dim": 4,
    "cross_attention_dim": 48,
    "audio_num_attention_heads": 12,
    "audio_attention_head_dim": 2,
    "audio_cross_attention_dim": 24,
    "num_layers": 2,
}
CONFIG = DiTConfig.from_dict(TWELVE)
DIT = built(TWELVE, random_weights(TWELVE))
SPLITS = {2: [Split(1, 2)], 3: [Split(1, 3), Split(1, 2)], 4: [Split(1, 4), Split(2, 2)]}


def passes(tokens: int) -> list[Pass]:
    """All kinds that a step may have: of two prompts, isolated, perturbed in either modality, one of them off."""
    streams = random_streams(DIT, AV(tokens, 5))
    index = [token % 2 for token in range(tokens)]
    streams = AV(with_timesteps(streams.video, [0.2, 0.9], index), streams.audio)
    other = random_streams(DIT, AV(tokens, 5), seed=1)
    perturbed = AV(frozenset({0}), frozenset({1}))
    return [Pass(streams), Pass(other), Pass(streams, perturbed=perturbed), Pass(streams, isolated=True)]


@pytest.mark.parametrize("size", SPLITS)
def test_a_pass_over_ranks_is_that_of_one_device(size: int) -> None:
    """Whatever the number of tokens: fewer than ranks, and with padding on one of them or on several."""
    steps = [passes(tokens) for tokens in (1, 3, 8, 9, 25)]
    expected = [DIT.passes(step) for step in steps]

    def work(ranks: Exchange) -> list[float]:
        return [
            distance(one, other)
            for split in SPLITS[size]
            for step, alone in zip(steps, expected, strict=True)
            for one, other in zip(Front(DIT, ranks, split).passes(step), alone, strict=True)
        ]

    found = of_ranks(size, work)
    assert max(map(max, found)) <= 1e-6


@pytest.mark.parametrize("split", [Split(2, 1), Split(1, 2)], ids=str)
def test_devices_that_draw_other_noise_compute_at_the_latents_of_rank_0(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_kind", lambda device: os.getpid())
    expected = DIT.passes(passes(9))

    def work(ranks: Exchange) -> list[float]:
        step = passes(9)
        for latents in {id(each.streams): each.streams.video.latents for each in step}.values():
            latents.add_(ranks.rank)
        return [distance(*pair) for pair in zip(Front(DIT, ranks, split).passes(step), expected, strict=True)]

    assert max(map(max, of_ranks(2, work))) <= 1e-6


SHAPE = VideoShape(17, 128, 64, 24.0)
GUIDED = {"steps": 2, "video_stg_blocks": (0,), "audio_stg_blocks": (1,)}


def tokens_of(name: str, frames: tuple[int, ...], model: Any) -> list[AV[Tensor]]:
    """What each stage of recipe ``name`` samples with ``model``, from noise and with random images at ``frames``."""
    generator = torch.Generator().manual_seed(1)
    given = {key: value for key, value in GUIDED.items() if key not in RECIPES[name].unused}
    guidance = Settings.of({"recipe": name, **given}).guidance
    made = []
    for stage in RECIPES[name].stages:
        shape = stage.shape(SHAPE)
        _, h, w = shape.grid
        images = [ImageItem(frame, 0.7, torch.randn(1, 128, 1, h, w, generator=generator)) for frame in frames]
        sigmas = sigmas_of(stage.schedule, shape.tokens, 2)
        state = initial_state(shape, None, images, float(sigmas[0]), generator, "cpu", torch.float32)
        contexts = [AV(torch.ones(1, 7, 48) * sign, torch.ones(1, 7, 24) * sign) for sign in (1, -1)]
        denoiser = Denoiser(model, *contexts, guidance) if stage.guided else Denoiser(model, contexts[0])  # type: ignore[arg-type]
        rope = DIT.rope(state.map(lambda s: s.positions), torch.float32, "cpu")
        made.append(
            SAMPLERS[stage.sampler](lambda x, sigma, d=denoiser, s=state, r=rope: d(x, sigma, s, r), state, sigmas)
        )
    return made


CASES = [("hq", ()), *((recipe, (0, 8, 16)) for recipe in RECIPES)]


@functools.cache
def expected_videos() -> list[list[AV[Tensor]]]:
    return [tokens_of(*case, DIT) for case in CASES]


@pytest.mark.parametrize("split", [Split(1, 3), Split(2, 2)], ids=str)
def test_videos_of_all_recipes_with_images_anywhere(split: Split) -> None:
    """Of three images, at frame 0, in the middle and last, two have tokens of their own, behind the others.

    Two ranks make the passes above and the recorded runs.
    """
    expected = expected_videos()

    def work(ranks: Exchange) -> list[float]:
        front = Front(DIT, ranks, split)
        return [
            distance(one, other)
            for case, alone in zip(CASES, expected, strict=True)
            for one, other in zip(tokens_of(*case, front), alone, strict=True)
        ]

    size = split.groups * split.shards
    found = of_ranks(size, work)
    assert max(map(max, found)) <= 1e-5
    assert found == found[:1] * size, "the ranks have the same latents, to the bit"


RECORDED = (
    "run_i2v_first_last",
    "recipe_two-stage_t2v",
    "recipe_one-stage_i2v_skip",
    "recipe_distilled_i2v_first_last",
)


class Golden(Front):
    """A front that makes the turns too, which the recordings are compared with."""

    def rope(self, *given: Any) -> Any:
        return self._model.rope(*given)


@pytest.mark.parametrize("split", [Split(1, 2), Split(2, 2)], ids=str)
def test_the_recorded_official_runs_are_met(split: Split, golden: Path) -> None:
    text = load(golden / "golden" / "text_fp32.safetensors")
    contexts = [AV(text[f"{name}.video_encoding"], text[f"{name}.audio_encoding"]) for name in ("prompt", "negative")]
    chosen = [run for run in runs(golden, "fp32") if run.name.removesuffix("_fp32") in RECORDED]
    assert {run.name.removesuffix("_fp32") for run in chosen} == {*RECORDED}
    dits = {
        (run.name, stage.number): golden_dit(golden, stage.loras, run.dtype) for run in chosen for stage in run.stages
    }

    def work(ranks: Exchange) -> dict[str, float]:
        errors = {}
        for run in chosen:
            generator = torch.Generator().manual_seed(run.params["seed"])
            for stage in run.stages:
                front = Golden(dits[run.name, stage.number], ranks, split)
                found = errors_of_stage(stage, Denoiser(front, *contexts, guidance=stage.guidance), generator)
                errors[f"{run.name} stage {stage.number}"] = max(found)
        return errors

    for errors in of_ranks(split.groups * split.shards, work):
        assert max(errors.values()) <= 1e-5, errors


# Fifteen tokens of the video, which no number of ranks here divides but three, and eighteen of the sound.
COUNTED = VideoShape(17, 160, 32, 24.0)


def counted(step: list[Pass], size: int, split: Split) -> list[tuple[int, int, list[str]]]:
    """Bytes that each rank sends and gets for a step, and the exchanges it takes part in."""

    def work(ranks: Exchange) -> tuple[int, int, list[str]]:
        front = Front(DIT, ranks, split)
        with pytest.MonkeyPatch.context() as patch:
            traffic = Traffic(patch)
            front.passes(step)
        return traffic.sent, traffic.received, traffic.calls

    return of_ranks(size, work)


@pytest.mark.parametrize("split", [Split(3, 1), Split(1, 2), Split(1, 3), Split(2, 2)], ids=str)
def test_the_bytes_of_a_step_are_those_of_the_formula(split: Split) -> None:
    lengths = AV(COUNTED.tokens, COUNTED.audio_length)
    step = [Pass(random_streams(DIT, lengths, seed=seed)) for seed in range(3)]
    stage = StageWork("base", COUNTED, evaluations=1, passes=len(step))
    found = counted(step, split.groups * split.shards, split)
    assert max(received for _, received, _ in found) == schemes.stage_received(
        CONFIG, Work(COUNTED, (stage,)), stage, split, itemsize=4
    )
    assert sum(sent for sent, _, _ in found) == sum(received for _, received, _ in found)


def test_within_a_block_the_ranks_exchange_what_the_formula_has_and_nothing_else() -> None:
    """Of the positive and the isolated pass the first self-attention is one, and the isolated one has no sound."""
    (_, _, calls), *others = counted(recipe(random_streams(DIT, AV(15, 18))), 2, Split(1, 2))
    to_heads_and_back, sound = ["all_to_all_single"] * 2, ["all_to_all_single"] * 2
    first = to_heads_and_back + sound
    blocks = [*first, *first, *first, *first, *to_heads_and_back]
    assert calls == [*blocks, *["broadcast"] * 3 * 3]
    assert all(other == calls for _, _, other in others)


def test_a_scheme_that_hands_out_passes_exchanges_nothing_within_a_block() -> None:
    for _, _, calls in counted(recipe(random_streams(DIT, AV(15, 18))), 3, Split(3, 1)):
        assert calls == ["broadcast"] * 3 * 2


class Mirror:
    """The exchanges of a rank that is alone in its group."""

    rank = 0
    group = staticmethod(lambda split: None)
    all_to_all = staticmethod(lambda parts, group: parts.clone())
    all_gather = staticmethod(lambda part, group: part[None].clone())


def test_compiled_blocks_hold_the_exchanges_and_are_made_once_for_all_numbers_of_tokens() -> None:
    dit = built(TWELVE, random_weights(TWELVE))
    graphs, backend = tracing()
    dit.compile_blocks(fullgraph=True, backend=backend)
    mirror: Any = Mirror()
    own = OwnTokens(mirror, Split())
    for tokens in (9, 16):
        (one,) = passes(tokens)[:1]
        with own.attending(dit, tokens):
            found = dit(own.cut(one.streams))
        assert distance(found, DIT(one.streams)) <= 1e-6
    assert len(graphs) == len(PLAIN)
    assert all("attend_over_ranks" in graph.code for graph in graphs[1:]), "within the streams, and between them"


def test_all_ranks_measure_the_same_rates() -> None:
    found = of_ranks(2, lambda ranks: ranks.rates(64, 64))
    assert found[0] == found[1] and 0 < found[0].link < math.inf and found[0].flops > 1


VIDEO: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}


def latents(pipeline: Pipeline, pictures: list[str], **given: Any) -> list[Tensor]:
    stages = pipeline("A paper boat", images=pictures, **VIDEO, **given).latents.stages
    return [part for stage in stages for part in (stage.video, stage.audio)]


@pytest.mark.usefixtures("warm_workers")
def test_a_pipeline_on_two_devices_says_what_it_chose(demo: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").convert("RGB").save(picture)
    pictures = [f"{picture}", f"{picture}@last:0.5"]
    asked: list[dict[str, Any]] = [{"steps": 2}, {"recipe": "distilled"}]
    with Pipeline.from_overlay(demo / "overlay", device="cpu", dtype="float32") as alone:
        expected = [latents(alone, pictures, **given) for given in asked]
    told = Notes()
    with Pipeline.from_overlay(demo / "overlay", devices="cpu:2", dtype="float32", reporter=told) as two:
        found = [latents(two, pictures, **given) for given in asked]
    pairs = zip(found, expected, strict=True)
    assert all(relative_l2(one, other) <= 1e-5 for video in pairs for one, other in zip(*video, strict=True))
    hq, distilled = [line for line in told.notes if line.startswith("parallel")]
    assert hq.startswith("parallel auto: stage 1 guidance over 2, stage 2 sequence over 2; expected: at most 1.")
    assert distilled.startswith("parallel auto: stage 1 sequence over 2, stage 2 sequence over 2; expected: at most 1.")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"devices": "cpu:3", "parallel": "sequence"}, "cannot share 4 attention heads over 3 devices"),
        ({"device": "cpu", "parallel": "guidance"}, "--parallel guidance goes with several devices"),
        ({"devices": "cpu:2", "parallel": "half"}, "unknown parallel"),
    ],
)
def test_ways_that_do_not_go_are_refused(given: dict[str, Any], problem: str, demo: Path) -> None:
    with pytest.raises(UsageError, match=problem):
        Pipeline.from_overlay(demo / "overlay", **given)


def test_none_is_one_device_for_a_video(demo: Path) -> None:
    with Pipeline.from_overlay(demo / "overlay", devices="cpu:3", parallel="none") as pipeline:
        assert pipeline.session.ranks is ALONE
