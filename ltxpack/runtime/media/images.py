"""Conditioning images: a picture file to the pixels the video VAE's encoder takes (spec 04, section 4)."""

from __future__ import annotations

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
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from ltxpack.errors import FormatError, LtxpackError, UnsupportedError, UsageError

Pixels = NDArray[np.uint8]
"""``[H, W, 3]`` RGB."""

MAX_PIXELS = 100_000_000
MAX_CRF = 51
# How many times the pixels that are needed make a picture a large one.
LARGE = 4
ORIENTATION = 0x0112
# Mirrored orientations are ignored, as the official pipeline does.
TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
WITHOUT_ALPHA = {"RGBA": "RGB", "LA": "L"}

_log = logging.getLogger(__name__)


def load_image(path: Path, crf: int) -> Tensor:
    """The picture at ``path``, uint8 ``[H, W, 3]`` on the CPU, after one frame of x264 at ``crf`` (0: none).

    Raises UsageError (no such file, a crf outside 0..51), FormatError (not a picture, damaged, too large) and
    UnsupportedError (floating-point pixels).
    """
    if not 0 <= crf <= MAX_CRF:
        raise UsageError("not a constant rate factor of x264", expected=f"0 to {MAX_CRF}", found=crf)
    return torch.from_numpy(compress(read_image(path), crf))


def prepare_image(picture: Tensor, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[1, 3, 1, height, width]`` in [-1, 1] of uint8 ``[H, W, 3]``: scaled to cover, cropped to the centre.

    Bilinear, without antialiasing and without rounding back to whole numbers; float32 until the last step. A picture
    that is large, or that becomes large, is scaled on the CPU: on ``device`` it would take memory that no plan counts.
    """
    rows, columns = picture.shape[:2]
    scale = max(height / rows, width / columns)
    covering = (math.ceil(rows * scale), math.ceil(columns * scale))
    large = max(rows * columns, math.prod(covering)) > LARGE * height * width
    image = picture.to("cpu" if large else device).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate(image, size=covering, mode="bilinear", align_corners=False)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    image = image[:, :, top : top + height, left : left + width]
    return (image / 127.5 - 1.0).to(dtype)[:, :, None].to(device)


def read_image(path: Path) -> Pixels:
    """The picture, upright, without alpha, in sRGB. Raises as :func:`load_image`."""
    if not path.is_file():
        raise UsageError("no such image", file=path)
    with _failures_told(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                most, found = f"at most {MAX_PIXELS} pixels", f"{image.width}x{image.height}"
                raise FormatError("too large a picture", file=path, expected=most, found=found)
            image.load()
            return np.array(_to_srgb(_upright(image), path))


def compress(pixels: Pixels, crf: int) -> Pixels:
    """``pixels`` after one frame of x264 at ``crf``, cut to even sides from the top left; unchanged for crf 0.

    The model was trained on frames of compressed video, which a clean picture does not look like.
    """
    if crf == 0 or min(pixels.shape[:2]) < 2:
        return pixels
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


def _upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its camera was held, without alpha."""
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    turned = image if turn is None else image.transpose(turn)
    return turned.convert(WITHOUT_ALPHA[turned.mode]) if turned.mode in WITHOUT_ALPHA else turned


def _to_srgb(image: Image.Image, path: Path) -> Image.Image:
    """RGB through the embedded colour profile if there is one that works, else by plain conversion."""
    if image.mode == "F":
        raise UnsupportedError("floating-point pictures are not read", file=path)
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey to white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            _log.warning("%s: its colour profile cannot be used (%s); read as sRGB", path, error)
        else:
            if converted is not None:
                return converted
    return image.convert("RGB")


@contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    """Turn whatever Pillow's decoders raise for a damaged file into one FormatError."""
    try:
        yield
    except LtxpackError:
        raise
    except UnidentifiedImageError as error:
        raise FormatError("not a picture of a known format", file=path) from error
    except Image.DecompressionBombError as error:
        raise FormatError("too large a picture", file=path, expected=f"at most {MAX_PIXELS} pixels") from error
    except Exception as error:
        raise FormatError("a damaged picture", file=path, found=f"{type(error).__name__}: {error}") from error
