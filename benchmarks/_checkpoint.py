"""Checkpoints and LoRAs in the official layout at the widths of LTX-2.3, with as many blocks as wanted.

The transformer's widths are the real ones; every other component is as small as its config allows (the text connectors
keep the transformer's width, in one layer). Values are random, written as they are made: a few MB are in memory.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ltxpack import demo
from ltxpack.demo import config as demo_config
from ltxpack.files.tensorfile import build_header
from ltxpack.ltx23.configs import Shapes, checkpoint_configs
from ltxpack.ltx23.expected import source_inventory
from ltxpack.ltx23.renames import CHECKPOINT_TABLES

NAME = "ltx-2.3-bench"
RANK = 384
ROOT = "model.diffusion_model."
STEP = 1 << 22  # elements made at a time
# A random sign and mantissa, and an exponent of 2^-7 to 2^-4: magnitudes of trained weights, none zero or denormal.
KEPT_BITS, EXPONENT = 0x81FF, 120 << 7


@dataclass(frozen=True)
class Widths:
    """Of both streams."""

    heads: int
    head_dim: int
    audio_head_dim: int


REAL = Widths(heads=32, head_dim=128, audio_head_dim=64)
TINY = Widths(heads=demo_config.HEADS, head_dim=demo_config.HEAD_DIM, audio_head_dim=demo_config.AUDIO_HEAD_DIM)


@dataclass(frozen=True)
class Source:
    """What ``materialize`` and ``bake-lora`` are given. The folder's own LoRA is tiny: it is linked, not copied."""

    folder: Path
    checkpoint: Path
    lora: Path


def make_source(folder: Path, blocks: int, widths: Widths, rank: int = RANK) -> Source:
    """Write everything into the new ``folder``: a checkpoint, a LoRA over every linear of it, tiny companions.

    The companions are made once, in a folder beside.
    """
    companions = folder.parent / "companions"
    if not companions.is_dir():
        demo.write_source(companions)
        next(companions.glob("*-dev.safetensors")).unlink()
    source = folder / "source"
    shutil.copytree(companions, source)
    made = Source(source, source / f"{NAME}-dev.safetensors", folder / f"{NAME}-lora-{rank}.safetensors")
    settings = config(blocks, widths)
    shapes = checkpoint_shapes(settings)
    metadata = {"config": json.dumps(settings), "model_version": "2.3.0", "license": "random weights, no licence"}
    write_random(made.checkpoint, shapes, metadata, seed=1)
    write_random(made.lora, lora_shapes(shapes, rank), {"model_version": "2.3.0"}, seed=2)
    return made


def config(blocks: int, widths: Widths) -> dict[str, Any]:
    """The official config of such a checkpoint."""
    settings: dict[str, Any] = copy.deepcopy(demo_config.CONFIG)
    settings["transformer"] |= {
        "num_layers": blocks,
        "connector_num_layers": 1,
        **_stream(widths.heads, widths.head_dim, ""),
        **_stream(widths.heads, widths.audio_head_dim, "audio_"),
    }
    return settings


def _stream(heads: int, head_dim: int, prefix: str) -> dict[str, int]:
    return {
        f"{prefix}num_attention_heads": heads,
        f"{prefix}attention_head_dim": head_dim,
        f"{prefix}cross_attention_dim": heads * head_dim,
        f"{prefix}connector_num_attention_heads": heads,
        f"{prefix}connector_attention_head_dim": head_dim,
    }


def checkpoint_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint under its official name."""
    stated: Shapes = {
        name: shape
        for stream, width in _connector_widths(settings["transformer"]).items()
        for name, shape in (
            (
                f"text_embedding_projection.{stream}_aggregate_embed.weight",
                (width, demo_config.TEXT_WIDTH * (demo_config.TEXT_LAYERS + 1)),
            ),
            (f"{ROOT}{stream}_embeddings_connector.learnable_registers", (demo_config.REGISTERS, width)),
        )
    }
    configs = checkpoint_configs(settings, stated, NAME)
    found = {
        name: shape
        for component in CHECKPOINT_TABLES
        for name, shape in source_inventory(component, configs[component]).items()
    }
    return dict(sorted(found.items()))


def _connector_widths(transformer: Mapping[str, int]) -> dict[str, int]:
    return {
        "video": transformer["cross_attention_dim"],
        "audio": transformer["audio_cross_attention_dim"],
    }


def lora_shapes(checkpoint: Mapping[str, tuple[int, ...]], rank: int = RANK) -> dict[str, tuple[int, ...]]:
    """Both factors of every linear of the transformer, as the distilled LoRA has them (spec 02, section 6)."""
    factors: dict[str, tuple[int, ...]] = {}
    for name, shape in checkpoint.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or module == name or not name.startswith(ROOT) or "_embeddings_connector" in name:
            continue
        key = "diffusion_model." + module.removeprefix(ROOT)
        own = min(rank, *shape)
        factors[f"{key}.lora_A.weight"] = (own, shape[1])
        factors[f"{key}.lora_B.weight"] = (shape[0], own)
    return dict(sorted(factors.items()))


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], seed: int) -> None:
    """A safetensors file of random BF16 tensors, on the disk when this returns."""
    random = np.random.Generator(np.random.SFC64(seed))
    with path.open("xb") as file:
        file.write(build_header(((name, "BF16", shape) for name, shape in shapes.items()), metadata))
        for count in _steps(shapes.values()):
            bits = random.integers(0, 1 << 16, size=count, dtype=np.uint16)
            bits &= KEPT_BITS
            bits |= EXPONENT
            file.write(bits.data)
        file.flush()
        os.fsync(file.fileno())


def _steps(shapes: Iterable[tuple[int, ...]]) -> Iterable[int]:
    left = sum(math.prod(shape) for shape in shapes)
    while left > 0:
        yield min(left, STEP)
        left -= STEP
