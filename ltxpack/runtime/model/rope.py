"""Rotary position embedding, split layout (spec 06 sections 3 and 9).

It turns positions into cos/sin tables, once per stage, and turns queries and keys by them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin of one sequence, each [B, heads, T, head_dim/2] in the model dtype."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class RopeTables:
    """One modality's tables: all axes for its self-attention, time alone for a2v and v2a."""

    self_attention: Rotation
    cross_attention: Rotation


def frequencies(dim: int, axes: int, theta: float) -> Tensor:
    """``pi/2 * theta^(k/(K-1))`` for k < K = floor(dim / (2 axes)); float64 rounded to float32, [K] on the CPU."""
    exponents = torch.linspace(0.0, 1.0, dim // (2 * axes), dtype=torch.float64)
    return (math.pi / 2 * theta**exponents).float()


def rotation(positions: Tensor, max_positions: tuple[int, ...], heads: int, head_dim: int, theta: float) -> Rotation:
    """Tables in float32 for ``positions`` [B, axes, T, 2] (float32 [start, end) bounds; the midpoint counts).

    Angles are ordered frequency-major, then axis. If 2·axes does not divide the width, pairs that do not turn fill up
    the front.
    """
    dim, axes = heads * head_dim, positions.shape[1]
    limits = torch.tensor(max_positions, dtype=torch.float32, device=positions.device)
    fractions = positions.float().mean(-1) / limits[:, None]  # [B, axes, T]
    steps = frequencies(dim, axes, theta).to(positions.device)
    angles = (2 * fractions.transpose(1, 2)[:, :, None] - 1) * steps[:, None]  # [B, T, K, axes]
    angles = angles.flatten(2)
    angles = torch.nn.functional.pad(angles, (dim // 2 - angles.shape[-1], 0))
    per_head = angles.unflatten(2, (heads, head_dim // 2)).transpose(1, 2)
    return Rotation(per_head.cos().contiguous(), per_head.sin().contiguous())


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``x`` [B, T, heads·head_dim] as [B, heads, T, head_dim]; a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the halves of each head of ``x`` [B, heads, T, head_dim] in its own dtype.

    In bfloat16 this rounds twice, after the product and after the fused multiply-add, as the official code does.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (torch.addcmul(first * by.cos, by.sin, second, value=-1), torch.addcmul(second * by.cos, by.sin, first)), dim=-1
    )
