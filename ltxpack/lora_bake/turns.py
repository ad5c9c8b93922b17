"""Rotations of a weight (OFT, BOFT): orthogonal blocks on the diagonal, in one stage or in those of a butterfly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """W -> rescale · (R W), or rescale · (W Rᵀ) if it is ``over_inputs``.

    ``blocks`` [stages, blocks, size, size], float32. Stage i of several brings together what is 2^i·size/2 apart
    (BOFT, Liu et al., arXiv 2311.06243); a single one turns neighbours (OFT, Qiu et al., arXiv 2306.07280). A strength
    s other than 1 makes s·R + (1-s)·I of each stage, as LyCORIS does, or with ``of_result`` W + s·(W' - W).
    ``rescale`` [out, 1] or None.
    """

    blocks: Tensor
    over_inputs: bool
    rescale: Tensor | None = None
    of_result: bool = False

    def rows(self, first: int, last: int) -> Turn:
        """The share of the weight's rows ``first`` to ``last``; of a turn over outputs these must be all."""
        return self if self.rescale is None else replace(self, rescale=self.rescale[first:last])

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """``weight`` [out, in], float32, turned."""
        turned = weight.T if self.over_inputs else weight
        stages, count, size, _ = self.blocks.shape
        blocks = self.blocks
        if strength != 1 and not self.of_result:
            blocks = blocks * strength + (1 - strength) * torch.eye(size, device=blocks.device)
        for i, stage in enumerate(blocks):
            apart = 2**i * (size // 2)
            cut = (-1, 2, apart, turned.shape[1]) if stages > 1 else (-1, 1, size, turned.shape[1])
            near = turned.reshape(cut).transpose(1, 2).reshape(count, size, -1)
            back = (cut[0], cut[2], cut[1], cut[3])
            turned = torch.bmm(stage, near).reshape(back).transpose(1, 2).reshape(turned.shape)
        turned = turned.T if self.over_inputs else turned
        turned = turned if self.rescale is None else turned * self.rescale.float()
        return weight.lerp(turned, strength) if self.of_result and strength != 1 else turned
