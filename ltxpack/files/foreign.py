"""Files of systems and other programs, downloads that are not finished, and files of other formats.

ltxpack takes none of the first two as an input or a fault. Files of other formats, which users download or rename by
mistake, it recognises by their first bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ltxpack.errors import SourceError, printable

# The folder in every new ext4 filesystem.
LOST_AND_FOUND = "lost+found"
# Endings that download programs use while a file is not whole: aria2 and axel for a second file beside it, browsers,
# wget wrappers, torrent programs and hub clients for the file itself.
ENDINGS = (
    ".aria2", ".aria2__temp", ".st", ".part", ".partial", ".filepart", ".crdownload", ".opdownload", ".download",
    ".incomplete", ".!ut", ".!qB", ".bc!",
)  # fmt: skip

# The first bytes of a file that are enough to recognise its format.
HEAD_BYTES = 512
SHOWN_TEXT = 80

GGUF, PICKLE, ARCHIVE, TEXT = "gguf", "pickle", "archive", "text"
TAKE_OTHER = "take the same weights as a .safetensors file in bf16"
UNPACK = "unpack it, then name the .safetensors file in it"
FETCH = "fetch the file itself, logged in and with the licence accepted"


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


class Lookalike(NamedTuple):
    """A file of another format: its ``kind`` in one word, ``what`` it is in a phrase, and what to do ``instead``."""

    kind: str
    what: str
    instead: str


_SIGNS = (
    (b"GGUF", Lookalike(GGUF, "a GGUF file", TAKE_OTHER)),
    (b"PK\x03\x04", Lookalike(PICKLE, "a zip archive (a .pt or .bin pickle?)", TAKE_OTHER)),
    *((bytes((0x80, protocol)), Lookalike(PICKLE, "a Python pickle", TAKE_OTHER)) for protocol in range(2, 6)),
    (b"7z\xbc\xaf\x27\x1c", Lookalike(ARCHIVE, "a 7z archive", UNPACK)),
    (b"Rar!\x1a\x07", Lookalike(ARCHIVE, "a rar archive", UNPACK)),
    (b"\x1f\x8b", Lookalike(ARCHIVE, "a gzip archive", UNPACK)),
    (b"BZh", Lookalike(ARCHIVE, "a bzip2 archive", UNPACK)),
    (b"\xfd7zXZ\x00", Lookalike(ARCHIVE, "an xz archive", UNPACK)),
    (b"\x28\xb5\x2f\xfd", Lookalike(ARCHIVE, "a zstd archive", UNPACK)),
    (b"\x89HDF\r\n\x1a\n", Lookalike("hdf5", "an HDF5 file", TAKE_OTHER)),
)
_TAR_SIGN, _TAR_AT, _TAR = b"ustar", 257, Lookalike(ARCHIVE, "a tar archive", UNPACK)
_LFS = Lookalike(TEXT, "a git LFS pointer (the file itself was not fetched)", "fetch the file itself: git lfs pull")
# Lookalike.what -> its kind, for files of weights.
WEIGHT_FORMATS = {found.what: found.kind for found in (*(found for _, found in _SIGNS), _TAR)}


def lookalike(head: bytes) -> Lookalike | None:
    """The other format of a file that begins with ``head``; None if no known format begins so."""
    for sign, found in _SIGNS:
        if head.startswith(sign):
            return found
    if head[_TAR_AT:].startswith(_TAR_SIGN):
        return _TAR
    text = _text(head)
    if text is None:
        return None
    if text.startswith("version https://git-lfs"):
        return _LFS
    if text.startswith("<"):
        xml = text.startswith(("<?xml", "<Error")) and "<html" not in text.lower()
        return Lookalike(TEXT, "an XML document, such as a server's refusal" if xml else "a web page", FETCH)
    told = printable(" ".join(text.split()))
    told = told if len(told) <= SHOWN_TEXT else told[: SHOWN_TEXT - 1] + "…"
    return Lookalike(TEXT, f"{'JSON' if text[0] in '{[' else 'plain'} text: {told}", FETCH)


def _text(head: bytes) -> str | None:
    """``head`` as text, or None if it is not text. A character may be cut at the end."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return None
        text = head[: error.start].decode("utf-8-sig")
    text = text.strip()
    return text if text and all(ch.isprintable() or ch in "\r\n\t" for ch in text) else None
