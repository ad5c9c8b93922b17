"""Expands paths that people type."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ltxpack.errors import UsageError


def at_home(text: str | Path) -> Path:
    """``text`` with the user's folder for a leading ``~``; unchanged if there is no such user.

    Raises UsageError for an empty text, which would be the current folder.
    """
    if text == "":
        problem, advice = "the name of a file or folder is empty", "give one (a variable of the shell may be unset)"
        raise UsageError(problem, next=advice)
    return Path(os.path.expanduser(text))  # noqa: PTH111 (a Path raises for a user that is not there)


def denied(path: Path) -> str | None:
    """Why ``path``, or the content of a folder, cannot be read; None if it can be, or if there is nothing."""
    try:
        folder = stat.S_ISDIR(path.stat().st_mode)
    except PermissionError as error:
        return f"cannot be read: {error.strerror}"
    except (OSError, ValueError):  # not there, or no path at all
        return None
    closed = folder and not os.access(path, os.R_OK | os.X_OK)
    return f"cannot be read: {os.strerror(errno.EACCES)}" if closed else None
