"""Bytes in, bytes and hash out: sizes around every border, past the page cache and through it, and full disks."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repack_support import make_source
from safetensors.torch import load_file
from support import Notes, in_fresh_process, refuse_direct

from ltxpack.errors import FormatError, OverlayError, SourceError
from ltxpack.files.direct import ALIGN, BUFFER, DIRECT_FROM, DirectReader, DirectWriter
from ltxpack.files.reader import Range, RangeReader, file_ranges, hash_file
from ltxpack.files.tensorfile import read_tensorfile
from ltxpack.repack.items import Cast, ShardEntry, TensorSpec, WriteShard, fingerprint, sources, stored_tensor
from ltxpack.repack.write import ShardWriter, write_shard
from ltxpack.reporter import SilentReporter

NOISE = random.Random(1).randbytes(3 * BUFFER)
BORDERS = [0, 1, ALIGN - 1, ALIGN, ALIGN + 1, DIRECT_FROM - 1, DIRECT_FROM, DIRECT_FROM + 1]
BORDERS += [BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER, 2 * BUFFER + ALIGN - 1, 3 * BUFFER]


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether files go past the page cache."""
    if not request.param:
        monkeypatch.setattr("ltxpack.files.direct.why_cached", lambda path: "as asked")
    return bool(request.param)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ltxpack")]


@pytest.mark.parametrize("size", BORDERS)
def test_what_is_written_and_its_hash_for_sizes_around_the_borders(size: int, direct: bool, tmp_path: Path) -> None:
    data = NOISE[:size]
    head, rest = data[: min(size, 1000)], memoryview(data)[min(size, 1000) :]
    steps = [1, 4095, 100_000, BUFFER - 7, BUFFER + 9]
    with ShardWriter(tmp_path, "a/b.safetensors", head, size) as writer:
        while rest:
            step = steps[len(rest) % len(steps)]
            writer.write(rest[:step])
            rest = rest[step:]
        record = writer.close()
        assert writer.why == "" or size < DIRECT_FROM or not direct
    assert (tmp_path / "a/b.safetensors").read_bytes() == data
    assert (record.path, record.size, record.link) == ("a/b.safetensors", size, None)
    assert record.blake3 == blake3(data).hexdigest() == hash_file(tmp_path / record.path, SilentReporter())
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a/b.safetensors"]
    assert threads() == []


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("noise") / "noise"
    path.write_bytes(NOISE[: BUFFER + 4099])
    return path


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, BUFFER + 4099), st.sampled_from([0, 1, 7, 8, 4096, 70_000, BUFFER])), max_size=6),
    st.booleans(),
    st.integers(1, 3),
)
def test_ranges_are_read_in_order_at_addresses_fit_for_floats(
    noise: Path, spans: list[tuple[int, int]], direct: bool, in_flight: int
) -> None:
    ranges = [Range(noise, start, min(size, BUFFER + 4099 - start)) for start, size in spans]
    with RangeReader(ranges, in_flight=in_flight, direct=direct) as reader:
        for wanted, view in zip(ranges, reader, strict=True):
            assert view == NOISE[wanted.start : wanted.start + wanted.nbytes]
            assert not wanted.nbytes or np.frombuffer(view, "u1").ctypes.data % 8 == 0
    assert threads() == []


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_views_that_are_kept_stay_as_they_were(noise: Path, kept: int) -> None:
    ranges = [Range(noise, start, 5000) for start in range(0, 60_000, 5000)]
    views: list[memoryview] = []
    with RangeReader(ranges, in_flight=2, kept=kept) as reader:
        for number, view in enumerate(reader):
            views.append(view)
            for back in range(min(kept, number) + 1):
                start = ranges[number - back].start
                assert views[-1 - back] == NOISE[start : start + 5000]
    assert threads() == []


def test_a_reader_left_early_ends_its_thread(noise: Path) -> None:
    with RangeReader(file_ranges(noise, 4096) * 50) as reader:
        next(iter(reader))
    with RangeReader([]) as reader:
        assert list(reader) == []
    assert threads() == []


def test_a_source_that_ends_early_or_is_not_there_is_told(noise: Path, tmp_path: Path) -> None:
    for direct in (True, False):
        with (
            pytest.raises(FormatError, match="901 bytes are missing"),
            RangeReader([Range(noise, BUFFER + 4000, 1000)], direct=direct) as reader,
        ):
            list(reader)
    with pytest.raises(FormatError, match="10 bytes are missing"), RangeReader([Range(noise, 2**40, 10)]) as reader:
        list(reader)
    with pytest.raises(SourceError, match="does not exist"), RangeReader([Range(tmp_path / "none", 0, 1)]) as reader:
        list(reader)
    with pytest.raises(SourceError):
        hash_file(tmp_path / "none", SilentReporter())


