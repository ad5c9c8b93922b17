"""The sizes of the published LTX-2.3: its configs and every tensor, without any of its files.

For plans before 70 GB are fetched. ``published.json`` holds the configs of the files: ``checkpoint`` and ``upsampler``
in the official fields, ``text_encoder`` as Gemma's config.json (without the vision tower), and under ``shapes`` the
sizes that only tensors state. A test compares the sum of the tensors with the published number of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltxpack.ltx23.configs import checkpoint_configs, upsampler_config
from ltxpack.ltx23.expected import inventory

# Modulation tables are float32 in the published checkpoint, all other tensors bfloat16.
FLOAT32_TENSORS = "scale_shift_table"
# Vision tower and projector of the text encoder's files, as one tensor of their size: read to be hashed, not loaded.
VISION = ("vision_tower.all", "BF16", (421_290_864,))


def published_files() -> dict[str, Any]:
    """A copy of ``published.json`` that the caller may change."""
    document: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return document


def published_configs() -> dict[str, dict[str, Any]]:
    """The diffusers configs of all components, and the config of the text encoder."""
    files, name = published_files(), "LTX-2.3 22B"
    shapes = {tensor: tuple(shape) for tensor, shape in files["shapes"].items()}
    configs = checkpoint_configs(files["checkpoint"], shapes, name)
    configs["latent_upsampler"] = upsampler_config(files["upsampler"], configs["vae"]["latent_channels"], name)
    return {**configs, "text_encoder": files["text_encoder"]}


def published_tensors(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """Component -> name, stored dtype and shape of each tensor in an overlay."""
    found = {
        component: [
            (tensor, "F32" if component == "transformer" and tensor.endswith(FLOAT32_TENSORS) else "BF16", shape)
            for tensor, shape in inventory(component, config).items()
        ]
        for component, config in configs.items()
    }
    if "text_encoder" in found:
        found["text_encoder"].append(VISION)
    return found
