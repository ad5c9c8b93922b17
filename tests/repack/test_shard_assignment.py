"""Shard assignment and read planning are pure: properties over random tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxpack.errors import UsageError
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import TensorInfo, parse_header, tensor_nbytes
from ltxpack.repack.items import ShardEntry, WriteBytes, WriteShard, assign_shards, fingerprint, sources, stored_tensor
from ltxpack.repack.write import MAX_GAP, parts_of, read_plan, taken

SOURCE = Path("model.safetensors")
shapes = st.lists(st.integers(0, 9), max_size=2).map(tuple)
tensors = st.lists(st.tuples(st.sampled_from(["BF16", "F32", "U8", "I64"]), shapes), max_size=12)


def entries_of(described: list[tuple[str, tuple[int, ...]]]) -> list[ShardEntry]:
    result, start = [], 100
    for number, (dtype, shape) in enumerate(described):
        nbytes = tensor_nbytes(dtype, shape)
        result.append(stored_tensor(f"t{number}", TensorInfo("t", dtype, shape, start, nbytes), SOURCE))
        start += nbytes
    return result


def names(*shards: WriteShard) -> list[str]:
    return [tensor.name for shard in shards for tensor in shard.tensors]


@given(tensors, st.integers(1, 700), st.sampled_from(["", "transformer", "a/b"]))
def test_every_tensor_has_one_place_and_no_shard_is_too_large(
    described: list[tuple[str, tuple[int, ...]]], limit: int, folder: str
) -> None:
    entries = entries_of(described)
    items = assign_shards(entries, limit, folder)
    assert items == assign_shards(entries, limit, folder)
    shards = [item for item in items if isinstance(item, WriteShard)]
    prefix = f"{folder}/" if folder else ""
    assert sorted(names(*shards)) == sorted(f"t{number}" for number in range(len(described)))
    for shard in shards:
        assert len(shard.entries) == 1 or sum(entry.nbytes for entry in shard.entries) <= limit
        file = parse_header(shard.header, shard.size, shard.path)
        assert file.metadata == {"format": "pt"}
        assert list(file.tensors) == names(shard) or not all(entry.nbytes for entry in shard.entries)
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
    assert document["metadata"]["total_size"] == sum(entry.nbytes for entry in entries)
    assert document["weight_map"] == {
        name: shard.path.removeprefix(prefix) for shard in shards for name in names(shard)
    }


@given(tensors)
def test_offsets_fit_the_dtype_and_order_is_kept_within_one(described: list[tuple[str, tuple[int, ...]]]) -> None:
    entries = entries_of(described)
    (shard,) = assign_shards(entries, 10**9, "x")
    assert isinstance(shard, WriteShard)
    for info in parse_header(shard.header, shard.size, shard.path).tensors.values():
        assert info.start % {"BF16": 2, "F32": 4, "U8": 1, "I64": 8}[info.dtype] == 0
    for dtype in ("BF16", "F32", "U8", "I64"):
        order = [tensor.name for tensor in shard.tensors if tensor.dtype == dtype]
        assert order == [f"t{number}" for number, (own, _) in enumerate(described) if own == dtype]


def test_the_size_of_a_cast_tensor_is_that_of_what_is_written() -> None:
    info = TensorInfo("a", "F32", (4, 4), 8, 64)
    (shard,) = assign_shards([stored_tensor("b", info, SOURCE, "BF16")], 10**9, "x")
    assert isinstance(shard, WriteShard)
    assert shard.size == len(shard.header) + 32
    assert sources([shard]) == {SOURCE: 72}


def test_a_shard_holds_something() -> None:
    with pytest.raises(UsageError):
        assign_shards([], 0, "x")


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 900), st.booleans()), max_size=20), st.integers(16, 400))
def test_reads_give_every_byte_of_every_range_in_order(spans: list[tuple[int, int, bool]], limit: int) -> None:
    ranges = [Range(Path("b" if other else "a"), start, size) for start, size, other in spans]
    windows = read_plan(ranges, limit)
    found: list[tuple[Path, int]] = []
    for window in windows:
        assert 0 < window.range.nbytes <= limit + MAX_GAP
        for offset, count in window.parts:
            assert offset + count <= window.range.nbytes
            found += [(window.range.path, window.range.start + offset + step) for step in range(count)]
    assert found == [(wanted.path, wanted.start + step) for wanted in ranges for step in range(wanted.nbytes)]
    parts = parts_of(windows, (memoryview(bytes(window.range.nbytes)) for window in windows))
    for wanted in ranges:
        own = list(map(len, taken(parts, wanted.nbytes)))
        assert sum(own) == wanted.nbytes and all(count % 8 == 0 for count in own[:-1])


def test_neighbours_are_read_in_one_go() -> None:
    assert len(read_plan(Range(SOURCE, 8 * number, 8) for number in range(1000))) == 1


def test_a_fingerprint_changes_with_plan_source_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(bytes(100))
    one, other, cast = (
        stored_tensor("a", TensorInfo("a", dtype, (4,), start, 8), path, stored)
        for dtype, start, stored in (("F16", 0, None), ("F16", 4, None), ("F16", 0, "BF16"))
    )
    items = [WriteShard("x", (one,))]
    seen = {
        fingerprint(items),
        fingerprint([WriteShard("x", (other,))]),
        fingerprint([WriteShard("x", (cast,))]),
        fingerprint(items, {"rule": "fp32"}),
        fingerprint([*items, WriteBytes("y", b"1")]),
        fingerprint([*items, WriteBytes("y", b"2")]),
    }
    assert fingerprint([WriteShard("x", (one,))]) in seen
    path.write_bytes(bytes(101))
    seen.add(fingerprint(items))
    assert len(seen) == 7
