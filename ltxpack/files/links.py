"""Files that share their bytes with their source: reflinks (copy on write) and hard links."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from pathlib import Path

from ltxpack.files.publish import Temporary, fsync_file, write_errors

# _IOW(0x94, 9, int). These processors give the direction "write" other bits in a request than all others do.
_OTHER_BITS = ("mips", "ppc", "powerpc", "sparc", "alpha")
FICLONE = 0x80049409 if platform.machine().startswith(_OTHER_BITS) else 0x40049409


def link_file(source: Path, target: Path) -> str:
    """Give ``target`` the bytes of ``source`` without copying: "reflinked" or "hard-linked"; else "copied".

    "copied" means that nothing was made and the caller has to copy. ``source`` must be the real file, no symlink.
    """
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        link = Temporary(target, made=False)
        reflinked = _reflink(source, link.path)
        linked = reflinked or _hard_link(source, link.path)
        if linked:
            with contextlib.suppress(OSError):  # some systems sync only what this process wrote
                fsync_file(link.path)
            link.publish(synced=True)
    return "reflinked" if reflinked else "hard-linked" if linked else "copied"


def _reflink(source: Path, target: Path) -> bool:
    try:
        with source.open("rb") as origin, target.open("xb") as copy:
            fcntl.ioctl(copy.fileno(), FICLONE, origin.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
