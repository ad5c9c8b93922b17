"""What is in the page cache is told, page by page, and what is brought there while a run computes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from _measure import make_cold, resident

from ltxpack.files import page_cache
from ltxpack.files.page_cache import PAGE, PageCache
from ltxpack.runtime.weights import cache_filler
from ltxpack.runtime.weights.cache_filler import CacheFiller
from ltxpack.runtime.weights.reading import PIECE

SIZE = 4 * PIECE + 77


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of which nothing is in memory."""
    made = tmp_path / "file"
    made.write_bytes(os.urandom(1024) * (SIZE // 1024) + bytes(SIZE % 1024))
    make_cold([made])
    if resident(made):
        pytest.skip("this filesystem keeps its files in memory")
    return made


@contextmanager
def cache_of(path: Path) -> Iterator[PageCache]:
    fd = os.open(path, os.O_RDONLY)
    cache = PageCache(fd)
    try:
        yield cache
    finally:
        cache.close()
        os.close(fd)


def read(path: Path, start: int, nbytes: int) -> None:
    """Through the cache, and nothing beyond."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, nbytes, start)
    os.close(fd)


def test_what_is_there_is_told_page_by_page(path: Path) -> None:
    with cache_of(path) as cache:
        assert not cache.holds(0, 1) and not cache.holds(0, SIZE)
        read(path, 2 * PIECE, PIECE)
        assert cache.holds(2 * PIECE, PIECE) and cache.holds(2 * PIECE + 1, 1)
        assert not cache.holds(2 * PIECE - 1, PIECE) and not cache.holds(2 * PIECE, PIECE + 1)
        read(path, SIZE - 1, 1)
        assert cache.holds(SIZE - 77, 77) and not cache.holds(0, SIZE)
        read(path, 0, SIZE)
        assert cache.holds(0, SIZE)
        assert not cache.holds(0, SIZE + 1), "beyond the end"
        with path.open("r+b") as file:
            file.truncate(PAGE)
        assert not cache.holds(0, SIZE) and not cache.holds(2 * PIECE, PIECE)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with cache_of(tmp_path / "empty") as cache:
        assert not cache.holds(0, 1)


def test_where_the_system_does_not_say(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(path, 0, SIZE)
    with monkeypatch.context() as patch, cache_of(path) as cache:
        assert cache.holds(0, PAGE)
        patch.setattr(page_cache._libc(), "mincore", lambda *_: -1)
        assert not cache.holds(0, PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(page_cache._libc(), "mmap", lambda *_: page_cache.FAILED)
        with cache_of(path) as cache:
            assert not cache.holds(0, PAGE)
    monkeypatch.setattr(page_cache.os, "geteuid", lambda: os.getuid() + 1)
    with cache_of(path) as cache:
        assert not cache.holds(0, PAGE), "of a file of somebody else's everything is said to be there"


@contextmanager
def filling(*files: Path, room: int = 2 * SIZE) -> Iterator[CacheFiller]:
    filler = CacheFiller(files, room)
    try:
        yield filler
    finally:
        filler.close()
        assert not filler._thread.is_alive()


def let_go(filler: CacheFiller) -> None:
    """A load begins and ends; then the filling too."""
    with filler.waiting():
        pass
    filler._thread.join(timeout=60)
    assert not filler._thread.is_alive()


def test_files_are_brought_there(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    link = tmp_path / "link"
    link.symlink_to(other)
    make_cold([other])
    os.mkfifo(tmp_path / "pipe")
    with filling(path, tmp_path / "absent", tmp_path / "pipe", link, other) as filler:
        let_go(filler)
    assert resident(path) == resident(other) == 1


@pytest.mark.parametrize("there", [False, True], ids=["cold", "half of it there"])
def test_no_more_than_has_room(there: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there already counts, and is not read again."""
    plain, starts = os.preadv, list[int]()

    def preadv(fd: int, views: list[memoryview], start: int) -> int:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        starts.append(start // PIECE)
        return plain(fd, views, start)

    monkeypatch.setattr(cache_filler.os, "preadv", preadv)
    if there:
        read(path, 0, PIECE)
    with filling(path, room=2 * PIECE + 5) as filler:
        let_go(filler)
    assert set(starts) == ({1} if there else {0, 1})
    assert resident(path) == pytest.approx(0.5, abs=0.01)


def test_nothing_is_read_while_others_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, steps, gone_on = os.preadv, list[int](), threading.Event()
    loads: list[Callable[[], object]] = []

    def preadv(fd: int, views: list[memoryview], start: int) -> int:
        steps.append(start)
        if start == 0:
            # A load begins in the middle of a piece: the piece is read to its end.
            load = filler.waiting()
            load.__enter__()
            loads.append(lambda: load.__exit__(None, None, None))
            gone_on.set()
        return plain(fd, views, start)

    monkeypatch.setattr(cache_filler.os, "preadv", preadv)
    with filling(path) as filler:
        assert not gone_on.wait(0.2), "nothing was loaded yet"
        with filler.waiting():
            pass
        assert gone_on.wait(60)
        with filler.waiting():
            assert not filler._free.wait(0.2)
        assert not filler._free.wait(0.2), "another load goes on"
        assert max(steps) < PIECE
        loads.pop()()
        filler._thread.join(timeout=60)
        assert max(steps) >= 3 * PIECE
    assert resident(path) == 1


def test_it_ends_with_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with filling(path):
        pass
    assert resident(path) == 0, "nothing was loaded yet"
    plain, steps = os.preadv, list[int]()

    def preadv(fd: int, views: list[memoryview], start: int) -> int:
        # The run ends in the middle of a piece: the piece is read to its end.
        filler._closed = True
        steps.append(start)
        return plain(fd, views, start)

    monkeypatch.setattr(cache_filler.os, "preadv", preadv)
    with filling(path) as filler:
        let_go(filler)
    assert steps == list(range(0, PIECE, cache_filler.STEP))
