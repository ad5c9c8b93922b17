"""A file is published whole or not at all, whoever else writes the same name meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest import mock

import pytest

from ltxpack.errors import OverlayError
from ltxpack.files.publish import Temporary, atomic_write, write_errors


def test_two_writers_of_one_name_never_touch_each_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    first, second = Temporary(path), Temporary(path)
    with first.path.open("wb") as one, second.path.open("wb") as two:
        one.write(b"first")
        two.write(b"sec")
        one.flush()
        first.publish()
        assert path.read_bytes() == b"first"
        two.write(b"ond")
        assert path.read_bytes() == b"first"
    second.publish()
    assert path.read_bytes() == b"second"
    first.discard()
    second.discard()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "told"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "may not be written"), (errno.EIO, "Input/output")],
)
def test_what_the_system_refuses_is_told_with_the_way_on(code: int, told: str, tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match=told) as caught, write_errors(tmp_path / "x"):
        raise OSError(code, os.strerror(code))
    assert caught.value.file == str(tmp_path / "x") and "run the same command again" in caught.value.next


def test_atomic_write_replaces_whole_or_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"three")
    with pytest.raises(KeyboardInterrupt), Temporary(path) as temporary:
        temporary.write_bytes(b"thr")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_replaces_a_link_not_what_it_points_to(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "x"
    other.write_bytes(b"kept")
    path.symlink_to(other)
    atomic_write(path, b"new")
    assert (other.read_bytes(), path.read_bytes(), path.is_symlink()) == (b"kept", b"new", False)
