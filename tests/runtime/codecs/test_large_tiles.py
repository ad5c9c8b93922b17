"""Larger tiles: within what memory allows, and never more work than the official layout."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ltxpack.runtime.codecs.tiles import Cut, Tiling, auto_tiling, large_tiling, split, split_frames

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))


def lengths(size: tuple[int, int, int], tiling: Tiling) -> list[list[int]]:
    """The tile lengths along each axis."""
    cuts = ((split_frames, tiling.frames), (split, tiling.height), (split, tiling.width))
    spans = [spans_of(length, cut) for length, (spans_of, cut) in zip(size, cuts, strict=True)]
    return [[span.stop - span.start for span in axis] for axis in spans]


def decoded(size: tuple[int, int, int], tiling: Tiling) -> int:
    return math.prod(map(sum, lengths(size, tiling)))


def longest(size: tuple[int, int, int], tiling: Tiling) -> int:
    return math.prod(map(max, lengths(size, tiling)))


@given(size=sizes, most=st.integers(1, 100_000))
def test_tiles_fit_and_cost_no_more_than_the_official_ones(size: tuple[int, int, int], most: int) -> None:
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
def test_with_memory_enough_nothing_is_cut(size: tuple[int, int, int]) -> None:
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
