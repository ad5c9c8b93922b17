"""The quantised linears of a bake, and their stored tensors (spec 09, sections 1, 4, 5 and 7). Needs no torch.

The arithmetic is in quantise.py. An activations file, which ``ltxpack run --save-activations`` writes, has the largest
inputs of the linears.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ltxpack.activations import ActivationsFile, Loras
from ltxpack.errors import AdapterError, UsageError, one_line
from ltxpack.files.reader import hash_file
from ltxpack.ltx23.codes import kept_blocks, linears_by_block
from ltxpack.manifest import Calibration

E4M3_LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126

Shapes = Mapping[str, tuple[int, ...]]


def parse_blocks(text: str) -> tuple[int, ...]:
    """``0,1,46,47`` or ``none``. Raises UsageError."""
    if text.strip() == "none":
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError("--keep-blocks needs numbers of blocks", expected="N,N,… or none", found=text) from None


def quantised_linears(shapes: Shapes, kept: Sequence[int] | None, command: str) -> tuple[str, ...]:
    """The linears of all blocks but ``kept`` (None: the usual ones), named without ``.weight``, sorted.

    Raises UsageError, with ``command`` to run instead, for an unknown block, or if no block is left.
    """
    blocks = linears_by_block(shapes)
    count = max(blocks, default=-1) + 1
    kept = kept_blocks(count) if kept is None else kept
    if absent := [block for block in kept if block not in blocks]:
        there = f"blocks 0 to {count - 1}"
        raise UsageError("--keep-blocks names a block that is not there", expected=there, found=absent[0], next=command)
    found = sorted(linear for block, linears in blocks.items() if block not in kept for linear in linears)
    if not found:
        raise UsageError("all blocks stay in bf16, so no linear would be quantised", items=sorted(kept), next=command)
    return tuple(found)


def activation_scale(largest: float) -> float:
    """The scale of a linear's input: |x| / 448, rounded up to a power of two; 1 for an input that is always zero."""
    return max(2.0 ** math.ceil(math.log2(largest / E4M3_LARGEST)), SMALLEST_SCALE) if largest else 1.0


def calibrated(path: Path, loras: Loras, base: str, linears: Sequence[str], next: str) -> Calibration:
    """The input scales of ``linears`` in the base ``base`` with ``loras`` (none at 0) in it.

    ``path`` is an activations file. Raises FormatError or SourceError for another one, AdapterError, with ``next`` to
    do, for one of another model or bake.
    """
    file = ActivationsFile.read(path)
    if file.base != base:
        raise AdapterError("was recorded from another base", file=path, expected=base, found=file.base, next=next)
    made_of = {name: [lora for lora in found if lora[1]] for name, found in file.transformers.items()}
    names = [name for name, found in made_of.items() if found == list(loras)]
    if not names:
        raise AdapterError(
            "was recorded from other bakes", file=path, items=sorted(made_of), next=next,
            expected=", ".join(f"{digest[:8]} at {strength}" for digest, strength in loras) or "the base",
        )  # fmt: skip
    largest = file.largest[names[0]]
    if missing := [linear for linear in linears if linear not in largest]:
        raise AdapterError("lacks linears of this model", file=path, items=missing, next=next)
    scales = tuple(activation_scale(largest[linear]) for linear in linears)
    return Calibration(one_line(path.name), hash_file(path), scales)
