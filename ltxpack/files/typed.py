"""Expands paths that people type, and finds the names that they may have meant."""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ltxpack.errors import UsageError


def at_home(text: str | Path) -> Path:
    """``text`` with the user's folder for a leading ``~``; unchanged if there is no such user.

    Raises UsageError for an empty text as the name of a file or folder: it would be the current folder.
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


def similar_names(name: str, known: Iterable[str]) -> list[str]:
    """The names in ``known`` that differ from ``name`` only in case and ending, then similar ones: five at most."""
    known, ending = list(known), ".safetensors"
    wanted = name.lower().removesuffix(ending)
    same = [other for other in known if other.lower().removesuffix(ending) == wanted]
    near = [other for end in ("", ending) for other in difflib.get_close_matches(name + end, known, 5, 0.6)]
    return list(dict.fromkeys([*same, *near]))[:5]


def similar_paths(path: Path) -> list[str]:
    """Paths with similar names beside a ``path`` that does not exist."""
    try:
        beside = {entry.name: entry for entry in path.parent.iterdir()}
    except (OSError, ValueError):
        return []
    return [str(beside[name]) for name in similar_names(path.name, beside)]
