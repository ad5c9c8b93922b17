"""The one way to publish a file: write a temporary file beside it, flush it to the disk, rename it.

Two processes that write the same path never share a temporary file: each publishes its own, whole, and the last rename
wins. A killed process leaves its temporary file behind and changes nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import resource
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ltxpack.errors import OverlayError, UnwrittenError, UsageError, quoted

WRITE_PROBLEMS = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EFBIG: (
        "is larger than this filesystem allows",
        "choose another filesystem (materialize: or a smaller --max-shard-size)",
    ),
    errno.EACCES: ("may not be written", "correct the permissions"),
    errno.EPERM: ("may not be written", "correct the permissions"),
    errno.EROFS: ("is on a read-only filesystem", "choose another folder"),
}
RESUME = "then run the same command again: finished files are kept"
# Disk space for a file beside its bytes: unfilled blocks, its name, the journal.
BYTES_PER_FILE = 16 * 1024
# Some filesystems make inodes of free space: with less than this they have neither.
ROOM_FOR_INODES = 1024 * 1024
# Ends the name of every temporary file.
TEMPORARY_ENDING = ".tmp"
STALE_SECONDS = 24 * 3600
RANDOM_BYTES = 8


def clipped_name(path: Path) -> str:
    """The first 200 bytes of the name of ``path``: a longer name leaves no room for a temporary file's own."""
    return os.fsencode(path.name)[:200].decode(sys.getfilesystemencoding(), "ignore")


class Temporary:
    """A temporary file that becomes ``path``: empty when made, renamed by ``publish``, removed by ``discard``.

    As a context manager it gives the temporary path, publishes after the block and discards if the block raises.
    The temporary file is in the folder of ``path``. Raises OSError.
    """

    def __init__(self, path: Path, *, made: bool = True) -> None:
        """``made`` False only chooses the name: the caller makes the file, as a link."""
        self.target = path
        self.path = path.parent / f".{clipped_name(path)}.{secrets.token_hex(RANDOM_BYTES)}{TEMPORARY_ENDING}"
        if made:
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))

    def publish(self, *, synced: bool = False) -> None:
        """Give the file its final name, and flush both to the disk. ``synced``: its bytes are on the disk already."""
        if not synced:
            fsync_file(self.path)
        move_file(self.path, self.target)
        fsync_folder(self.target.parent)

    def discard(self) -> None:
        """Remove the file, if it is there and not yet published."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            self.discard()


def remove_temporaries(path: Path, *, stale: bool = False) -> None:
    """Remove temporary files for ``path`` of killed processes; nobody may be writing ``path``. Raises OSError.

    ``stale``: others may be writing ``path``, so it removes only files that have not changed for a day, and it leaves
    what it may not remove.
    """
    for left in path.parent.glob(f".{glob.escape(clipped_name(path))}.{'?' * 2 * RANDOM_BYTES}{TEMPORARY_ENDING}"):
        with contextlib.suppress(OSError if stale else FileNotFoundError):
            if not stale or time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()


def move_file(source: Path, target: Path) -> None:
    """Give the file or link ``source`` the name ``target``, in place of a file with that name. Raises OSError.

    Between filesystems, or mounts of one, a copy gets the name. A target that is itself a mount point, as in
    containers, stays and gets the bytes.
    """
    try:
        source.replace(target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            _copy(source, target)
        elif error.errno == errno.EBUSY and target.is_file() and target.stat().st_nlink == 1:
            shutil.copyfile(source, target)
            fsync_file(target)
        else:
            raise
    # A rename does nothing where both names are hard links of one file.
    source.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    linked = source.is_symlink()
    copy = Temporary(target, made=not linked)
    try:
        shutil.copyfile(source, copy.path, follow_symlinks=False)
        copy.publish(synced=linked)
    finally:
        copy.discard()


def try_move(origin: Path, target: Path, name: str) -> None:
    """Move an empty file ``name`` from the folder ``origin`` to the folder ``target``, to see whether that works.

    Removes the file afterwards, and replaces one that a killed process left. Raises OSError.
    """
    made, moved = origin / name, target / name
    try:
        made.unlink(missing_ok=True)
        os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        made.rename(moved)
    finally:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)
            moved.unlink(missing_ok=True)


def existing_parent(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that exists."""
    folder = Path(os.path.realpath(folder))
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_writable(path: Path, flag: str, usual: str) -> None:
    """Raises UsageError unless a file can be written at ``path``, the value of ``flag``; ``usual`` is an example name.

    It tries with an empty file, because permissions do not tell everything.
    """
    folder = path.absolute().parent
    if path.is_dir():
        better = f"choose {flag} {quoted(path / usual)}"
        raise UsageError("is a folder", file=path, expected="a file name", next=better)
    if not folder.is_dir():
        remedy = f"mkdir -p {quoted(path.parent)}"
        raise UsageError("no such folder", file=path.parent, expected="a folder that exists", next=remedy)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError("no permission to write there", file=path.parent, next=f"choose {flag} in another folder")
    if path.exists() and not path.is_file():
        raise UsageError("is a device or a pipe", file=path, expected="a file name", next=f"choose {flag} {usual}")
    if path.exists() and _is_kept_for_others(folder, path):
        raise UsageError("belongs to another user", file=path, next=f"choose another {flag}")
    try:
        Temporary(path.absolute()).discard()
    except OSError as error:
        raise UsageError(_told(error, path)[0], file=path.parent, next=f"choose {flag} in another folder") from None


