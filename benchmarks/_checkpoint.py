"""Checkpoints and LoRAs in the official layout at the widths of LTX-2.3, with as many blocks as wanted.

The transformer's widths are the real ones; every other component is as small as its config allows (the text connectors
keep the transformer's width, in one layer). Values are random, written as they are made: a few MB are in memory.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ltxpack.demo.checkpoint import DEMO as TINY
from ltxpack.demo.checkpoint import PUBLISHED as REAL
from ltxpack.demo.checkpoint import (
    VERSION,
    StreamWidths,
    checkpoint_config,
    checkpoint_metadata,
    checkpoint_shapes,
    write_payload,
    write_source,
)
from ltxpack.demo.checkpoint import lora_shapes as factors

NAME = "ltx-2.3-bench"
RANK = 384
STEP = 1 << 22  # elements made at a time
# A random sign and mantissa, and an exponent of 2^-7 to 2^-4: magnitudes of trained weights, none zero or denormal.
KEPT_BITS, EXPONENT = 0x81FF, 120 << 7

__all__ = [
    "REAL",
    "TINY",
    "Source",
    "StreamWidths",
    "config",
    "lora_shapes",
    "make_source",
    "shapes_of",
    "write_random",
]


@dataclass(frozen=True)
class Source:
    """What ``materialize`` and ``bake-lora`` are given. The folder's own LoRA is tiny: it is linked, not copied."""

    folder: Path
    checkpoint: Path
    lora: Path


def make_source(folder: Path, blocks: int, widths: StreamWidths, rank: int = RANK) -> Source:
    """Write everything into the new ``folder``: a checkpoint, a LoRA over every linear of it, tiny companions.

    The companions are made once, in a folder beside.
    """
    companions = folder.parent / "companions"
    if not companions.is_dir():
        write_source(companions)
        next(companions.glob("*-dev.safetensors")).unlink()
    source = folder / "source"
    shutil.copytree(companions, source)
    made = Source(source, source / f"{NAME}-dev.safetensors", folder / f"{NAME}-lora-{rank}.safetensors")
    settings = config(blocks, widths)
    shapes = shapes_of(settings)
    write_random(made.checkpoint, shapes, checkpoint_metadata(settings), seed=1)
    write_random(made.lora, lora_shapes(shapes, rank), VERSION, seed=2)
    return made


def config(blocks: int, widths: StreamWidths) -> dict[str, Any]:
    """The official config of such a checkpoint."""
    return checkpoint_config(widths, layers=blocks, connector_layers=1)


def shapes_of(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint under its official name, by name."""
    return dict(sorted(checkpoint_shapes(settings).items()))


def lora_shapes(checkpoint: Mapping[str, tuple[int, ...]], rank: int = RANK) -> dict[str, tuple[int, ...]]:
    """Both factors of every linear of the transformer, by name."""
    return dict(sorted(factors(checkpoint, rank).items()))


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], seed: int) -> None:
    """A safetensors file of random BF16 tensors, on the disk when this returns."""
    entries = [(name, "BF16", shape) for name, shape in shapes.items()]
    write_payload(path, entries, metadata, _random_bits(sum(math.prod(shape) for shape in shapes.values()), seed))


def _random_bits(left: int, seed: int) -> Iterable[memoryview]:
    random = np.random.Generator(np.random.SFC64(seed))
    while left > 0:
        bits = random.integers(0, 1 << 16, size=min(left, STEP), dtype=np.uint16)
        bits &= KEPT_BITS
        bits |= EXPONENT
        yield bits.data
        left -= len(bits)
