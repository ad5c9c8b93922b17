"""What is in the page cache is told, page by page, and what is asked there while a run computes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from _measure import make_cold, resident
from support import until

from ltxpack.files import direct
from ltxpack.files.direct import PAGE, PageCache
from ltxpack.files.reader import READ_BYTES
from ltxpack.runtime.weights.keeper import CacheWarmer

pytestmark = pytest.mark.usefixtures("fsync_waits")

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


def read(path: Path, start: int, nbytes: int) -> bytes:
    """Through the cache, and nothing beyond."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    data = os.pread(fd, nbytes, start)
    os.close(fd)
    return data


def until_held(cache: PageCache, path: Path, start: int, nbytes: int) -> None:
    """What is read is in the cache; a full machine may drop it before that is looked at."""
    until(lambda: read(path, start, nbytes) and cache.holds(start, nbytes))


def test_what_is_there_is_told_page_by_page(path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with cache_of(tmp_path / "empty") as cache:
        assert not cache.holds(0, 1)
    with cache_of(path) as cache:
        assert not cache.holds(0, 1) and not cache.holds(0, SIZE)
        until_held(cache, path, 2 * READ_BYTES, READ_BYTES)
        until(lambda: read(path, 2 * READ_BYTES, READ_BYTES) and cache.holds(2 * READ_BYTES + 1, 1))
        assert not cache.holds(2 * READ_BYTES - 1, READ_BYTES) and not cache.holds(2 * READ_BYTES, READ_BYTES + 1)
        until(lambda: read(path, SIZE - 1, 1) and cache.holds(SIZE - 77, 77))
        assert not cache.holds(0, SIZE)
        until_held(cache, path, 0, SIZE)
        assert not cache.holds(0, SIZE + 1), "beyond the end"
        with path.open("r+b") as file:
            file.truncate(PAGE)
        assert not cache.holds(0, SIZE) and not cache.holds(2 * READ_BYTES, READ_BYTES)


def test_where_the_system_does_not_say(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, cache_of(path) as cache:
        until_held(cache, path, 0, PAGE)
        patch.setattr(direct._libc(), "mincore", lambda *_: -1)
        assert not cache.holds(0, PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(direct._libc(), "mmap", lambda *_: direct.MAP_FAILED)
        with cache_of(path) as cache:
            assert not cache.holds(0, PAGE)
    monkeypatch.setattr(direct.os, "geteuid", lambda: os.getuid() + 1)
    with cache_of(path) as cache:
        assert not cache.holds(0, PAGE), "of a file of somebody else's everything is said to be there"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Bytes of each file that the system was asked to read; when it does, and what it keeps, is its own affair."""
    found, plain = Counter[Path](), os.posix_fadvise

    def advise(fd: int, start: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            found[Path(f"/proc/self/fd/{fd}").readlink()] += nbytes
        plain(fd, start, nbytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


def warmed(asked: Counter[Path], *files: Path, room: int = 2 * SIZE) -> Counter[Path]:
    """What of ``files`` is asked into the cache, after a load began and ended."""
    warmer = CacheWarmer(files, room)
    try:
        time.sleep(0.1)
        assert not asked, "nothing was loaded yet"
        with warmer.waiting():
            pass
        warmer._background.result()
    finally:
        warmer.close()
    return asked


def test_files_are_asked_into_the_cache(path: Path, tmp_path: Path, asked: Counter[Path]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(path)
    for other in (tmp_path / "pipe", tmp_path / "absent"):
        CacheWarmer([other], SIZE).close()
    assert warmed(asked, tmp_path / "link", path) == {path: SIZE}


def test_no_more_than_has_room(path: Path, asked: Counter[Path]) -> None:
    assert warmed(asked, path, room=2 * READ_BYTES + 5) == {path: 2 * READ_BYTES}


def test_nothing_is_asked_for_while_others_read(path: Path, asked: Counter[Path]) -> None:
    warmer = CacheWarmer([path], SIZE)
    with warmer.waiting(), warmer.waiting():
        with warmer.waiting():
            pass
        time.sleep(0.1)
        assert not asked
    warmer.close()
