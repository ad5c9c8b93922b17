"""Transformers with linears in codes: from a fixture's recorded codes, or coded here, as spec 09 says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from codec_parts import checkpoint_of, golden_configs
from safetensors.torch import save_file
from support import load
from torch import Tensor

from ltxpack.ltx23.classes import LOADED_CLASSES
from ltxpack.ltx23.codes import E4M3, I8
from ltxpack.ltx23.renames import TRANSFORMER, component_of

ROOT = "model.diffusion_model."


def recorded_folder(golden: Path, folder: Path, variant: str) -> Path:
    """The bake of ``fp8_weights_s0.5``: in blocks of its own ``tensor`` or ``int8`` codes, else bfloat16 (``bf16``)."""
    (lora,) = (load(path) for path in golden.glob("*distilled-lora*.safetensors"))
    weights = {}
    for key, value in load(checkpoint_of(golden)).items():
        if component_of(key) == "transformer":
            module = key.removeprefix("model.").removesuffix(".weight")
            up, down = (lora.get(f"{module}.lora_{part}.weight") for part in "BA")
            fused = value if up is None else value.float() + 0.5 * (up.float() @ down.float())
            weights[TRANSFORMER.rename(key)] = fused.bfloat16()
    for name, value in load(golden / "golden" / "fp8_weights_s0.5.safetensors").items():
        if name.startswith(f"{variant}."):
            weights[TRANSFORMER.rename(ROOT + name.removeprefix(f"{variant}."))] = value
    return write_transformer(folder, golden_configs(golden)["transformer"], weights)


def write_transformer(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """``folder`` with this config and these tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": LOADED_CLASSES["transformer"], **config}))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def coded(weights: dict[str, Tensor], form: str, blocks: Iterable[int]) -> dict[str, Tensor]:
    """``weights`` with every linear of ``blocks`` in the codes of ``form``, and the scales beside it."""
    roots, found = tuple(f"transformer_blocks.{number}." for number in blocks), dict(weights)
    for name, weight in weights.items():
        if name.startswith(roots) and name.endswith(".weight") and weight.dim() == 2:
            parts = {E4M3: _fp8, I8: _int8}[form](weight.float())
            found |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    return found


def _fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(1.0)}


def _int8(weight: Tensor) -> dict[str, Tensor]:
    size = max(4**power for power in range(5) if weight.shape[1] % 4**power == 0)
    rotated = (weight.unflatten(1, (-1, size)) @ kronecker(size)).flatten(1)
    scales = rotated.abs().amax(1, keepdim=True) / 127
    return {"weight": (rotated / scales).round().clamp(-127, 127).to(torch.int8), "weight_scale": scales}


def kronecker(size: int) -> Tensor:
    """H4⊗…⊗H4 / √size."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(found, four)
    return found
