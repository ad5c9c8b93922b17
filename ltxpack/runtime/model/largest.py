"""The largest |x| that enters each linear of the blocks, noted on the device as the model computes (spec 09 section 5).

Knows no file. A maximum is of a block by its number, wherever the block's weights are.
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
# The watched linear of a block -> all that the same x enters. Of a self-attention only to_v is in every pass of STG.
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

    One opaque node to the compiler, so that the code around it and its rounding are as without.
    """
    torch.maximum(largest, torch.linalg.vector_norm(x, ord=math.inf).float(), out=largest)


@note_largest.register_fake
def _(largest: Tensor, x: Tensor) -> None:
    return None


def linears(blocks: int) -> list[str]:
    """The names of all linears in so many blocks, without ``.weight``, sorted."""
    names = [name for group in SAME_INPUT.values() for name in group]
    return sorted(f"transformer_blocks.{number}.{name}" for number in range(blocks) for name in names)


class LargestInputs:
    """The maxima of one transformer on ``device``: a float32 scalar for each input, 0 to begin with."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inputs: dict[tuple[int, str], Tensor] = {}

    @torch.inference_mode()
    def watch(self, model: DiT) -> None:
        """Every forward of ``model`` adds to these maxima from now on; compiled ones too if they are compiled later."""
        for number, block in enumerate(model.blocks()):
            for name in SAME_INPUT:
                if (number, name) not in self._inputs:
                    self._inputs[number, name] = torch.zeros((), device=self._device)
                block.get_submodule(name).largest_input = self._inputs[number, name]

    @torch.inference_mode()
    def clear(self) -> None:
        """Begin anew."""
        for largest in self._inputs.values():
            largest.zero_()

    @torch.inference_mode()
    def read(self) -> dict[str, float]:
        """By name of the linear, see :func:`linears`. The host waits for the device."""
        values = torch.stack([*self._inputs.values()]).tolist() if self._inputs else []
        return {
            f"transformer_blocks.{number}.{linear}": value
            for (number, name), value in zip(self._inputs, values, strict=True)
            for linear in SAME_INPUT[name]
        }
