"""By what the numbers of a video are rounded beside its settings: what was measured or tried on a device, and torch's
own settings.

Ranks that make a video together all compute by what rank 0 found, whatever they would find on their own devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ltxpack.errors import DeviceError
from ltxpack.runtime.model import kernels, quantised
from ltxpack.runtime.model.kernels import AttentionKind, KernelChoice
from ltxpack.runtime.torch_settings import rounding


@dataclass(frozen=True)
class Numerics:
    """``attention``: the kernels. ``faults``: why codes of a dtype are not multiplied; None: they are.

    ``rounding``: torch's settings.
    """

    attention: KernelChoice
    faults: Mapping[str, str | None]
    rounding: Mapping[str, Any]

    @classmethod
    def of(cls, attention: KernelChoice, fp8: str, device: torch.device, dtype: torch.dtype) -> Numerics:
        """As ``device`` computes now in ``dtype``; ``fp8``: the mode asked for."""
        return cls(attention, quantised.faults(fp8, device, dtype), rounding())

    def check(self, kinds: Sequence[AttentionKind]) -> None:
        """Raises DeviceError where the device of ``kinds`` cannot attend so; of codes the model is asked first."""
        for kind in kinds:
            name = self.attention.kernels[kind.name]
            why = kernels.fault(kind, name)
            if why is not None:
                problem = f"{kind.device} cannot attend by {name}, which rank 0 chose"
                advice = f"the same command with --attention {kernels.DEFAULT}"
                raise DeviceError(problem, found=why, next=advice)
