"""One process at a time on one overlay: a lock file beside it, never inside what is published.

The system drops the lock when the process dies; the file then only remains until the next one takes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from pathlib import Path
from types import TracebackType
from typing import Self

from ltxpack.errors import OverlayError
from ltxpack.files.publish import write_failure

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
LOCK_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
WORK_FOLDER = ".ltxpack"


def real_target(overlay: Path) -> Path:
    """Where ``overlay`` really is: links followed, so that staging and lock lie on its filesystem."""
    return Path(os.path.realpath(overlay))


class OverlayLock:
    """Holds ``overlay`` (there already or not) for this process. Use as a context manager.

    Where this process may not write at all (a finished overlay on a read-only mount) nothing is held: all it can do
    is find the work done, and the first write tells the rest. Raises OverlayError naming the process and host that
    hold it.
    """

    def __init__(self, overlay: Path) -> None:
        target = real_target(overlay)
        self.overlay = overlay
        self.path = target.parent / f".{target.name}.lock"
        self._read_only = False
        if target.is_dir() and not os.access(target.parent, os.W_OK):
            self.path = target / WORK_FOLDER / "lock"
            self._read_only = not os.access(target, os.W_OK)
        self._fd = -1

    def __enter__(self) -> Self:
        if self._read_only:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._acquired():
                pass
        except OSError as error:
            raise write_failure(error, self.path) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._read_only:
            return
        if os.name != "nt":  # removed while still held, so that nobody else's lock is removed
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        if self.path.parent.name == WORK_FOLDER:
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    def _acquired(self) -> bool:
        """Open and lock the file; False if it was removed meanwhile by a process that let go of it."""
        self._fd = os.open(self.path, LOCK_FLAGS, 0o666)
        try:
            _lock(self._fd)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._fd), self.path.stat()):
                    os.ftruncate(self._fd, 0)
                    os.write(self._fd, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
                    return True
        except BlockingIOError:
            holder = _holder(self._fd)
            os.close(self._fd)
            raise OverlayError(
                "is being written by another ltxpack", file=self.overlay, found=holder, next="wait for it, or stop it"
            ) from None
        os.close(self._fd)
        return False


def _lock(fd: int) -> None:
    """Lock without waiting, where there are locks. Raises BlockingIOError if another process holds it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        os.lseek(fd, 2**30, os.SEEK_SET)  # far behind the text, which others must be able to read
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            raise BlockingIOError from None
        finally:
            os.lseek(fd, 0, os.SEEK_SET)
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _holder(fd: int) -> str:
    try:
        told = json.loads(os.pread(fd, 4096, 0))
        return f"process {int(told['pid'])} on {str(told['host'])[:80]}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return "a process that just started"