def _is_kept_for_others(folder: Path, path: Path) -> bool:
    """Whether only owners may replace files in ``folder``, as in /tmp, and ``path`` belongs to another user."""
    status = folder.stat()
    return bool(status.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, status.st_uid, path.stat().st_uid)


def atomic_write(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: whole and flushed to the disk, or not at all. Raises OSError."""
    with Temporary(path) as temporary:
        temporary.write_bytes(data)


def fsync_file(path: Path) -> None:
    """Flush the bytes of the file at ``path`` to the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(folder: str | Path) -> None:
    """Make the names in ``folder`` survive a power cut, as far as the filesystem can."""
    with contextlib.suppress(OSError):
        fsync_file(Path(folder))


def require_space(folder: Path, written: int, files: int) -> None:
    """Raises OverlayError if ``folder``, which may not exist yet, is not writable or lacks ``written`` bytes."""
    base = existing_parent(folder)
    if not os.access(base, os.W_OK | os.X_OK):
        raise OverlayError("may not be written", file=base, next="choose another folder, or correct its permissions")
    free = shutil.disk_usage(base).free
    if written + BYTES_PER_FILE * files > free:
        wanted = f"{written} bytes free"
        advice = "free some space, or choose another folder, then run the same command again"
        raise OverlayError("the disk is too small", file=base, expected=wanted, found=f"{free} bytes", next=advice)


def lacks_inodes(path: Path) -> bool:
    """Whether the disk of ``path`` has room left, but none for another file."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(existing_parent(path))
        return disk.f_files > 0 == disk.f_favail and disk.f_bavail * disk.f_frsize > ROOM_FOR_INODES
    return False


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an UnwrittenError of the output ``path``."""
    try:
        yield
    except OSError as error:
        raise unwritten(path, error) from None


def unwritten(path: Path, error: OSError) -> UnwrittenError:
    problem, remedy = _told(error, path)
    return UnwrittenError(problem, file=path, next=f"{remedy}, then run the same command again")


def _told(error: OSError, path: Path) -> tuple[str, str]:
    """The problem, and its remedy."""
    if error.errno == errno.ENOSPC and lacks_inodes(path):
        return "the disk takes no more files: it has no free inodes", "remove some files there (df -i counts inodes)"
    if error.errno == errno.EFBIG and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
        return "is larger than this shell allows (ulimit -f)", "raise that limit"
    return WRITE_PROBLEMS.get(error.errno or 0, (f"cannot be written: {error.strerror or error}", "correct that"))


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an OverlayError for the path that it names, else for ``path``.

    Of a rename it names the new path, where something is in the way.
    """
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename
        named = Path(place) if isinstance(place, str | Path) else path
        problem, remedy = _told(error, named)
        file = path if named.suffix == TEMPORARY_ENDING else named
        raise OverlayError(problem, file=file, next=f"{remedy}, {RESUME}") from None