def test_an_unforeseen_fault_while_reading_ahead_reaches_the_caller(
    noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(DirectReader, "gather", broken)
    with pytest.raises(MemoryError), RangeReader([Range(noise, 0, 1)]) as reader:
        list(reader)


def refuse_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a filesystem that opens with O_DIRECT and then refuses to read and write."""
    read, write = os.preadv, os.write

    def check(fd: int) -> None:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", lambda fd, *more: (check(fd), read(fd, *more))[1])
    monkeypatch.setattr(os, "write", lambda fd, data: (check(fd), write(fd, data))[1])


def short_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a system that reads and writes less than it is asked to."""
    read, write = os.preadv, os.write

    def part(memory: memoryview) -> memoryview:
        return memory[: max(ALIGN, len(memory) // 2 // ALIGN * ALIGN)]

    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [part(views[0])], at))
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, part(data)))


SYSTEMS = {"open refused": refuse_direct, "transfer refused": refuse_transfer}


@pytest.mark.parametrize("system", [*SYSTEMS, "short transfers"])
def test_the_fallbacks_write_the_same_and_say_so(
    system: str, tmp_path: Path, listener: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_source(tmp_path / "s.safetensors", [("a", "BF16", (1024, 1033)), ("b", "BF16", (77,))], pad=3)
    expected = load_file(path)
    file = read_tensorfile(path)
    shard = WriteShard("out.safetensors", tuple(stored_tensor(name, info, path) for name, info in file.tensors.items()))
    SYSTEMS.get(system, short_transfers)(monkeypatch)
    record = write_shard(shard, tmp_path, listener)
    monkeypatch.undo()
    written = (tmp_path / "out.safetensors").read_bytes()
    assert record.blake3 == blake3(written).hexdigest()
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ("through the page cache" in listener.details[0]) == (system in SYSTEMS)


@pytest.mark.parametrize("pad", [0, 1, 5])
def test_a_shard_holds_the_tensors_of_its_sources_cast_where_asked(
    pad: int, direct: bool, tmp_path: Path, listener: Notes
) -> None:
    large = [("big", "F32", (1500, 2048)), ("c.table", "F32", (6, 33)), ("d", "F16", (5,)), ("e", "F64", (3, 3))]
    one = make_source(tmp_path / "one.safetensors", [("a", "BF16", (2100, 2048)), *large, ("z", "U8", (0, 4))], pad=pad)
    two = make_source(tmp_path / "two.safetensors", [("q", "BF16", (7,)), ("r", "I64", (3,))], seed=1)
    entries = [
        stored_tensor(f"one.{info.name}", info, one, None if info.dtype == "U8" else "BF16")
        for info in read_tensorfile(one).tensors.values()
    ]
    entries += [stored_tensor(f"two.{info.name}", info, two) for info in read_tensorfile(two).tensors.values()]
    random.Random(pad).shuffle(entries)
    shard = WriteShard("x/s.safetensors", tuple(entries))
    record = write_shard(shard, tmp_path, listener)
    assert ("through the page cache" in listener.details[0]) != direct
    assert listener.advanced == record.size == shard.size == (tmp_path / record.path).stat().st_size
    assert record.blake3 == blake3((tmp_path / record.path).read_bytes()).hexdigest()
    found, first, second = load_file(tmp_path / record.path), load_file(one), load_file(two)
    assert set(found) == {tensor.name for tensor in shard.tensors}
    for entry in entries:
        (tensor,), name = entry.tensors, entry.tensors[0].name[4:]
        expected = (first if entry.producer.ranges[0].path == one else second)[name]
        expected = expected.to(torch.bfloat16) if isinstance(entry.producer, Cast) else expected
        assert torch.equal(found[tensor.name].view(torch.uint8), expected.view(torch.uint8)), name


@dataclass(frozen=True)
class Scaled:
    """As a quantised weight: a scale that needs the largest value of all sources, then the sum in another dtype."""

    ranges: tuple[Range, ...]

    def make(self, data: Iterator[memoryview]) -> Iterator[bytes]:
        one, two = np.frombuffer(b"".join(map(bytes, data)), "<f4").reshape(2, -1)
        scale = np.abs(one + two).max() / 127
        yield np.float32(scale).tobytes()
        for row in np.split(one + two, 4):
            yield np.rint(row / scale).astype("i1").tobytes()


def test_one_producer_makes_several_tensors_of_another_dtype_from_several_sources(
    tmp_path: Path, listener: Notes
) -> None:
    paths = [make_source(tmp_path / f"{seed}", [("w", "F32", (4, 500_000))], seed=seed) for seed in (1, 2)]
    infos = [read_tensorfile(path).tensors["w"] for path in paths]
    ranges = tuple(Range(path, info.start, info.nbytes) for path, info in zip(paths, infos, strict=True))
    made = (TensorSpec("w_scale", "F32", ()), TensorSpec("w", "I8", (4, 500_000)))
    copied = stored_tensor("plain", infos[0], paths[0])
    shard = WriteShard(
        "o.safetensors", (copied, ShardEntry(made, Scaled(ranges)), stored_tensor("b", infos[1], paths[1]))
    )
    record = write_shard(shard, tmp_path, listener)
    assert record.size == shard.size == listener.advanced
    found, one, two = load_file(tmp_path / "o.safetensors"), load_file(paths[0])["w"], load_file(paths[1])["w"]
    assert torch.equal(found["plain"], one) and torch.equal(found["b"], two)
    assert found["w_scale"] == (one + two).abs().max() / 127
    assert torch.equal(found["w"], ((one + two) / found["w_scale"]).round().to(torch.int8))
    assert sources([shard]) == {path: path.stat().st_size for path in paths}
    other = dataclasses.replace(shard, entries=(copied, ShardEntry(made, Scaled(ranges[::-1])), *shard.entries[2:]))
    assert fingerprint([shard]) == fingerprint([shard]) != fingerprint([other])


def test_a_file_that_would_be_too_short_is_a_fault_and_gets_no_name(tmp_path: Path) -> None:
    path = make_source(tmp_path / "s", [("w", "F32", (8,))])
    entry = stored_tensor("w", read_tensorfile(path).tensors["w"], path)
    longer = WriteShard("o", (ShardEntry((TensorSpec("w", "F32", (9,)),), entry.producer),))
    with pytest.raises(AssertionError, match=f"{longer.size - 4} bytes were written of {longer.size}"):
        write_shard(longer, tmp_path, SilentReporter())
    with (
        pytest.raises(AssertionError, match="3 bytes were written of 4"),
        ShardWriter(tmp_path, "x", b"abc", 4) as writer,
    ):
        writer.close()
    assert list(tmp_path.iterdir()) == [path]


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int, code: int) -> None:
    """From now on the disk takes ``room`` bytes and no more."""
    real = DirectWriter.append

    def append(file: DirectWriter, memory: memoryview) -> None:
        nonlocal room
        room -= len(memory)
        if room < 0:
            raise OSError(code, os.strerror(code))
        real(file, memory)

    monkeypatch.setattr(DirectWriter, "append", append)


