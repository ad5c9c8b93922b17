"""Records the largest |x| that enters each linear of the blocks, on the device during a forward (spec 09 section 5).

Knows no file. A maximum belongs to a block's number, wherever the block's weights are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ltxpack.runtime.model.model import DiT

_SELF_ATTENTIONS = ("attn1", "audio_attn1")
_CROSS_ATTENTIONS = ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
# Watched linear of a block -> all linears with the same x. In a self-attention only to_v runs in every pass of STG.
SAME_INPUT: Mapping[str, tuple[str, ...]] = {
    **{f"{one}.to_v": tuple(f"{one}.to_{part}" for part in ("q", "k", "v", "gate_logits")) for one in _SELF_ATTENTIONS},
    **{f"{one}.to_q": (f"{one}.to_q", f"{one}.to_gate_logits") for one in _CROSS_ATTENTIONS},
    **{f"{one}.to_k": (f"{one}.to_k", f"{one}.to_v") for one in _CROSS_ATTENTIONS},
    **{f"{one}.to_out.0": (f"{one}.to_out.0",) for one in (*_SELF_ATTENTIONS, *_CROSS_ATTENTIONS)},
    **{f"{one}.{part}": (f"{one}.{part}",) for one in ("ff", "audio_ff") for part in ("net.0.proj", "net.2")},
}


@torch.library.custom_op(
    "ltxpack::note_largest", mutates_args=("largest",), schema="(Tensor(a!) largest, Tensor x) -> ()"
)
def note_largest(largest: Tensor, x: Tensor) -> None:
    """Raise ``largest`` (float32 scalar) to the largest |x|; NaN stays.

    It is one opaque node for the compiler, so that the code around it rounds as without it.
    """
    torch.maximum(largest, torch.linalg.vector_norm(x, ord=math.inf).float(), out=largest)


@note_largest.register_fake
def _(largest: Tensor, x: Tensor) -> None:
    return None


def linears(blocks: int) -> list[str]:
    """The sorted names of all linears in this many blocks, without ``.weight``."""
    names = [name for group in SAME_INPUT.values() for name in group]
    return sorted(f"transformer_blocks.{number}.{name}" for number in range(blocks) for name in names)


class LargestInputs:
    """The maxima of one transformer on ``device``: a float32 scalar for each input, at first 0."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inputs: dict[tuple[int, str], Tensor] = {}

    @torch.inference_mode()
    def watch(self, model: DiT) -> None:
        """Let every later forward of ``model`` update these maxima; compiled ones too if they are compiled later."""
        for number, block in enumerate(model.blocks()):
            for name in SAME_INPUT:
                if (number, name) not in self._inputs:
                    self._inputs[number, name] = torch.zeros((), device=self._device)
                block.get_submodule(name).largest_input = self._inputs[number, name]

    @torch.inference_mode()
    def clear(self) -> None:
        for largest in self._inputs.values():
            largest.zero_()

    @torch.inference_mode()
    def read(self) -> dict[str, float]:
        """Name of the linear (see :func:`linears`) -> its maximum. The host waits for the device."""
        values = torch.stack([*self._inputs.values()]).tolist() if self._inputs else []
        return {
            f"transformer_blocks.{number}.{linear}": value
            for (number, name), value in zip(self._inputs, values, strict=True)
            for linear in SAME_INPUT[name]
        }
