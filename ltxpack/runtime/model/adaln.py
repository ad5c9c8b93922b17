"""AdaLN-single: timestep -> modulation rows (spec 06 section 9).

The MLPs see each distinct timestep once; which token uses which is an index, applied where a row is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltxpack.runtime.model.attention import Linear

SINUSOID_CHANNELS = 256


@dataclass(frozen=True)
class Rows:
    """Modulation rows of the K distinct timesteps.

    ``values`` [B, K, rows, D]; ``index`` [T] says which of the K each token uses, None that K is 1.
    """

    values: Tensor
    index: Tensor | None = None

    def plus(self, table: Tensor) -> Rows:
        """These rows with a learned ``table`` [rows, D] added (rounded to the rows' dtype first)."""
        return Rows(self.values + table.to(self.values.dtype), self.index)

    def row(self, number: int) -> Tensor:
        """One row for every token: [B, T, D], or [B, 1, D] when all tokens share a timestep."""
        values = self.values[:, :, number]
        return values if self.index is None else values.index_select(1, self.index)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x·(1 + scale) + shift``."""
    return x * (1 + scale) + shift


def sinusoid(timesteps: Tensor) -> Tensor:
    """[cos, sin] of ``t·10000^(-i/128)`` in float32: ``timesteps`` [...] -> [..., 256]."""
    half = SINUSOID_CHANNELS // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[..., None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """Linear, SiLU, linear on the sinusoid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(SINUSOID_CHANNELS, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Timesteps as the model counts them, [...] float32 or float64 -> [..., D] in ``dtype``."""
        return self.linear_2(F.silu(self.linear_1(sinusoid(timesteps).to(dtype))))


class AdaLayerNormSingle(nn.Module):
    """Timesteps -> ``rows`` modulation vectors and the embedding they are made from."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(dim)})
        self.linear = Linear(dim, rows * dim)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B, K] -> rows [B, K, rows, D] and embedding [B, K, 1, D], both in ``dtype``."""
        embedded = self.emb["timestep_embedder"](timesteps, dtype)
        return self.linear(F.silu(embedded)).unflatten(-1, (self.rows, -1)), embedded.unsqueeze(2)