@pytest.mark.parametrize("room", [0, BUFFER, 3 * BUFFER, 4 * BUFFER + 10])
@pytest.mark.parametrize(
    ("code", "told"), [(errno.ENOSPC, "disk is full"), (errno.EFBIG, "max-shard-size"), (errno.EIO, "Input/output")]
)
def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(
    room: int, code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, room, code)
    with (
        pytest.raises(OverlayError, match=told) as caught,
        ShardWriter(tmp_path, "x.safetensors", b"", 4 * BUFFER + 100) as writer,
    ):
        for _ in range(4):
            writer.write(NOISE[:BUFFER])
        writer.write(bytes(100))
        writer.close()
    assert "run the same command again" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert threads() == []


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = make_source(tmp_path / "s.safetensors", [("a", "U8", (5 * BUFFER,))])
    entry = stored_tensor("a", read_tensorfile(path).tensors["a"], path)

    class Interrupts(SilentReporter):
        def advance(self, amount: int = 1) -> None:
            if amount > 1000:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(WriteShard("o/x.safetensors", (entry,)), tmp_path, Interrupts())
    assert list((tmp_path / "o").iterdir()) == []
    assert threads() == []


def test_an_old_file_of_that_name_is_replaced_never_written_into(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"shared")
    os.link(other, tmp_path / "x")
    with ShardWriter(tmp_path, "x", b"new", 3) as writer:
        writer.close()
    assert (other.read_bytes(), (tmp_path / "x").read_bytes()) == (b"shared", b"new")


def test_views_of_any_shape_can_be_written(tmp_path: Path) -> None:
    array = np.arange(12, dtype="<f4").reshape(3, 4)
    with ShardWriter(tmp_path, "x", b"", 48) as writer:
        writer.write(memoryview(array))
        writer.write(memoryview(np.zeros((0, 4))))
        writer.close()
    assert (tmp_path / "x").read_bytes() == array.tobytes()


PEAK = """
import sys
from pathlib import Path
from ltxpack.files.tensorfile import build_header, read_tensorfile
from ltxpack.repack.items import WriteShard, stored_tensor
from ltxpack.repack.write import write_shard
from ltxpack.reporter import SilentReporter
source, size = Path(sys.argv[1], "s.safetensors"), int(sys.argv[2])
header = build_header([("a", "BF16", (size // 2 - 100,)), ("b", "F32", (50,))], {})
with source.open("wb") as file:
    file.write(header)
    file.truncate(len(header) + size)
entries = [stored_tensor(info.name, info, source, "BF16") for info in read_tensorfile(source).tensors.values()]
answer = write_shard(WriteShard("o.safetensors", tuple(entries)), source.parent, SilentReporter()).size
"""


def test_memory_stays_below_the_mark_and_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small, large = (in_fresh_process(PEAK, tmp_path, str(size))[1] for size in (64_000_000, 256_000_000))
    assert large < 100 * 1024 * 1024
    assert large - small <= 8 * 1024 * 1024
