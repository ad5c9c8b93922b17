"""The tile layout of the video decoder against the recorded ones, and what must hold for any size."""

from __future__ import annotations

import json
import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from support import load

from ltxpack.runtime.codecs.tiles import LEADS, Cut, Tiles, Tiling, auto_tiling, large_tiling, split
from ltxpack.runtime.codecs.video import axis_tiles, fresh_frames

SCALES = TEMPORAL, SPATIAL, _ = (8, 32, 32)
Size = tuple[int, int, int]


def recorded_tiling(golden: Path) -> Tiling:
    """The tiling the fixture's small layout was made with, from its metadata."""
    with safe_open(golden / "golden" / "components_fp32.safetensors", "pt") as file:
        text = json.loads(file.metadata()["tile_config"])
    sizes = re.findall(r"(\d+)/(\d+)", text)
    return Tiling(*(Cut(*(int(n) // scale for n in size)) for size, scale in zip(sizes, SCALES, strict=True)))


def test_layouts_equal_the_recorded_ones(golden: Path) -> None:
    recorded = load(golden / "golden" / "components_fp32.safetensors")
    names = sorted({key.split(".")[1] for key in recorded if key.startswith("tiles.")})
    assert len(names) >= 3
    for name in names:
        coords = recorded[f"tiles.{name}.in_coords"]
        length, height, width = coords[:, :, 1].amax(0).tolist()
        size = re.search(r"(\d+)x(\d+)x(\d+)$", name)
        if size:
            pixels = [int(n) for n in size.groups()]
            assert [height * SPATIAL, width * SPATIAL, (length - 1) * TEMPORAL + 1] == pixels
        tiling = auto_tiling(height, width) if size else recorded_tiling(golden)
        tiles = list(product(*map(axis_tiles, (length, height, width), tiling, SCALES, LEADS)))
        assert [[[p.latents.start, p.latents.stop] for p in tile] for tile in tiles] == coords.tolist()
        outputs = recorded[f"tiles.{name}.out_coords"]
        assert [[[p.output.start, p.output.stop] for p in tile] for tile in tiles] == outputs.tolist()
        for i, tile in enumerate(tiles):
            for axis, along in zip("fhw", tile, strict=True):
                assert torch.equal(along.weights, recorded[f"tiles.{name}.tile{i}.mask_{axis}"]), (name, i, axis)


def test_default_size_is_cut_as_the_spec_says() -> None:
    tiling = auto_tiling(34, 60)
    assert tiling == Tiling(Cut(10, 3), Cut(14, 2), Cut(24, 2))
    assert split(16, tiling.frames, 1) == [slice(0, 10), slice(6, 16)]
    assert split(34, tiling.height) == [slice(0, 14), slice(12, 26), slice(24, 34)]
    assert split(60, tiling.width) == [slice(0, 24), slice(22, 46), slice(44, 60)]
    assert list(fresh_frames(axis_tiles(16, tiling.frames, 8, 1))) == [48, 73]


@pytest.mark.parametrize(
    ("height", "width", "tile"), [(7, 48, 4), (9, 48, 4), (11, 48, 6), (2, 48, 3), (48, 48, 24), (60, 34, 24)]
)
def test_the_short_side_is_rounded_half_to_even_and_at_least_three(height: int, width: int, tile: int) -> None:
    assert auto_tiling(height, width).height.length == tile


def test_an_axis_not_longer_than_its_tile_is_left_whole() -> None:
    (tile,) = axis_tiles(24, Cut(24, 2), SPATIAL, 0)
    assert tile.latents == slice(0, 24)
    assert torch.equal(tile.weights, torch.ones(24 * SPATIAL))
    (group,) = axis_tiles(10, Cut(10, 3), TEMPORAL, 1)
    assert group.output == slice(0, 73)


cuts = st.integers(1, 12).flatmap(lambda length: st.builds(Cut, st.just(length), st.integers(0, length - 1)))


@given(length=st.integers(1, 80), cut=cuts, lead=st.sampled_from(LEADS))
def test_tiles_cover_their_weights_sum_to_one_and_each_frame_comes_out_once(length: int, cut: Cut, lead: int) -> None:
    tiles = axis_tiles(length, cut, 4, lead)
    total = torch.zeros((length - lead) * 4 + lead)
    for tile in tiles:
        assert 0 < tile.latents.stop - tile.latents.start <= cut.length + lead
        assert len(tile.weights) == tile.output.stop - tile.output.start
        total[tile.output] += tile.weights
    assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-5)
    fresh = list(fresh_frames(tiles))
    assert sum(fresh) == len(total)
    assert min(fresh) > 0 or (cut.length - cut.overlap == 1 and min(fresh) == 0)


@given(length=st.integers(1, 300), cut=cuts)
def test_tiles_are_counted_and_measured_without_being_listed(length: int, cut: Cut) -> None:
    size, tiling = (length, length, length), Tiling(cut, cut, cut)
    counts, longest = zip(*((len(axis), max(axis)) for axis in lengths(size, tiling)), strict=True)
    assert Tiles.of(size, tiling) == Tiles(math.prod(counts), longest)


@given(height=st.integers(1, 40), width=st.integers(1, 40), length=st.integers(1, 60))
def test_the_official_layout_has_no_group_longer_than_ten_latents_and_one(height: int, width: int, length: int) -> None:
    tiling = auto_tiling(2 * height, 2 * width)
    assert max(tiling.height.length, tiling.width.length) == 24
    assert max(lengths((length, height, width), tiling)[0]) <= 11


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))


def lengths(size: Size, tiling: Tiling) -> list[list[int]]:
    """The tile lengths along each axis."""
    return [[tile.stop - tile.start for tile in axis] for axis in map(split, size, tiling, LEADS)]


def decoded(size: Size, tiling: Tiling) -> int:
    return math.prod(map(sum, lengths(size, tiling)))


def longest(size: Size, tiling: Tiling) -> int:
    return math.prod(map(max, lengths(size, tiling)))


@given(size=sizes, most=st.integers(1, 100_000))
def test_tiles_fit_and_cost_no_more_than_the_official_ones(size: Size, most: int) -> None:
    official = auto_tiling(*size[1:])
    found = large_tiling(*size, most)
    if longest(size, official) > most:
        assert found == official or longest(size, found) <= most
    else:
        assert longest(size, found) <= most
        assert decoded(size, found) <= decoded(size, official)
    overlaps = [cut.overlap for cut in (found.frames, found.height, found.width)]
    assert overlaps == [official.frames.overlap, official.height.overlap, official.width.overlap]


@given(size=sizes)
def test_with_memory_enough_nothing_is_cut(size: Size) -> None:
    found = large_tiling(*size, math.prod(size))
    assert decoded(size, found) == math.prod(size)


def test_the_default_size() -> None:
    """1.49 of the latents are decoded officially, 902 TFLOP for 624 (spec 07, section 5)."""
    size = (16, 34, 60)
    assert large_tiling(*size, 3359) == large_tiling(*size, 3360) == auto_tiling(34, 60)
    assert large_tiling(*size, 5376) == Tiling(Cut(16, 3), Cut(14, 2), Cut(24, 2))
    assert large_tiling(*size, 13056) == Tiling(Cut(16, 3), Cut(34, 2), Cut(24, 2))
    assert large_tiling(*size, 32640) == Tiling(Cut(16, 3), Cut(34, 2), Cut(60, 2))
    shares = [decoded(size, large_tiling(*size, most)) / 32640 for most in (0, 5376, 8000, 13056, 32640)]
    assert [round(share, 2) for share in shares] == [1.49, 1.19, 1.13, 1.07, 1.0]
