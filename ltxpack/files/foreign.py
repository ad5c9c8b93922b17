"""Files that systems and other programs put into any folder: ltxpack never takes one as an input or a fault."""

from __future__ import annotations

from pathlib import Path

# The folder in every new ext4 filesystem.
LOST_AND_FOUND = "lost+found"


def is_foreign(path: str) -> bool:
    """Whether a part of ``path`` begins with a dot (``._x`` and ``.DS_Store`` of macOS) or is ``lost+found``."""
    return any(part.startswith(".") or part == LOST_AND_FOUND for part in path.split("/"))


def entries(folder: Path) -> list[Path]:
    """The entries of ``folder`` in order, without foreign ones. Raises OSError."""
    return sorted(path for path in folder.iterdir() if not is_foreign(path.name))
