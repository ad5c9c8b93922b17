"""Recognises files of other formats, which users download or rename by mistake, by their first bytes."""

from __future__ import annotations

from typing import NamedTuple

from ltxpack.errors import printable

# The first bytes of a file that are enough to recognise its format.
HEAD_BYTES = 512
SHOWN_TEXT = 80

GGUF, PICKLE, ARCHIVE, TEXT = "gguf", "pickle", "archive", "text"
TAKE_OTHER = "take the same weights as a .safetensors file in bf16"
UNPACK = "unpack it, then name the .safetensors file in it"
FETCH = "fetch the file itself, logged in and with the licence accepted"


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
