"""The choices of a device that change the rounding of a video besides its settings, and torch's own settings.

All ranks that make a video together use the choices of rank 0, whatever they would choose on their own devices.
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
    """``attention``: the kernels. ``faults``: dtype of codes -> why they are not multiplied, None if they are.

    ``rounding``: torch's settings.
    """

    attention: KernelChoice
    faults: Mapping[str, str | None]
    rounding: Mapping[str, Any]

    @classmethod
    def of(cls, attention: KernelChoice, fp8: str, device: torch.device, dtype: torch.dtype) -> Numerics:
        """The present numerics of ``device`` in ``dtype``; ``fp8``: the mode of fp8 linears."""
        return cls(attention, quantised.faults(fp8, device, dtype), rounding())

    def check(self, kinds: Sequence[AttentionKind]) -> None:
        """Raises DeviceError if the device of ``kinds`` cannot use these attention kernels; the model checks codes."""
        for kind in kinds:
            name = self.attention.kernels[kind.name]
            why = kernels.fault(kind, name)
            if why is not None:
                problem = f"{kind.device} cannot attend by {name}, which rank 0 chose"
                advice = f"the same command with --attention {kernels.DEFAULT}"
                raise DeviceError(problem, found=why, next=advice)
