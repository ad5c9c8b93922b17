"""Downloads that did not finish: told by the file that a download program keeps beside what it fetches."""

from __future__ import annotations

import os
from pathlib import Path

from ltxpack.errors import SourceError

# What download programs append to a name while the file is not whole: aria2 and axel to one beside it, browsers,
# wget wrappers, torrent programs and hub clients to the file itself.
ENDINGS = (
    ".aria2", ".aria2__temp", ".st", ".part", ".partial", ".filepart", ".crdownload", ".opdownload", ".download",
    ".incomplete", ".!ut", ".!qB", ".bc!",
)  # fmt: skip


def refuse_unfinished(path: str | os.PathLike[str]) -> None:
    """Refuse (SourceError) an input that a download program has a file of its own beside: it may be a half of it.

    The file is looked for beside ``path`` and beside what a link there leads to.
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
    """The name that an unfinished download called ``name`` will have; None for other names."""
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending) and name != ending), None)
