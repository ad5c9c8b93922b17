"""Files that systems and other programs put into any folder: they are never inputs, and no damage."""

from __future__ import annotations

from pathlib import Path

# What a new ext4 filesystem holds.
LOST_AND_FOUND = "lost+found"


def is_foreign(path: str) -> bool:
    """Whether ``path``, with ``/``, has a part that begins with a dot (``._x`` and ``.DS_Store`` of macOS), or such."""
    return any(part.startswith(".") or part == LOST_AND_FOUND for part in path.split("/"))


def entries(folder: Path) -> list[Path]:
    """What ``folder`` holds, in order, without what is foreign. Raises OSError."""
    return sorted(path for path in folder.iterdir() if not is_foreign(path.name))
