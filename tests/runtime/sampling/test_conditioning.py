"""Shapes, token layout, positions, first noise and image conditions, recorded and as properties."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from golden_runs import NAMES, Run, runs
from hypothesis import given, settings
from hypothesis import strategies as st
from support import load, relative_l2
from torch import Tensor

from ltxpack.errors import UsageError
from ltxpack.runtime.sampling.conditioning import (
    ImageItem,
    LatentState,
    initial_state,
    patchify,
    positions,
    post,
    unpatchify,
)
from ltxpack.runtime.sampling.shape import AV, VideoShape

shapes = st.builds(
    VideoShape,
    frames=st.integers(0, 5).map(lambda k: 8 * k + 1),
    height=st.integers(1, 4).map(lambda n: 32 * n),
    width=st.integers(1, 4).map(lambda n: 32 * n),
    fps=st.sampled_from([16.0, 23.976, 24.0, 24000 / 1001, 25.0, 30.0]),
)


@pytest.fixture(scope="module")
def constants(latents_golden: Path) -> dict[str, Tensor]:
    return load(latents_golden / "golden" / "constants.safetensors")


def latents(shape: VideoShape, seed: int = 0, dtype: torch.dtype = torch.float32) -> AV[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return shape.latent_shapes.map(lambda size: torch.randn(size, generator=generator).to(dtype))


def state_of(shape: VideoShape, images: list[ImageItem], dtype: torch.dtype = torch.float32) -> AV[LatentState]:
    generator = torch.Generator().manual_seed(1)
    return initial_state(shape, latents(shape), images, 0.75, generator, "cpu", dtype)


def image(shape: VideoShape, frame: int, strength: float, seed: int = 7) -> ImageItem:
    generator = torch.Generator().manual_seed(seed)
    return ImageItem(frame, strength, torch.randn(1, 128, 1, *shape.grid[1:], generator=generator))


# Shapes


def test_hq_default_shape() -> None:
    full = VideoShape(121, 1088, 1920, 24.0)
    assert (full.tokens, full.divided(2).tokens, full.audio_length) == (32640, 8160, 126)
    assert full.latent_shapes == AV((1, 128, 16, 34, 60), (1, 8, 126, 16))
    halves = ((9, 30.0), (25, 50.0), (49, 50.0))  # 7.5, 12.5 and 24.5 audio tokens
    assert [VideoShape(frames, 32, 32, fps).audio_length for frames, fps in halves] == [8, 12, 24]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((121, 1080, 1920, 24.0), "choose --height 1056 or 1088"),
        ((121, 1088, 1900, 24.0), "choose --width 1888 or 1920"),
        ((121, 0, 1920, 24.0), "choose --height 32 or 64"),
        ((120, 1088, 1920, 24.0), "choose --num-frames 113 or 121"),
        ((0, 1088, 1920, 24.0), "choose --num-frames 1 or 9"),
        ((-7, 1088, 1920, 24.0), "choose --num-frames 1 or 9"),
        ((121, 1088, 1920, 0.0), "frame rate"),
        ((121, 1088, 1920, math.nan), "frame rate"),
        ((121, 1088, 1920, math.inf), "frame rate"),
        ((1, 64, 64, 60.0), "too short for any sound"),
    ],
)
def test_a_wrong_shape_is_wrong_use(arguments: tuple[int, int, int, float], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        VideoShape(*arguments)


def test_two_stages_need_multiples_of_64() -> None:
    with pytest.raises(UsageError, match=r"choose --width 64 or 128"):
        VideoShape(9, 64, 96, 24.0).divided(2)
    assert VideoShape(9, 128, 192, 24.0).divided(2) == VideoShape(9, 64, 96, 24.0)


# Token layout


def test_patchify_equals_the_recorded_pairs(constants: dict[str, Tensor]) -> None:
    given = NAMES.map(lambda name: constants[f"patchify.{name}_in"])
    found = patchify(given)
    assert found.map(torch.equal, NAMES.map(lambda name: constants[f"patchify.{name}_tokens"])) == AV(True, True)


@settings(deadline=None)
@given(shape=shapes, appended=st.integers(0, 9))
def test_unpatchify_undoes_patchify_and_drops_appended_tokens(shape: VideoShape, appended: int) -> None:
    made = latents(shape)
    tokens = patchify(made)
    longer = AV(torch.cat([tokens.video, torch.ones(1, appended, 128)], dim=1), tokens.audio)
    assert unpatchify(longer, shape).map(torch.equal, made) == AV(True, True)


# Positions


def test_positions_equal_the_recorded_ones(latents_golden: Path, constants: dict[str, Tensor]) -> None:
    run_fps = json.loads((latents_golden / "fixture_params.json").read_text())["run"]["frame_rate"]
    names = {key.split(".")[1] for key in constants if key.startswith("pos.")}
    assert names
    for name in names:
        recorded = {key.removeprefix(f"pos.{name}."): v for key, v in constants.items() if f"pos.{name}." in key}
        f, h, w = recorded["video_latent_shape"].tolist()[2:]
        named = re.search(r"_(\d+)fps", name)
        shape = VideoShape(8 * (f - 1) + 1, 32 * h, 32 * w, float(named[1]) if named else run_fps)
        assert list(shape.latent_shapes.audio) == recorded["audio_latent_shape"].tolist()
        found = positions(shape)
        assert found.video.dtype == found.audio.dtype == torch.float32
        assert found.video.shape == (1, 3, shape.tokens, 2)
        assert relative_l2(found.video[:, :, recorded["token_index"]], recorded["video_positions"]) <= 1e-6, name
        assert relative_l2(found.audio, recorded["audio_positions"]) <= 1e-6, name


@settings(deadline=None)
@given(shape=shapes)
def test_positions_tile_the_video_without_gaps(shape: VideoShape) -> None:
    found = positions(shape)
    f, h, w = shape.grid
    grid = found.video.view(3, f, h, w, 2)
    assert torch.equal(grid[0, 1:, :, :, 0], grid[0, :-1, :, :, 1])
    assert torch.equal(grid[1, :, 1:, :, 0], grid[1, :, :-1, :, 1])
    assert torch.equal(grid[2, :, :, 1:, 0], grid[2, :, :, :-1, 1])
    assert grid.amin(dim=(1, 2, 3, 4)).tolist() == [0, 0, 0]
    ends = [shape.frames / shape.fps, shape.height, shape.width]
    assert grid.amax(dim=(1, 2, 3, 4)).tolist() == pytest.approx(ends)
    audio = found.audio[0, 0]
    assert torch.equal(audio[1:, 0], audio[:-1, 1])
    assert audio[-1, 1].item() == pytest.approx((4 * shape.audio_length - 3) / 100)


# The first state


def test_first_noise_equals_the_recorded_draw(constants: dict[str, Tensor]) -> None:
    checked = 0
    for key, expected in constants.items():
        named = re.fullmatch(r"noise\.init_generator\.seed(\d+)\.first_1x(\d+)x128\.(\w+)", key)
        if named is None:
            continue
        shape = VideoShape(1, 32, 32 * int(named[2]), 24.0)
        generator = torch.Generator().manual_seed(int(named[1]))
        state = initial_state(shape, None, (), 1.0, generator, "cpu", getattr(torch, named[3]))
        assert torch.equal(state.video.latents, expected), key
        checked += 1
    assert checked > 0


def check_states(run: Run) -> float:
    """Worst relative L2 of the stages' states, drawn from the run's seed; masks and counts exactly."""
    generator = torch.Generator().manual_seed(run.params["seed"])
    worst = 0.0
    for stage in run.stages:
        state = stage.state(generator)
        for field, recorded_name in (
            ("latents", "init_latent_noised"),
            ("clean", "clean_latent"),
            ("positions", "positions"),
            ("mask", "denoise_mask"),
        ):
            expected = stage.recorded(f"{{}}.{recorded_name}")
            if expected is None:
                continue
            found = state.map(lambda s, field=field: getattr(s, field))
            assert found.map(lambda t: t.dtype) == expected.map(lambda t: t.dtype), field
            errors = found.map(relative_l2, expected)
            worst = max(worst, errors.video, errors.audio)
        first = stage.recorded("call00.{}_in")
        assert first is not None
        errors = state.map(lambda s: s.latents).map(relative_l2, first)
        worst = max(worst, errors.video, errors.audio)
    return worst


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_states_of_all_runs_equal_the_recorded_ones(golden: Path, dtype: str) -> None:
    """Seed, draw order, lerps, masks and positions, with and without images; in bf16 too nothing is left to drift."""
    errors = {run.name: check_states(run) for run in runs(golden, dtype)}
    assert max(errors.values()) <= 1e-6, errors


@settings(deadline=None)
@given(
    shape=shapes,
    placed=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.0, 0.3, 0.7, 1.0])), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_state_is_consistent(shape: VideoShape, placed: list[tuple[int, float]], dtype: torch.dtype) -> None:
    images = [image(shape, min(frame, shape.frames - 1), strength) for frame, strength in placed]
    video = state_of(shape, images, dtype).video
    length = shape.tokens + shape.tokens_per_frame * sum(item.frame > 0 for item in images)
    assert video.latents.shape == video.clean.shape == (1, length, 128)
    assert video.latents.dtype == video.clean.dtype == dtype
    assert video.mask.shape == (1, length, 1)
    assert video.positions.shape == (1, 3, length, 2)
    index = torch.zeros(length, dtype=torch.int64) if video.mask_index is None else video.mask_index
    assert torch.equal(video.mask_values[index], video.mask[0, :, 0])
    assert len(video.mask_values) == len(video.mask.unique())
    assert (video.mask_index is None) == (len(video.mask_values) == 1)


def test_the_last_image_at_frame_zero_wins_and_others_are_appended_in_order() -> None:
    shape = VideoShape(17, 64, 96, 24.0)
    items = [image(shape, 0, 0.2, 1), image(shape, 16, 1.0, 2), image(shape, 0, 1.0, 3), image(shape, 5, 0.6, 4)]
    video = state_of(shape, items).video
    count, tokens = shape.tokens_per_frame, shape.tokens
    flat = [patchify(AV(item.latents, torch.zeros(1, 8, 1, 16))).video for item in items]
    assert torch.equal(video.clean[:, :count], flat[2])
    assert torch.equal(video.latents[:, :count], flat[2])
    assert torch.equal(video.clean[:, tokens : tokens + count], flat[1])
    assert torch.equal(video.clean[:, tokens + count :], flat[3])
    assert video.mask[0, [0, count, tokens, tokens + count], 0].tolist() == pytest.approx([0, 1, 0, 0.4])
    time = video.positions[0, 0, [tokens, tokens + count]]
    assert (time * shape.fps).flatten().tolist() == pytest.approx([16, 17, 5, 6])
    assert torch.equal(video.positions[:, 1:, tokens : tokens + count], video.positions[:, 1:, :count])


def test_keyframe_strengths_are_rounded_to_the_model_dtype_and_frame_zero_is_not() -> None:
    shape = VideoShape(9, 64, 96, 24.0)
    video = state_of(shape, [image(shape, 0, 0.8), image(shape, 8, 0.8)], torch.bfloat16).video
    assert video.mask[0, 0, 0].item() == torch.tensor(0.2).item()
    assert video.mask[0, -1, 0].item() == torch.tensor(0.2, dtype=torch.bfloat16).float().item()


def test_tensors_of_another_size_are_refused() -> None:
    shape, other = VideoShape(9, 64, 96, 24.0), VideoShape(9, 64, 64, 24.0)
    with pytest.raises(ValueError, match="tokens"):
        state_of(shape, [image(other, 0, 1.0)])
    with pytest.raises(ValueError, match="tokens"):
        initial_state(shape, latents(other), (), 1.0, torch.Generator(), "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_post_keeps_what_the_mask_keeps(dtype: torch.dtype) -> None:
    shape = VideoShape(9, 64, 96, 24.0)
    video = state_of(shape, [image(shape, 0, 1.0), image(shape, 8, 0.5)]).video
    x0 = torch.randn(video.latents.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    found = post(x0, video)
    count, tokens = shape.tokens_per_frame, shape.tokens
    assert found.dtype == dtype
    assert torch.equal(found[:, :count], video.clean[:, :count].to(dtype))
    assert torch.equal(found[:, count:tokens], x0[:, count:tokens])
    half = (x0[:, tokens:].float() + video.clean[:, tokens:]) / 2
    assert relative_l2(found[:, tokens:], half) <= (5e-3 if dtype == torch.bfloat16 else 1e-6)
