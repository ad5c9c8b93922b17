"""Conditioning images: a picture file to the pixels the video VAE's encoder takes (spec 04, section 4)."""

from __future__ import annotations

import functools
import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError
from torch import Tensor

from ltxpack.errors import FormatError, LtxpackError, SourceError, UnsupportedError, UsageError
from ltxpack.runtime.media.formats import CONVERT, refusal_of

Pixels = NDArray[np.uint8]
"""``[H, W, 3]`` RGB."""

MAX_PIXELS = 100_000_000
MAX_CRF = 51
# The longest side of a frame that x264 takes.
MAX_SIDE = 16384
# How many times the pixels that are needed make a picture a large one.
LARGE = 4
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


@functools.cache
def _tell(message: str, *facts: object) -> None:
    """A warning, once: pictures are read when they are checked, and again when they are used."""
    _log.warning(message, *facts)


def load_image(path: Path, crf: int) -> Tensor:
    """The picture at ``path``, uint8 ``[H, W, 3]`` on the CPU, after one frame of x264 at ``crf`` (0: none).

    Raises UsageError (no such file, a crf outside 0..51), SourceError (it cannot be read), FormatError (not a picture,
    damaged, too large) and UnsupportedError (a picture of another kind).
    """
    if not 0 <= crf <= MAX_CRF:
        raise UsageError("not a constant rate factor of x264", expected=f"0 to {MAX_CRF}", found=crf)
    pixels = read_image(path)
    if crf and max(pixels.shape[:2]) > MAX_SIDE:
        _tell("%s: scaled to sides of at most %d, which x264 takes", path, MAX_SIDE)
    return torch.from_numpy(compress(pixels, crf))


def prepare_image(picture: Tensor, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[1, 3, 1, height, width]`` in [-1, 1] of uint8 ``[H, W, 3]``: scaled to cover, cropped to the centre.

    Bilinear, without antialiasing and without rounding back to whole numbers; float32 until the last step. A picture
    that is large is scaled on the CPU: on ``device`` it would take memory that no plan counts. Of a narrow one, which
    would become large, only what is kept is computed.
    """
    rows, columns = picture.shape[:2]
    scale = max(height / rows, width / columns)
    covering = (math.ceil(rows * scale), math.ceil(columns * scale))
    if math.prod(covering) > LARGE * height * width:
        image = _centre_of_scaled(picture.cpu(), covering, (height, width))
    else:
        large = rows * columns > LARGE * height * width
        image = picture.to("cpu" if large else device).permute(2, 0, 1)[None].float()
        image = torch.nn.functional.interpolate(image, size=covering, mode="bilinear", align_corners=False)
        top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
        image = image[:, :, top : top + height, left : left + width]
    return (image / 127.5 - 1.0).to(dtype)[:, :, None].to(device)


def _centre_of_scaled(picture: Tensor, covering: tuple[int, int], kept: tuple[int, int]) -> Tensor:
    """The middle ``kept`` (rows, columns) of ``picture`` scaled to ``covering``: float32 ``[1, 3, *kept]``.

    It equals what torch's bilinear ``interpolate`` gives there, except for the rounding of the last bits.
    """
    (top, bottom, down), (left, right, across) = map(_sampled, picture.shape, covering, kept)
    corners = [picture[row[:, None], column].float() for row in (top, bottom) for column in (left, right)]
    upper, lower = (torch.lerp(a, b, across[:, None]) for a, b in (corners[:2], corners[2:]))
    return torch.lerp(upper, lower, down[:, None, None]).permute(2, 0, 1)[None]


def _sampled(size: int, scaled: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """For the middle ``kept`` of ``scaled`` pixels: their two neighbours of ``size`` pixels, and the second's weight.

    The position has the float32 steps of torch's kernel: ratio, and one rounding after the subtraction.
    """
    ratio = (torch.tensor(float(size)) / torch.tensor(float(scaled))).double()
    middle = torch.arange(kept) + (scaled - kept) // 2
    at = (ratio * (middle.float() + 0.5).double() - 0.5).float().clamp(min=0)
    first = at.long().clamp(max=size - 1)
    return first, (first + 1).clamp(max=size - 1), (at - first).clamp(max=1)


def read_image(path: Path) -> Pixels:
    """The picture, upright, without alpha, in sRGB. Raises as :func:`load_image`."""
    with _failures_told(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not path.is_file():
            raise UsageError("no such image", file=path, found="a folder" if path.is_dir() else None)
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(path, f"{image.width}x{image.height}")
            if image.format in NOT_LOADED or isinstance(image, ImageFile.StubImageFile):
                raise refusal_of(path)
            if _is_preview(image):
                found = "a raw picture of a camera, of which only a preview could be read"
                raise UnsupportedError("not a picture of a known format", file=path, found=found, next=CONVERT)
            image.load()
            return np.array(_to_srgb(_upright(image, path), path))


def _is_preview(image: Image.Image) -> bool:
    """Whether a TIFF begins with a small copy of what it holds, as raw pictures of cameras do."""
    tags = getattr(image, "tag_v2", {})
    return DNG_VERSION in tags or (tags.get(SUBFILE) == REDUCED and SUB_IFDS in tags)


def compress(pixels: Pixels, crf: int) -> Pixels:
    """``pixels`` after one frame of x264 at ``crf``, cut to even sides from the top left; unchanged for crf 0.

    The model was trained on frames of compressed video, which a clean picture does not look like. A picture with
    longer sides than x264 takes is scaled down first.
    """
    if crf == 0 or min(pixels.shape[:2]) < 2:
        return pixels
    longest = max(pixels.shape[:2])
    if longest > MAX_SIDE:
        rows, columns = (max(2, side * MAX_SIDE // longest) for side in pixels.shape[:2])
        pixels = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BOX))
    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def _upright(image: Image.Image, path: Path) -> Image.Image:
    """``image`` turned as its camera was held, without alpha."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception as error:  # whatever Pillow raises for EXIF data of any content
        _tell("%s: its EXIF data cannot be read (%s); taken as upright", path, str(error))
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
            _tell("%s: its colour profile cannot be used (%s); read as sRGB", path, str(error))
        else:
            if converted is not None:
                return converted
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """The high bytes of 16-bit grey, as Pillow takes them of 16-bit colours. It would clip grey to white.

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


def _too_large(path: Path, found: str | None = None) -> FormatError:
    smaller = f"scale it down to at most {MAX_PIXELS // 1_000_000} million pixels; a video has far fewer"
    return FormatError(
        "too large a picture", file=path, expected=f"at most {MAX_PIXELS} pixels", found=found, next=smaller
    )


@contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    """Turn whatever Pillow's decoders raise for a damaged file into one FormatError."""
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
