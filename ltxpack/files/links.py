"""Files that share their bytes with their source: reflinks (copy on write) and hard links."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ltxpack.files.failure import write_failure
from ltxpack.files.tensorfile import fsync_folder

FICLONE = 0x40049409


def link_file(source: Path, target: Path) -> str:
    """Give ``target`` the bytes of ``source`` without copying: "reflinked" or "hard-linked"; else "copied".

    "copied" means that nothing was made and the caller has to copy. ``source`` must be the real file, no symlink.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
    except OSError as error:
        raise write_failure(error, target) from None
    how = "reflinked" if _reflink(source, part) else "hard-linked" if _hard_link(source, part) else "copied"
    if how != "copied":
        try:
            _sync_file(part)
            part.replace(target)
            if part.exists():  # rename does nothing when both names are the same file already
                part.unlink()
            fsync_folder(target.parent)
        except OSError as error:
            raise write_failure(error, target) from None
    return how


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl

        with source.open("rb") as origin, target.open("xb") as copy:
            fcntl.ioctl(copy.fileno(), FICLONE, origin.fileno())
    except ImportError:
        return False
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except (OSError, NotImplementedError):
        return False
    return True


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file of another owner, or a system that syncs only what it wrote
            os.fsync(fd)
    finally:
        os.close(fd)
