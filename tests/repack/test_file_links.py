"""Files that are only copied: reflinked, hard-linked behind any symlink, or copied; never linked out of the overlay."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from pathlib import Path
from unittest import mock

import pytest
from blake3 import blake3
from support import Notes

from ltxpack.errors import FormatError, SourceError
from ltxpack.files.direct import BUFFER
from ltxpack.repack.items import CopyFile
from ltxpack.repack.write import FICLONE, copy_file

DATA = random.Random(2).randbytes(BUFFER + 1234)


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A file as a hub cache holds it: a relative symlink to a blob."""
    blob = tmp_path / "cache/blobs/abc"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(DATA)
    link = tmp_path / "cache/snapshots/1/lora.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../blobs/abc")
    return link


def item(source: Path) -> CopyFile:
    return CopyFile("loras/x.safetensors", source, len(DATA))


def check(folder: Path, listener: Notes, how: str) -> Path:
    path = folder / "loras/x.safetensors"
    assert path.read_bytes() == DATA
    assert not path.is_symlink()
    assert list(path.parent.iterdir()) == [path]
    assert listener.advanced == len(DATA)
    assert how in listener.details[0]
    return path


def test_the_real_file_behind_a_link_is_hard_linked(cached: Path, tmp_path: Path, listener: Notes) -> None:
    record = copy_file(item(cached), tmp_path / "out", listener)
    path = check(tmp_path / "out", listener, "hard-linked")
    assert path.samefile(cached)
    assert path.stat().st_nlink == 2
    assert (record.size, record.blake3, record.link) == (len(DATA), blake3(DATA).hexdigest(), "hard")
    assert copy_file(item(cached), tmp_path / "out", Notes()) == record
    assert list(path.parent.iterdir()) == [path]


def test_a_reflink_is_preferred_and_has_bytes_of_its_own(
    cached: Path, tmp_path: Path, listener: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(target: int, request: int, source: int) -> int:
        assert request == FICLONE
        os.pwrite(target, os.pread(source, len(DATA), 0), 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    record = copy_file(item(cached), tmp_path / "out", listener)
    path = check(tmp_path / "out", listener, "reflinked")
    assert not path.samefile(cached)
    assert (record.blake3, record.link) == (blake3(DATA).hexdigest(), None)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, None])
def test_where_nothing_can_be_linked_or_may_be_it_is_copied(
    code: int | None, cached: Path, tmp_path: Path, listener: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code is not None:
        monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(code, os.strerror(code))))
    record = copy_file(item(cached), tmp_path / "out", listener, copy=code is None)
    path = check(tmp_path / "out", listener, "copied, read with O_DIRECT, written with O_DIRECT")
    assert path.stat().st_nlink == 1
    assert (record.blake3, record.link) == (blake3(DATA).hexdigest(), None)


def test_a_source_that_changed_or_went_is_told(cached: Path, tmp_path: Path, listener: Notes) -> None:
    cached.resolve().write_bytes(DATA[:-1])
    with pytest.raises(FormatError, match="has changed since it was planned"):
        copy_file(item(cached), tmp_path / "out", listener)
    cached.resolve().unlink()
    with pytest.raises(SourceError, match="does not exist"):
        copy_file(item(cached), tmp_path / "out", listener)
    assert not (tmp_path / "out").exists()
