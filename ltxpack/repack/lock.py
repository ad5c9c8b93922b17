"""Lets one process at a time work on an overlay, whichever user runs it.

The lock is a flock of the overlay's folder itself, which every user who can read the folder can take. A folder that
does not exist yet, or is being replaced, cannot be locked: a process that may write beside it also holds a lock file
there. A published folder contains no lock file, and the system drops all locks when the process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from pathlib import Path
from typing import Self

from ltxpack.errors import OverlayError, quoted
from ltxpack.files.publish import write_errors
from ltxpack.reporter import Reporter, SilentReporter

LOCK_FILE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
WORK_FOLDER = ".ltxpack"


def real_target(overlay: Path) -> Path:
    """The path of ``overlay`` with links resolved, so that staging and lock are on its filesystem."""
    return Path(os.path.realpath(overlay))


def refuse_links(*folders: Path) -> None:
    """Raise OverlayError if one of ``folders`` is a link: it would lead writes and removals out of the overlay."""
    for folder in folders:
        if folder.is_symlink():
            remedy = f"rm {quoted(folder)} (for a folder on another disk, mount that there)"
            raise OverlayError("is a link where only a folder may be", file=folder, next=remedy)


class OverlayLock:
    """Holds ``overlay``, which may not exist yet, for this process. Use as a context manager.

    ``shared``: for a process that only reads, together with others that only read. If the filesystem refuses locks, it
    holds nothing and the reporter gets a note. Raises OverlayError with the process and host of the lock, if known.
    """

    def __init__(self, overlay: Path, reporter: Reporter | None = None, *, shared: bool = False) -> None:
        self.overlay = overlay
        self._target = real_target(overlay)
        self._beside = self._target.parent / f".{self._target.name}.lock"
        self._reporter = reporter or SilentReporter()
        self._shared = shared
        self._told = False
        # Lock file (if any) and folders.
        self._held: list[tuple[int, Path]] = []

    def __enter__(self) -> Self:
        try:
            with write_errors(self._beside):
                there = self._target.is_dir()
                if not self._shared and (not there or os.access(self._target.parent, os.W_OK)):
                    self._target.parent.mkdir(parents=True, exist_ok=True)
                    # The folder's own lock is enough if no lock file can be made beside it.
                    with contextlib.suppress(OSError) if there else contextlib.nullcontext():
                        self._hold(self._beside, LOCK_FILE)
                if there:
                    self.hold_folder(self._target)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for fd, path in reversed(self._held):
            if path == self._beside:  # removed while held: later it may be another process's lock
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(fd)
        self._held.clear()

    def hold_folder(self, folder: Path) -> None:
        """Hold ``folder`` too, which becomes the overlay: the lock stays when it is renamed. Raises OSError."""
        self._hold(folder, FOLDER)

    def _hold(self, path: Path, flags: int) -> None:
        """Lock ``path``; try again if the process that held it has removed or replaced it."""
        while True:
            fd = os.open(path, flags, 0o666)
            self._held.append((fd, path))
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                self._held.pop()
                raise self._in_use(fd) from None
            except OSError as error:
                self._tell(path, error)
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    break
            os.close(self._held.pop()[0])
        if path == self._beside:
            with contextlib.suppress(OSError):  # a full disk
                os.ftruncate(fd, 0)
                os.write(fd, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())

    def _tell(self, path: Path, error: OSError) -> None:
        if not self._told:
            why = f"this filesystem has no locks ({error.strerror})"
            self._reporter.note(f"{path}: {why}; run one ltxpack at a time on it")
        self._told = True

    def _in_use(self, fd: int) -> OverlayError:
        try:
            told = json.loads(os.pread(fd, 4096, 0))
            holder = f"process {int(told['pid'])} on {str(told['host'])[:80]}"
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            holder = None
        os.close(fd)
        return OverlayError(
            "is in use by another ltxpack", file=self.overlay, found=holder, next="wait for it, or stop it"
        )
