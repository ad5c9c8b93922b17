"""RGB frames to 8-bit I420 in BT.709 limited range, on the device the frames lie on (spec 06, section 7)."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = {
    "y": (0.2126, 0.7152, 0.0722),
    "cb": (-0.1146, -0.3854, 0.5),
    "cr": (0.5, -0.4542, -0.0458),
}


def to_i420(frames: Tensor) -> Tensor:
    """uint8 ``[F, 3 H / 2, W]`` (planes Y, U, V one below the other) of RGB ``frames`` ``[F, H, W, 3]`` in [0, 1].

    Arithmetic in the dtype of ``frames``; the result is cut off, not rounded. H and W are even.
    """
    count, height, width, _ = frames.shape
    y, cb, cr = (_weighted(frames, row) for row in ROWS.values())
    chroma = torch.stack([_halved(cb), _halved(cr)], dim=1)
    planes = [(y * 219 + 16).reshape(count, height, width), (chroma * 224 + 128).reshape(count, height // 2, width)]
    return torch.cat(planes, dim=1).clamp(0, 255).to(torch.uint8)


def _weighted(frames: Tensor, row: tuple[float, float, float]) -> Tensor:
    red, green, blue = frames.unbind(-1)
    return red * row[0] + green * row[1] + blue * row[2]


def _halved(plane: Tensor) -> Tensor:
    """``[F, H, W]`` averaged over 2x2 squares."""
    return torch.nn.functional.avg_pool2d(plane[:, None], 2)[:, 0]
