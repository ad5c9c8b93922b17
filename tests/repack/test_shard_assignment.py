"""Shard assignment and read planning are pure: properties over random tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxpack.errors import FormatError, UnsupportedError, UsageError
from ltxpack.files.tensorfile import TensorInfo, parse_header, tensor_nbytes
from ltxpack.repack.shards import assign_shards
from ltxpack.repack.stream import MAX_GAP, read_plan
from ltxpack.repack.work import Piece, WriteBytes, WriteShard, fingerprint, piece, sources

SOURCE = Path("model.safetensors")
shapes = st.lists(st.integers(0, 9), max_size=2).map(tuple)
tensors = st.lists(st.tuples(st.sampled_from(["BF16", "F32", "U8", "I64"]), shapes), max_size=12)


def pieces_of(described: list[tuple[str, tuple[int, ...]]]) -> list[Piece]:
    result, start = [], 100
    for number, (dtype, shape) in enumerate(described):
        nbytes = tensor_nbytes(dtype, shape)
        result.append(Piece(f"t{number}", dtype, shape, SOURCE, start, nbytes, dtype))
        start += nbytes
    return result


@given(tensors, st.integers(1, 700), st.sampled_from(["", "transformer", "a/b"]))
def test_every_tensor_has_one_place_and_no_shard_is_too_large(
    described: list[tuple[str, tuple[int, ...]]], limit: int, folder: str
) -> None:
    pieces = pieces_of(described)
    items = assign_shards(pieces, limit, folder)
    assert items == assign_shards(pieces, limit, folder)
    shards = [item for item in items if isinstance(item, WriteShard)]
    prefix = f"{folder}/" if folder else ""
    assert sorted(part.name for shard in shards for part in shard.pieces) == sorted(part.name for part in pieces)
    for shard in shards:
        assert len(shard.pieces) == 1 or sum(part.size for part in shard.pieces) <= limit
        file = parse_header(shard.header, shard.size, shard.path)
        assert file.metadata == {"format": "pt"}
        assert list(file.tensors) == [part.name for part in shard.pieces] or any(not p.size for p in shard.pieces)
    if len(shards) == 1:
        assert [item.path for item in items] == [f"{prefix}diffusion_pytorch_model.safetensors"]
        return
    count = len(shards)
    assert [shard.path for shard in shards] == [
        f"{prefix}diffusion_pytorch_model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    index = items[-1]
    assert isinstance(index, WriteBytes)
    assert index.path == f"{prefix}diffusion_pytorch_model.safetensors.index.json"
    document = json.loads(index.data)
    assert document["metadata"]["total_size"] == sum(part.size for part in pieces)
    assert document["weight_map"] == {
        part.name: shard.path.removeprefix(prefix) for shard in shards for part in shard.pieces
    }


@given(tensors)
def test_offsets_fit_the_dtype_and_order_is_kept_within_one(described: list[tuple[str, tuple[int, ...]]]) -> None:
    pieces = pieces_of(described)
    (shard,) = assign_shards(pieces, 10**9, "x")
    assert isinstance(shard, WriteShard)
    for info in parse_header(shard.header, shard.size, shard.path).tensors.values():
        assert info.start % {"BF16": 2, "F32": 4, "U8": 1, "I64": 8}[info.dtype] == 0
    for dtype in ("BF16", "F32", "U8", "I64"):
        order = [part.name for part in shard.pieces if part.dtype == dtype]
        assert order == [part.name for part in pieces if part.dtype == dtype]


def test_the_size_of_a_cast_tensor_is_that_of_what_is_written() -> None:
    info = TensorInfo("a", "F32", (4, 4), 8, 64)
    (shard,) = assign_shards([piece("b", info, SOURCE, "BF16")], 10**9, "x")
    assert isinstance(shard, WriteShard)
    assert shard.size == len(shard.header) + 32
    assert sources([shard]) == {SOURCE: 72}


def test_refusals() -> None:
    twice = pieces_of([("U8", (1,))]) * 2
    with pytest.raises(FormatError, match="stands twice"):
        assign_shards(twice, 10, "x")
    with pytest.raises(UsageError):
        assign_shards([], 0, "x")
    with pytest.raises(UnsupportedError, match="cannot be stored"):
        piece("a", TensorInfo("a", "F8_E4M3", (4,), 8, 4), SOURCE, "BF16")


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 900), st.booleans()), max_size=20),
    st.integers(16, 400),
)
def test_reads_give_every_byte_of_every_piece_in_order(spans: list[tuple[int, int, bool]], limit: int) -> None:
    pieces = [
        Piece(f"t{number}", "U8", (size,), Path("b" if other else "a"), start, size, "U8")
        for number, (start, size, other) in enumerate(spans)
    ]
    windows = read_plan(pieces, limit)
    found: list[tuple[str, int]] = []
    for window in windows:
        assert 0 < window.range.nbytes <= limit + MAX_GAP
        for offset, count, part in window.parts:
            assert part.source == window.range.path
            assert offset + count <= window.range.nbytes
            found += [(part.name, window.range.start + offset + step) for step in range(count)]
    assert found == [(part.name, part.start + step) for part in pieces for step in range(part.nbytes)]


def test_neighbours_are_read_in_one_go() -> None:
    pieces = pieces_of([("U8", (8,))] * 1000)
    assert len(read_plan(pieces)) == 1


def test_a_fingerprint_changes_with_plan_source_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(bytes(100))
    part = Piece("a", "U8", (4,), path, 0, 4, "U8")
    other = Piece("a", "U8", (4,), path, 4, 4, "U8")
    items = [WriteShard("x", (part,))]
    seen = {
        fingerprint(items),
        fingerprint([WriteShard("x", (other,))]),
        fingerprint(items, {"rule": "fp32"}),
        fingerprint([*items, WriteBytes("y", b"1")]),
        fingerprint([*items, WriteBytes("y", b"2")]),
    }
    assert fingerprint([WriteShard("x", (part,))]) in seen
    path.write_bytes(bytes(101))
    seen.add(fingerprint(items))
    assert len(seen) == 6
