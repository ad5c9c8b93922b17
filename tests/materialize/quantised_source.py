"""Quantised checkpoints in miniature, right ones and every kind of wrong one, byte by byte after spec 09."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from materialize import tiny_source

from ltxpack.demo.checkpoint import write_payload
from ltxpack.files.tensorfile import tensor_nbytes

ROOT = "model.diffusion_model."
BLOCK = f"{ROOT}transformer_blocks.1."
SHAPES = tiny_source.tensor_shapes(tiny_source.CONFIG)
# All 34 linears of one block.
LINEARS = [
    name.removesuffix(".weight")
    for name, shape in SHAPES.items()
    if name.startswith(BLOCK) and name.endswith(".weight") and len(shape) == 2
]
METADATA = {"config": json.dumps(tiny_source.CONFIG), "model_version": "2.3.0", "license": "none, random"}
FP8 = {"format": "float8_e4m3fn"}
INT8 = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4}

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def scalar(value: float) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", (), struct.pack("<f", value)


def plain(dtype: str = "BF16") -> Tensors:
    """A whole checkpoint; its numbers are zeros."""
    return {name: (dtype, shape, bytes(tensor_nbytes(dtype, shape))) for name, shape in SHAPES.items()}


def fp8(input_scale: float = 1.0) -> Tensors:
    """The official form: codes, and two scalars."""
    tensors = plain()
    for linear in LINEARS:
        shape = SHAPES[f"{linear}.weight"]
        tensors[f"{linear}.weight"] = "F8_E4M3", shape, bytes(tensor_nbytes("U8", shape))
        tensors |= {f"{linear}.weight_scale": scalar(0.5), f"{linear}.input_scale": scalar(input_scale)}
    return tensors


def int8() -> Tensors:
    """The rotated form: codes, and a scale for each row."""
    tensors = plain()
    for linear in LINEARS:
        rows, _ = shape = SHAPES[f"{linear}.weight"]
        tensors[f"{linear}.weight"] = "I8", shape, bytes(tensor_nbytes("I8", shape))
        tensors[f"{linear}.weight_scale"] = "F32", (rows, 1), struct.pack("<f", 0.5) * rows
    return tensors


def without(tensors: Tensors, names: Collection[str]) -> Tensors:
    return {name: entry for name, entry in tensors.items() if name not in names}


def renamed(tensors: Tensors, rename: Callable[[str], str | None]) -> Tensors:
    """Other names; those that become None are left out."""
    return {new: entry for name, entry in tensors.items() if (new := rename(name))}


def transformer_alone(name: str) -> str | None:
    return name if name.startswith(ROOT) else None


def marker(linears: Collection[str] = tuple(LINEARS), layer: Mapping[str, object] = FP8) -> dict[str, str]:
    """The metadata's marker."""
    layers = dict.fromkeys(linears, layer)
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def markers(layer: Mapping[str, object] = FP8) -> Tensors:
    """The comfy_quant tensors."""
    text = json.dumps(layer).encode()
    return {f"{linear}.comfy_quant": ("U8", (len(text),), text) for linear in LINEARS}


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> Path:
    """A safetensors file."""
    path.unlink(missing_ok=True)
    entries = [(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    write_payload(path, entries, metadata, (data for _, _, data in tensors.values()))
    return path
