"""Files that systems and other programs put into any folder, and downloads that are not finished.

ltxpack takes none of them as an input or a fault.
"""

from __future__ import annotations

import os
from pathlib import Path

from ltxpack.errors import SourceError

# The folder in every new ext4 filesystem.
LOST_AND_FOUND = "lost+found"
# Endings that download programs use while a file is not whole: aria2 and axel for a second file beside it, browsers,
# wget wrappers, torrent programs and hub clients for the file itself.
ENDINGS = (
    ".aria2", ".aria2__temp", ".st", ".part", ".partial", ".filepart", ".crdownload", ".opdownload", ".download",
    ".incomplete", ".!ut", ".!qB", ".bc!",
)  # fmt: skip


def is_foreign(path: str) -> bool:
    """Whether a part of ``path`` begins with a dot (``._x`` and ``.DS_Store`` of macOS) or is ``lost+found``."""
    return any(part.startswith(".") or part == LOST_AND_FOUND for part in path.split("/"))


def entries(folder: Path) -> list[Path]:
    """The entries of ``folder`` in order, without foreign ones. Raises OSError."""
    return sorted(path for path in folder.iterdir() if not is_foreign(path.name))


def refuse_unfinished(path: str | os.PathLike[str]) -> None:
    """Refuse (SourceError) an input with a download program's own file beside it: the input may be half a file.

    Looks beside ``path``, and beside the target of a link at ``path``.
    """
    typed = Path(path)
    for place in dict.fromkeys((typed, Path(os.path.realpath(typed)))):
        beside = [place.with_name(place.name + ending) for ending in ENDINGS if len(place.name + ending) <= 255]
        found = next((each for each in beside if os.path.lexists(each)), None)
        if found is not None:
            raise SourceError(
                "is perhaps half a download: a download program's file is beside it", file=typed, found=found.name,
                next=f"let the download finish, or remove {found.name} if the file is whole; then run the same command",
            )  # fmt: skip


def finished_name(name: str) -> str | None:
    """The final name of an unfinished download called ``name``; None for other names."""
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending) and name != ending), None)
