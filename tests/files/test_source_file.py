"""One file, through the page cache or past it: the same bytes from anywhere, and a way on where the system refuses."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from _measure import make_cold, resident

from ltxpack.errors import OverlayError
from ltxpack.files import source_file
from ltxpack.files.source_file import ALIGN, AUTO, DIRECT, READS, SourceFile
from ltxpack.runtime.weights.copies import HUGE_PAGE, HostCopies, HostMemory
from ltxpack.runtime.weights.machine import own_memory

SIZE = 5 * ALIGN + 77
# Pages that something else of the process may have touched meanwhile.
SLACK = 1024 * 1024


@contextmanager
def opened(path: Path, reads: str = DIRECT) -> Iterator[SourceFile]:
    file = SourceFile(path, reads)
    try:
        yield file
    finally:
        file.close()


def aligned(size: int) -> memoryview:
    return HostMemory(size, HostCopies(None)).bytes.numpy().data  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("source") / "file"
    made.write_bytes(os.urandom(SIZE))
    return made


@settings(max_examples=200, deadline=None)
@given(st.integers(0, SIZE), st.integers(0, SIZE), st.sampled_from(READS))
def test_any_stretch(path: Path, one: int, other: int, reads: str) -> None:
    start, end = sorted((one, other))
    memory = aligned(SIZE + 2 * ALIGN)
    with opened(path, reads) as file:
        file.gather(memory, start, end - start)
        lead = start % ALIGN
        assert bytes(memory[lead : lead + end - start]) == path.read_bytes()[start:end]
        third = (end - start) // 3
        views = [memoryview(bytearray(count)) for count in (third, end - start - third) if count]
        file.scatter(views, start)
        assert b"".join(map(bytes, views)) == path.read_bytes()[start:end]


@pytest.mark.parametrize("reads", [DIRECT, AUTO])
def test_past_the_cache_nothing_stays_in_it(reads: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 * HUGE_PAGE))
    memory = aligned(4 * HUGE_PAGE)
    make_cold([path])
    with opened(path, reads) as file:
        if not file.past_cache:
            pytest.skip("this filesystem allows no O_DIRECT")
        if resident(path):
            pytest.skip("this filesystem keeps its files in memory")
        file.gather(memory, 0, len(memory))
        assert resident(path) < 0.01
        file.scatter([memory], 0)
        assert resident(path) > 0.9
    assert bytes(memory) == path.read_bytes()


def test_what_is_in_the_cache_comes_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each stretch asked for, if all of it is there."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * HUGE_PAGE + 5))
    make_cold([path])
    plain, descriptors = os.preadv, list[int]()
    memory = aligned(9 * HUGE_PAGE)
    with opened(path, AUTO) as file:
        if not file.past_cache or resident(path):
            pytest.skip("this filesystem allows no O_DIRECT, or keeps its files in memory")
        os.posix_fadvise(file._plain, 0, 0, os.POSIX_FADV_RANDOM)  # nothing more than is asked for
        file.scatter([aligned(HUGE_PAGE + 5)], 7 * HUGE_PAGE)
        monkeypatch.setattr(
            source_file.os, "preadv", lambda fd, views, at: (descriptors.append(fd), plain(fd, views, at))[1]
        )
        file.gather(memory, 7 * HUGE_PAGE + 1, HUGE_PAGE + 4)
        assert set(descriptors) == {file._plain}
        assert bytes(memory[1 : HUGE_PAGE + 5]) == path.read_bytes()[7 * HUGE_PAGE + 1 :]
        descriptors.clear()
        make_cold([path])
        file.gather(memory, 0, 8 * HUGE_PAGE + 5)
        assert descriptors[0] == file._direct
    assert bytes(memory[: 8 * HUGE_PAGE + 5]) == path.read_bytes()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("after", [0, 1])
def test_a_system_that_refuses_in_the_middle(
    code: int, after: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is read through the cache."""
    plain, calls = os.preadv, 0

    def preadv(descriptor: int, views: list[Any], start: int) -> int:
        nonlocal calls
        if descriptor != file._direct:
            return plain(descriptor, views, start)
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return plain(descriptor, [views[0][:ALIGN]], start)

    memory = aligned(SIZE + 2 * ALIGN)
    with opened(path) as file:
        if not file.past_cache:
            pytest.skip("this filesystem allows no O_DIRECT")
        monkeypatch.setattr(source_file.os, "preadv", preadv)
        file.gather(memory, 100, SIZE - 100)
        assert not file.past_cache and calls == after + 1
    assert bytes(memory[100:SIZE]) == path.read_bytes()[100:]


def test_a_system_that_refuses_to_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def refusing(name: Any, flags: int, *more: Any) -> int:
        if flags & source_file.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(name, flags, *more)

    monkeypatch.setattr(source_file, "O_DIRECT", os.O_DIRECT)
    monkeypatch.setattr(source_file.os, "open", refusing)
    memory = aligned(SIZE + 2 * ALIGN)
    with opened(path) as file:
        assert not file.past_cache
        file.gather(memory, 1, SIZE - 1)
    assert bytes(memory[1:SIZE]) == path.read_bytes()[1:]


@pytest.mark.parametrize("reads", READS)
def test_faults_are_told(reads: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = aligned(2 * SIZE + 2 * ALIGN)
    with opened(path, reads) as file:
        with pytest.raises(OverlayError, match="changed since the overlay was written") as caught:
            file.gather(memory, 10, SIZE)
        assert caught.value.found == "no more"

        def broken(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(source_file.os, "preadv", broken)
        with pytest.raises(OverlayError) as caught:
            file.gather(memory, 0, 10)
        assert caught.value.found == "Input/output error" and caught.value.file == str(path)
    with pytest.raises(OverlayError) as caught:
        SourceFile(tmp_path / "absent", reads)
    assert caught.value.expected == "readable" and caught.value.next == f"ltxpack verify {tmp_path}"


@pytest.mark.parametrize("nbytes", [0, 1, ALIGN, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_large_memory_begins_on_a_huge_page(nbytes: int) -> None:
    memory = HostMemory(nbytes, HostCopies(None))  # type: ignore[arg-type]
    assert memory.bytes.nbytes == nbytes and memory.bytes.data_ptr() % ALIGN == 0
    if nbytes >= HUGE_PAGE:
        assert memory.bytes.data_ptr() % HUGE_PAGE == 0
    before = own_memory()
    memory.bytes.fill_(7)
    assert own_memory() - before <= -(-nbytes // ALIGN) * ALIGN + SLACK, "no more than asked for"
    assert not nbytes or memory.bytes.max() == memory.bytes.min() == 7


def test_memory_that_is_not_to_be_had() -> None:
    with pytest.raises(MemoryError, match="bytes of host memory"):
        HostMemory(1 << 60, HostCopies(None))  # type: ignore[arg-type]
