"""Where a latent video is cut into tiles for decoding, and with what weights the tiles are blended.

Pure arithmetic on sizes; knows nothing of the decoder. Lengths are in latents unless a name says pixels or
frames. Source: spec 06, section 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ltxpack.runtime.tiles import Cut, Span, Tiling, auto_tiling, split, split_frames

__all__ = [
    "Cut",
    "Piece",
    "Span",
    "Tiling",
    "auto_tiling",
    "frame_pieces",
    "fresh_frames",
    "spatial_pieces",
    "split",
    "split_frames",
]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tile along one axis after decoding: its place in the output and the weight of each position."""

    latents: slice
    output: slice
    weights: Tensor

    def to(self, device: torch.device) -> Piece:
        """The same piece with its weights on ``device`` (they are computed on the CPU: its rounding is the norm)."""
        return Piece(self.latents, self.output, self.weights.to(device))


def spatial_pieces(length: int, cut: Cut, scale: int) -> list[Piece]:
    """The pieces along height or width, ``scale`` pixels per latent."""
    pieces = []
    for span in split(length, cut):
        output = slice(span.start * scale, span.stop * scale)
        pieces.append(Piece(span.latents, output, weights(output, _ramp(span.rise * scale), _ramp(span.fall * scale))))
    return _summing_to_one(pieces)


def frame_pieces(length: int, cut: Cut, scale: int) -> list[Piece]:
    """The pieces along time; ``n`` latents decode to ``scale * (n - 1) + 1`` frames."""
    pieces = []
    for span in split_frames(length, cut):
        output = slice(span.start * scale, (span.stop - 1) * scale + 1)
        rise = torch.cat([torch.zeros(1), _ramp((span.rise - 1) * scale)]) if span.rise else torch.empty(0)
        pieces.append(Piece(span.latents, output, weights(output, rise, _ramp(span.fall * scale))))
    return _summing_to_one(pieces)


def fresh_frames(groups: list[Piece]) -> Iterator[int]:
    """How many frames of each temporal group are final once it is decoded: those before the next group."""
    for group, following in pairwise(groups):
        yield following.output.start - group.output.start
    yield groups[-1].output.stop - groups[-1].output.start


def weights(output: slice, rise: Tensor, fall: Tensor) -> Tensor:
    """Float32 weights of one tile along one axis: ones, times the rising and the mirrored falling edge."""
    mask = torch.ones(output.stop - output.start)
    mask[: len(rise)] *= rise
    mask[len(mask) - len(fall) :] *= fall.flip(0)
    return mask


def _ramp(length: int) -> Tensor:
    """``i / (length + 1)`` for i = 1..length, with the rounding of ``linspace``."""
    return torch.linspace(0, 1, length + 2)[1:-1]


def _summing_to_one(pieces: list[Piece]) -> list[Piece]:
    """Divides the weights by their sum where they do not add up (more than two tiles on one place)."""
    total = torch.zeros(max(piece.output.stop for piece in pieces))
    for piece in pieces:
        total[piece.output] += piece.weights
    if torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-5):
        return pieces
    total.clamp_(min=1e-8)
    return [Piece(piece.latents, piece.output, piece.weights / total[piece.output]) for piece in pieces]
