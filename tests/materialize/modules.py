"""diffusers' own modules on the meta device, as the truth about names and shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support import REPOSITORY

from ltxpack.ltx23.classes import COMPONENTS

SPEC = REPOSITORY.parent / "shared" / "spec"
needs_spec = pytest.mark.skipif(not SPEC.is_dir(), reason="no spec folder on this machine")

Shapes = dict[str, tuple[int, ...]]


def spec() -> tuple[dict[str, Any], Shapes, Shapes]:
    """What the published files say and hold: metadata, the checkpoint's shapes, the upsampler's shapes."""
    listing = json.loads((SPEC / "ltx23_inventory.json").read_text())
    groups = {name: group for name, group in listing.items() if isinstance(group, dict)}
    upsampler = {name: tuple(shape) for name, shape in groups.pop("upsampler").items()}
    shapes = {name: tuple(shape) for group in groups.values() for name, shape in group.items()}
    return json.loads((SPEC / "ltx23_config.json").read_text()), shapes, upsampler


def module_class(component: str) -> Any:
    """The class that a component is loaded with."""
    import diffusers
    from diffusers.pipelines import ltx2
    from diffusers.pipelines.ltx2 import connectors, latent_upsampler, vocoder

    name = COMPONENTS[component].name
    for where in (diffusers, ltx2, connectors, latent_upsampler, vocoder):
        if hasattr(where, name):
            return getattr(where, name)
    raise LookupError(name)


def module_shapes(component: str, config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a module's state dict: parameters and persistent buffers."""
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        module = module_class(component)(**fields)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
