"""One file, through the page cache or past it: the same bytes from anywhere, and a way on where the system refuses."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from _measure import make_cold, resident
from hypothesis import given, settings
from hypothesis import strategies as st
from support import until

from ltxpack.errors import AbsentError, FormatError, SourceError
from ltxpack.files import direct
from ltxpack.files.direct import (
    ALIGN,
    AUTO,
    DIRECT,
    DIRECT_KEPT,
    READS,
    DirectReader,
    DirectWriter,
    aligned_buffer,
    why_cached,
)

pytestmark = pytest.mark.usefixtures("fsync_waits")

SIZE = 5 * ALIGN + 77
LARGE = 2 * 1024 * 1024


def opened(path: Path, reads: str = DIRECT) -> closing[DirectReader]:
    return closing(DirectReader(path, reads))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("source") / "file"
    made.write_bytes(os.urandom(SIZE))
    return made


@settings(max_examples=200, deadline=None)
@given(st.integers(0, SIZE), st.integers(0, SIZE), st.sampled_from(READS))
def test_any_stretch(path: Path, one: int, other: int, reads: str) -> None:
    start, end = sorted((one, other))
    memory = aligned_buffer(SIZE + 2 * ALIGN)
    with opened(path, reads) as file:
        file.gather(memory, start, end - start)
        lead = start % ALIGN
        assert bytes(memory[lead : lead + end - start]) == path.read_bytes()[start:end]
        third = (end - start) // 3
        views = [memoryview(bytearray(count)) for count in (third, end - start - third) if count]
        file.scatter(views, start)
        assert b"".join(map(bytes, views)) == path.read_bytes()[start:end]


@pytest.mark.parametrize("reads", [DIRECT, DIRECT_KEPT, AUTO])
def test_past_the_cache_nothing_stays_in_it(reads: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 * LARGE))
    memory = aligned_buffer(4 * LARGE)
    make_cold([path])
    with opened(path, reads) as file:
        if not file.past_cache:
            pytest.skip("this filesystem allows no O_DIRECT")
        if resident(path):
            pytest.skip("this filesystem keeps its files in memory")
        file.gather(memory, 0, len(memory))
        assert resident(path) < 0.01
        file.scatter([memory], 0)
        if reads == DIRECT:
            assert resident(path) < 0.1
        else:  # a full machine may drop it again before it is looked at
            until(lambda: file.scatter([memory], 0) or resident(path) > 0.9)
    assert bytes(memory) == path.read_bytes()


def test_what_is_in_the_cache_comes_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each stretch asked for, if all of it is there."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * LARGE + 5))
    make_cold([path])
    plain, descriptors = os.preadv, list[int]()
    memory = aligned_buffer(9 * LARGE)
    with opened(path, AUTO) as file:
        if not file.past_cache or resident(path):
            pytest.skip("this filesystem allows no O_DIRECT, or keeps its files in memory")
        os.posix_fadvise(file._plain, 0, 0, os.POSIX_FADV_RANDOM)  # nothing more than is asked for
        monkeypatch.setattr(
            direct.os, "preadv", lambda fd, views, at: (descriptors.append(fd), plain(fd, views, at))[1]
        )

        def comes_from_there() -> bool:
            """A full machine may have dropped what was read before it is read again."""
            file.scatter([aligned_buffer(LARGE + 5)[: LARGE + 5]], 7 * LARGE)
            descriptors.clear()
            file.gather(memory, 7 * LARGE + 1, LARGE + 4)
            return set(descriptors) == {file._plain}

        until(comes_from_there)
        assert bytes(memory[1 : LARGE + 5]) == path.read_bytes()[7 * LARGE + 1 :]
        descriptors.clear()
        make_cold([path])
        file.gather(memory, 0, 8 * LARGE + 5)
        assert descriptors[0] == file._direct
    assert bytes(memory[: 8 * LARGE + 5]) == path.read_bytes()


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

    memory = aligned_buffer(SIZE + 2 * ALIGN)
    with opened(path) as file:
        if not file.past_cache:
            pytest.skip("this filesystem allows no O_DIRECT")
        monkeypatch.setattr(direct.os, "preadv", preadv)
        file.gather(memory, 100, SIZE - 100)
        assert not file.past_cache and calls == after + 1
    assert bytes(memory[100:SIZE]) == path.read_bytes()[100:]


@pytest.mark.parametrize("reads", READS)
def test_faults_are_told(reads: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = aligned_buffer(2 * SIZE + 2 * ALIGN)
    with opened(path, reads) as file:
        with pytest.raises(FormatError, match="10 bytes are missing"):
            file.gather(memory, 10, SIZE)
        monkeypatch.setattr(direct.os, "preadv", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        with pytest.raises(SourceError, match="cannot be read: Input/output error") as caught:
            file.gather(memory, 0, 10)
        assert caught.value.file == str(path)
    with pytest.raises(AbsentError):
        DirectReader(tmp_path / "absent", reads)


MOUNTS = r"""22 1 0:21 / / rw - ext4 /dev/vda rw
23 22 0:22 / /home rw shared:1 - nfs4 server:/home rw,vers=4.2
24 22 0:23 / /home/me/fast\040disk rw - xfs /dev/nvme0n1 rw
25 22 0:24 / /mnt/s3 rw - fuse.s3fs s3fs rw
26 22 0:25 / /mnt/covered rw - fuse.sshfs host rw
27 22 0:26 / /mnt/covered rw - ext4 /dev/vdb rw
28 22 0:27 / /share rw - virtiofs share rw
29 22 0:28 / /container rw - overlay overlay rw,lowerdir=/opt/layers,upperdir=/opt/up,workdir=/opt/work
30 22 0:29 / /far rw - overlay overlay rw,lowerdir=/home/layer:/opt,upperdir=/opt/up,workdir=/opt/work
31 22 0:30 / /windows rw - cifs //server/share rw
32 22 0:31 / /host rw - 9p host rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/x", ""), ("/homely", ""), ("/home", "nfs4"), ("/home/me/x", "nfs4"), ("/home/me/fast disk/x", ""),
        ("/mnt/s3/x", "fuse.s3fs"), ("/mnt/covered/x", ""), ("/share/x", "virtiofs"), ("/container/x", ""),
        ("/far/x", "nfs4"), ("/windows/x", "cifs"), ("/host/x", "9p"),
    ],
)  # fmt: skip
def test_network_and_fuse_filesystems_go_through_the_cache(
    path: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(direct, "MOUNTS", tmp_path / "mounts")
    assert why_cached(Path(path)) == (f"{kind} is faster that way" if kind else "")


def test_on_such_a_filesystem_no_file_is_opened_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text(f"1 1 0:1 / {tmp_path} rw - fuse.juicefs disk rw\n")
    monkeypatch.setattr(direct, "MOUNTS", tmp_path / "mounts")
    path = tmp_path / "file"
    path.touch()
    writer = DirectWriter(path)
    writer.append(aligned_buffer(3 * ALIGN))
    writer.sync()
    writer.close()
    memory = aligned_buffer(4 * ALIGN)
    with opened(path, AUTO) as reader:
        reader.gather(memory, 0, 3 * ALIGN)
        assert not (writer.direct or reader.past_cache)
        assert writer.why == reader.why == "fuse.juicefs is faster that way"
