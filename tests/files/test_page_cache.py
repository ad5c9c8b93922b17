"""What is in the page cache is told, page by page, and what is asked there while a run computes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from _measure import make_cold, resident

from ltxpack.files import direct
from ltxpack.files.direct import PAGE, PageCache
from ltxpack.files.reader import READ_BYTES
from ltxpack.runtime.weights.background import CacheWarmer

SIZE = 4 * READ_BYTES + 77


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


def test_what_is_there_is_told_page_by_page(path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with cache_of(tmp_path / "empty") as cache:
        assert not cache.holds(0, 1)
    with cache_of(path) as cache:
        assert not cache.holds(0, 1) and not cache.holds(0, SIZE)
        read(path, 2 * READ_BYTES, READ_BYTES)
        assert cache.holds(2 * READ_BYTES, READ_BYTES) and cache.holds(2 * READ_BYTES + 1, 1)
        assert not cache.holds(2 * READ_BYTES - 1, READ_BYTES) and not cache.holds(2 * READ_BYTES, READ_BYTES + 1)
        read(path, SIZE - 1, 1)
        assert cache.holds(SIZE - 77, 77) and not cache.holds(0, SIZE)
        read(path, 0, SIZE)
        assert cache.holds(0, SIZE)
        assert not cache.holds(0, SIZE + 1), "beyond the end"
        with path.open("r+b") as file:
            file.truncate(PAGE)
        assert not cache.holds(0, SIZE) and not cache.holds(2 * READ_BYTES, READ_BYTES)


def test_where_the_system_does_not_say(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(path, 0, SIZE)
    with monkeypatch.context() as patch, cache_of(path) as cache:
        assert cache.holds(0, PAGE)
        patch.setattr(direct._libc(), "mincore", lambda *_: -1)
        assert not cache.holds(0, PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(direct._libc(), "mmap", lambda *_: direct.MAP_FAILED)
        with cache_of(path) as cache:
            assert not cache.holds(0, PAGE)
    monkeypatch.setattr(direct.os, "geteuid", lambda: os.getuid() + 1)
    with cache_of(path) as cache:
        assert not cache.holds(0, PAGE), "of a file of somebody else's everything is said to be there"


def warmed(*files: Path, room: int = 2 * SIZE) -> None:
    """``files`` are asked into the cache, after a load began and ended."""
    warmer = CacheWarmer(files, room)
    try:
        time.sleep(0.1)
        assert not any(map(resident, files)), "nothing was loaded yet"
        with warmer.waiting():
            pass
        warmer._background.result()
    finally:
        warmer.close()


def comes(path: Path, share: float) -> bool:
    """Whether so much of ``path`` is in the cache soon: the system reads by itself."""
    until = time.monotonic() + 30
    while resident(path) != pytest.approx(share, abs=0.01) and time.monotonic() < until:
        time.sleep(0.02)
    return bool(resident(path) == pytest.approx(share, abs=0.01))


def test_files_are_asked_into_the_cache(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(path)
    for other in (tmp_path / "pipe", tmp_path / "absent"):
        CacheWarmer([other], SIZE).close()
    warmed(tmp_path / "link", path)
    assert comes(path, 1)


def test_no_more_than_has_room(path: Path) -> None:
    warmed(path, room=2 * READ_BYTES + 5)
    assert comes(path, 2 * READ_BYTES / SIZE)


def test_nothing_is_asked_for_while_others_read(path: Path) -> None:
    warmer = CacheWarmer([path], SIZE)
    with warmer.waiting(), warmer.waiting():
        with warmer.waiting():
            pass
        time.sleep(0.1)
        assert resident(path) == 0
    warmer.close()
