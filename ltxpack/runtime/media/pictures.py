"""Reads a picture file: upright pixels without alpha, in sRGB. Needs no torch, so that a server can read pictures."""

from __future__ import annotations

import functools
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from ltxpack.errors import FormatError, LtxpackError, SourceError, UnsupportedError, UsageError

Pixels = NDArray[np.uint8]
"""``[H, W, 3]`` RGB."""

MAX_PIXELS = 100_000_000
ORIENTATION = 0x0112
# Tags of TIFF, and values of them.
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
SUBFILE, REDUCED, SUB_IFDS, DNG_VERSION = 254, 1, 330, 50706
# Pillow would start Ghostscript for these.
NOT_LOADED = ("EPS",)
# Files whose whole numbers end at 65535, in any mode that Pillow gives them.
SIXTEEN_BITS = ("PNG", "PPM")
# Mirrored orientations are ignored, as the official pipeline does.
TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
WITHOUT_ALPHA = {"RGBA": "RGB", "LA": "L"}

_log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=256)  # a server reads pictures of ever new names
def tell_once(message: str, *facts: object) -> None:
    """Log a warning once: pictures are read for a check and again for use."""
    _log.warning(message, *facts)


def read_image(path: Path, most: int = MAX_PIXELS) -> Pixels:
    """The picture, upright, without alpha, in sRGB.

    Raises UsageError (no such file), SourceError (it cannot be read), FormatError (not a picture, damaged, more than
    ``most`` pixels) and UnsupportedError (a picture of another kind).
    """
    with _failures_told(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not path.is_file():
            raise UsageError("no such image", file=path, found="a folder" if path.is_dir() else None)
        with Image.open(path) as image:
            if image.width * image.height > most:
                raise _too_large(path, f"{image.width}x{image.height}", most)
            if image.format in NOT_LOADED or isinstance(image, ImageFile.StubImageFile):
                raise refusal_of(path)
            if _is_preview(image):
                found = "a raw picture of a camera, of which only a preview could be read"
                raise UnsupportedError("not a picture of a known format", file=path, found=found, next=CONVERT)
            image.load()
            return np.array(_to_srgb(_upright(image, path), path))


def _is_preview(image: Image.Image) -> bool:
    """Whether a TIFF begins with a small copy of its picture, as raw pictures of cameras do."""
    tags = getattr(image, "tag_v2", {})
    return DNG_VERSION in tags or (tags.get(SUBFILE) == REDUCED and SUB_IFDS in tags)


def _upright(image: Image.Image, path: Path) -> Image.Image:
    """``image`` turned by its EXIF orientation, without alpha."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception as error:  # any error of Pillow for odd EXIF data
        tell_once("%s: its EXIF data cannot be read (%s); taken as upright", path, str(error))
        turn = None
    turned = image if turn is None else image.transpose(turn)
    return turned.convert(WITHOUT_ALPHA[turned.mode]) if turned.mode in WITHOUT_ALPHA else turned


def _to_srgb(image: Image.Image, path: Path) -> Image.Image:
    """RGB through the embedded colour profile if there is one that works, else by plain conversion."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("F", "I")):
        image = _eight_bits(image, path)
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            tell_once("%s: its colour profile cannot be used (%s); read as sRGB", path, str(error))
        else:
            if converted is not None:
                return converted
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """The high bytes of 16-bit grey, as Pillow does for 16-bit colours; Pillow would clip grey to white.

    Raises UnsupportedError for numbers whose white is not known.
    """
    if not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in SIXTEEN_BITS):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        problem = f"{kind} pictures are not read: nothing in the file says which number is white"
        raise UnsupportedError(problem, file=path, next="convert it to an 8-bit or 16-bit PNG")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS, (16,))[0]  # 12 are a mode of TIFF
    grey = (np.asarray(image).clip(0, 65535) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey)


def _too_large(path: Path, found: str | None = None, most: int = MAX_PIXELS) -> FormatError:
    smaller = f"scale it down to at most {most // 1_000_000} million pixels; a video has far fewer"
    return FormatError("too large a picture", file=path, expected=f"at most {most} pixels", found=found, next=smaller)


@contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    """Turn all errors of Pillow's decoders for a damaged file into a FormatError."""
    try:
        yield
    except (LtxpackError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise refusal_of(path) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise SourceError("cannot be read", file=path, found=error.strerror) from error
        raise FormatError("a damaged picture", file=path, found=f"{type(error).__name__}: {error}") from error


# Files that are no readable pictures, by their first bytes


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
