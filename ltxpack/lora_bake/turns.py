"""Rotations of a weight (OFT, BOFT): orthogonal blocks on the diagonal, in one stage or in those of a butterfly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """W -> rescale · (R W), or rescale · (W Rᵀ) if it is ``over_inputs``.

    ``blocks`` [stages, blocks, size, size], float32: R is the last stage times … times the first. Stage 0 turns
    neighbours (OFT, Qiu et al., arXiv 2306.07280), stage i turns rows that are 2^i·size/2 apart (BOFT, Liu et al.,
    arXiv 2311.06243). A strength s other than 1 makes each stage s·R + (1-s)·I, as in LyCORIS, or with ``of_result``
    gives W + s·(W' - W). ``rescale`` [out, 1] or None.
    """

    blocks: Tensor
    over_inputs: bool
    rescale: Tensor | None = None
    of_result: bool = False

    def rows(self, first: int, last: int) -> Turn:
        """The turn for the weight's rows ``first`` to ``last``; for a turn over outputs these must be all rows."""
        return self if self.rescale is None else replace(self, rescale=self.rescale[first:last])

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """``weight`` [out, in], float32, turned."""
        turned = weight.T if self.over_inputs else weight
        size, columns, blocks = self.blocks.shape[-1], turned.shape[1], self.blocks
        if blocks.shape[1] == 1:
            blocks = blocks.expand(-1, len(turned) // size, -1, -1)
        if strength != 1 and not self.of_result:
            blocks = blocks * strength + (1 - strength) * torch.eye(size, device=blocks.device)
        for i, stage in enumerate(blocks):
            near = turned.reshape(-1, 2, 2**i, size // 2, columns).transpose(1, 2) if i else turned
            near = torch.bmm(stage, near.reshape(len(stage), size, columns))
            back = near.reshape(-1, 2**i, 2, size // 2, columns).transpose(1, 2) if i else near
            turned = back.reshape(turned.shape)
        turned = turned.T if self.over_inputs else turned
        turned = turned if self.rescale is None else turned * self.rescale.float()
        return weight.lerp(turned, strength) if self.of_result and strength != 1 else turned


def cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I - Q)⁻¹ of skew matrices [..., n, n]: rotations (Cayley)."""
    unit = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotation: Tensor = torch.linalg.solve(unit - skew, unit + skew, left=False)
    return rotation


def cayley_series(skew: Tensor, terms: int) -> Tensor:
    """PEFT's truncated Neumann series of (I + Q)(I - Q)⁻¹: I + 2Q + 2Q² + … + Q^(terms-1); for two terms I + 2Q."""
    power = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    total = power.clone()
    for i in range(1, terms):
        power = power @ skew
        total += power if i == terms - 1 > 1 else 2 * power
    return total
