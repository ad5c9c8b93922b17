"""Names a file that is no readable picture by its first bytes, and says what to do with it. Decodes nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ltxpack.errors import FormatError, LtxpackError, UnsupportedError

READ = "a PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF file"
# An SVG file may begin with a long XML comment.
BEGINNING = 4096
CONVERT = "convert it to PNG or JPEG"
FRAME = "save one frame of it as a picture, for example: ffmpeg -i VIDEO -frames:v 1 frame.png"
UNPACK = "unpack it, and give the picture that is in it"
FETCH = "fetch the picture itself, logged in if its page asks for that"


class Kind(NamedTuple):
    """Files that begin with ``pattern``. Those to convert are pictures, or close to them."""

    pattern: bytes
    name: str
    next: str


_FTYP = rb"(?s).{4}ftyp"
KINDS = tuple(
    Kind(rb"(?si)" + pattern, name, next_step)
    for pattern, name, next_step in (
        (_FTYP + rb"(hei[cmsx]|hev[cmsx])", "a HEIC picture", CONVERT),
        (_FTYP + rb".{0,56}?avi[fs]", "an AVIF picture, and this Pillow has no decoder for it", CONVERT),
        (_FTYP + rb"(mif1|msf1)", "a HEIF picture", CONVERT),
        (_FTYP + rb"crx ", "a raw picture of a camera (CR3)", CONVERT),
        (_FTYP + rb"(M4A|M4B)", "sound (MP4)", CONVERT),
        (_FTYP + rb"|.{4}(moov|mdat|wide|free)", "a video (MP4 or MOV)", FRAME),
        (rb"\x1aE\xdf\xa3", "a video (MKV or WebM)", FRAME),
        (rb"RIFF.{4}AVI |FLV\x01|OggS|\x00\x00\x01[\xb3\xba]|G.{187}G.{187}G|0&\xb2u\x8ef\xcf", "a video", FRAME),
        (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL picture", CONVERT),
        (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture, damaged or of an unusual kind", CONVERT),
        (rb"(\xef\xbb\xbf)?\s*<.{0,4000}?<svg\b|(\xef\xbb\xbf)?\s*<svg\b", "an SVG drawing", CONVERT),
        (rb"(\xef\xbb\xbf)?\s*<", "a web page", FETCH),
        (rb"%PDF", "a PDF document", CONVERT),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript drawing", CONVERT),
        (rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF", "a Windows metafile", CONVERT),
        (rb"v/1\x01", "an OpenEXR picture", CONVERT),
        (rb"#\?(RADIANCE|RGBE)", "a Radiance HDR picture", CONVERT),
        (rb"8BPS", "a Photoshop document of a kind that is not read", CONVERT),
        (rb"gimp xcf", "a GIMP document", CONVERT),
        (rb"II\x2a\x00\x10\x00\x00\x00CR|II\x1a\x00\x00\x00HEAP", "a raw picture of a camera (CR2, CRW)", CONVERT),
        (rb"FUJIFILM|FOVb|IIRO|IIU\x00", "a raw picture of a camera", CONVERT),
        (rb"II\x2a\x00|MM\x00\x2a|II\x2b\x00|MM\x00\x2b", "a TIFF file of a kind that is not read", CONVERT),
        (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "an archive", UNPACK),
        (rb"version https://git-lfs", "a git LFS pointer", "fetch the file itself: git lfs pull"),
    )
)
DAMAGED = {
    rb"\x89PNG": "PNG", rb"\xff\xd8\xff": "JPEG", rb"GIF8": "GIF", rb"(?s)RIFF.{4}WEBP": "WebP", rb"BM": "BMP",
}  # fmt: skip


def refusal_of(path: Path) -> LtxpackError:
    """The error for the file at ``path``, which no decoder takes for a picture. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        beginning = file.read(BEGINNING)
    if not beginning.strip(b"\0"):
        return FormatError("holds no picture", file=path, found="zero bytes" if beginning else "an empty file")
    for pattern, name in DAMAGED.items():
        if re.match(pattern, beginning):
            return FormatError("a damaged picture", file=path, found=f"a {name} file whose header cannot be used")
    for kind in KINDS:
        if re.match(kind.pattern, beginning):
            refused = UnsupportedError if kind.next == CONVERT else FormatError
            return refused("not a picture of a known format", file=path, expected=READ, found=kind.name, next=kind.next)
    return FormatError("not a picture of a known format", file=path, expected=READ, next="give a PNG or JPEG picture")
