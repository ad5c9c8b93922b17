"""Conditioning images: a picture file to the pixels the video VAE's encoder takes (spec 04, section 4)."""

from __future__ import annotations

import io
import math
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ltxpack.errors import UsageError
from ltxpack.runtime.media.pictures import Pixels, read_image, tell_once
from ltxpack.runtime.sampling.shape import MAX_SIDE

MAX_CRF = 51
# A picture with this many times the needed pixels is large.
LARGE = 4


def load_image(path: Path, crf: int) -> Tensor:
    """The picture at ``path``, uint8 ``[H, W, 3]`` on the CPU, after one frame of x264 at ``crf`` (0: none).

    Raises UsageError (no such file, a crf outside 0..51), SourceError (it cannot be read), FormatError (not a picture,
    damaged, too large) and UnsupportedError (a picture of another kind).
    """
    if not 0 <= crf <= MAX_CRF:
        raise UsageError("not a constant rate factor of x264", expected=f"0 to {MAX_CRF}", found=crf)
    pixels = read_image(path)
    if crf and max(pixels.shape[:2]) > MAX_SIDE:
        tell_once("%s: scaled to sides of at most %d, which x264 takes", path, MAX_SIDE)
    return torch.from_numpy(compress(pixels, crf))


def prepare_image(picture: Tensor, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[1, 3, 1, height, width]`` in [-1, 1] of uint8 ``[H, W, 3]``: scaled to cover, cropped to the centre.

    Bilinear, without antialiasing and without rounding back to whole numbers; float32 until the last step. A picture
    that is large is scaled on the CPU: on ``device`` it would take memory that no plan includes. For a narrow one,
    which would become large, this computes only the pixels that it keeps.
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

    It equals torch's bilinear ``interpolate`` there, except for the rounding of the last bits.
    """
    (top, bottom, down), (left, right, across) = map(_sampled, picture.shape, covering, kept)
    corners = [picture[row[:, None], column].float() for row in (top, bottom) for column in (left, right)]
    upper, lower = (torch.lerp(a, b, across[:, None]) for a, b in (corners[:2], corners[2:]))
    return torch.lerp(upper, lower, down[:, None, None]).permute(2, 0, 1)[None]


def _sampled(size: int, scaled: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """For the middle ``kept`` of ``scaled`` pixels: their two neighbours of ``size`` pixels, and the second's weight.

    It computes positions with the float32 steps of torch's kernel: ratio, and one rounding after the subtraction.
    """
    ratio = (torch.tensor(float(size)) / torch.tensor(float(scaled))).double()
    middle = torch.arange(kept) + (scaled - kept) // 2
    at = (ratio * (middle.float() + 0.5).double() - 0.5).float().clamp(min=0)
    first = at.long().clamp(max=size - 1)
    return first, (first + 1).clamp(max=size - 1), (at - first).clamp(max=1)


def compress(pixels: Pixels, crf: int) -> Pixels:
    """``pixels`` after one frame of x264 at ``crf``, cut to even sides from the top left; unchanged for crf 0.

    The model was trained on frames of compressed video, and a clean picture looks different. A picture with longer
    sides than x264 takes is scaled down first.
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
