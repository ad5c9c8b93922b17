"""A file is published whole or not at all, whoever else writes the same name meanwhile."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from support import Mount

from ltxpack.errors import OverlayError, UsageError
from ltxpack.files.publish import (
    Temporary,
    atomic_write,
    check_writable,
    move_file,
    remove_temporaries,
    try_move,
    write_errors,
)

pytestmark = pytest.mark.usefixtures("fsync_waits")


@pytest.mark.parametrize("name", ["x", "視" * 85], ids=["short", "of 255 bytes"])
def test_two_writers_of_one_name_never_touch_each_other(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
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
    Temporary(path)
    remove_temporaries(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EFBIG, "another filesystem"),
        (errno.EACCES, "may not"),
        (errno.EIO, "Input"),
    ],
)
def test_what_the_system_refuses_is_told_with_the_way_on(code: int, told: str, tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match=told) as caught, write_errors(tmp_path / "x"):
        raise OSError(code, os.strerror(code))
    assert caught.value.file == str(tmp_path / "x") and "run the same command again" in caught.value.next


def test_a_disk_without_inodes_is_not_called_full(mount: Mount, tmp_path: Path) -> None:
    """``df -h`` shows free space there."""
    mount(tmp_path / "disk", options="size=16m,nr_inodes=2")
    (tmp_path / "disk/one").touch()
    told = pytest.raises(OverlayError, match=r"disk/two: the disk takes no more files.*\n.*\(df -i")
    with told, write_errors(tmp_path / "disk/two"):
        atomic_write(tmp_path / "disk/two", b"")
    with pytest.raises(UsageError, match="no free inodes"):
        check_writable(tmp_path / "disk/two", "-o", "two")


def test_a_limit_of_the_shell_is_not_taken_for_that_of_the_filesystem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (8, 8))
    with pytest.raises(OverlayError, match=r"larger .*ulimit -f.*\n.*raise that limit"), write_errors(tmp_path):
        raise OSError(errno.EFBIG, "File too large")


def test_of_a_rename_the_place_is_named_where_something_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"x")
    (tmp_path / "there").mkdir()
    with pytest.raises(OverlayError) as caught, write_errors(tmp_path):
        move_file(tmp_path / "new", tmp_path / "there")
    assert caught.value.file == str(tmp_path / "there")


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


@pytest.mark.parametrize("link", [False, True], ids=["a file", "a link"])
def test_a_file_is_moved_between_filesystems_as_a_copy(
    link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, real = tmp_path / "one/x", tmp_path / "two/x", os.replace
    for path in (source, target):
        path.parent.mkdir()
    target.write_bytes(b"older")
    source.symlink_to("../goal") if link else source.write_bytes(b"newer")

    def replace(origin: Path, goal: Path) -> None:
        if Path(origin).parent != Path(goal).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(origin, goal)

    monkeypatch.setattr(os, "replace", replace)
    move_file(source, target)
    assert target.is_symlink() == link
    assert str(target.readlink()) == "../goal" if link else target.read_bytes() == b"newer"
    assert not os.path.lexists(source) and list(target.parent.iterdir()) == [target]


def test_a_file_that_is_moved_onto_its_own_hard_link_leaves_its_old_name(tmp_path: Path) -> None:
    source, target = tmp_path / "x", tmp_path / "y"
    source.write_bytes(b"one")
    target.hardlink_to(source)
    move_file(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def test_a_trial_leaves_nothing_and_replaces_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for left in (tmp_path / ".trial", tmp_path / "a/.trial"):
        left.touch()
    try_move(tmp_path, tmp_path / "a", ".trial")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and not list((tmp_path / "a").iterdir())
    with pytest.raises(FileNotFoundError):
        try_move(tmp_path, tmp_path / "none", ".trial")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)
    for name in ("pipe", "link"):
        with pytest.raises(UsageError, match="is a device or a pipe"):
            check_writable(tmp_path / name, "--page", "plan.html")


def test_a_name_is_written_in_a_locale_that_lacks_its_letters(tmp_path: Path) -> None:
    code = "import sys, pathlib, ltxpack.files.publish as p; p.atomic_write(pathlib.Path(sys.argv[1]), b'x')"
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "視.mp4"], env=ascii_only, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["視.mp4"]


def test_a_file_of_another_user_in_a_folder_like_tmp_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o1777)
    path = tmp_path / "video.mp4"
    path.touch()
    check_writable(path, "-o", "video.mp4")
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UsageError, match="belongs to another user"):
        check_writable(path, "-o", "video.mp4")
    check_writable(tmp_path / "mine.mp4", "-o", "video.mp4")
