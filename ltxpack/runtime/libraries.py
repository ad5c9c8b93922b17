"""The libraries of all parts but the transformer, imported before the clock of a video runs.

Whoever loads a part imports its class then. Until then a command has not waited for diffusers and transformers, which
take two seconds: commands that fail, and processes that only hand out work, never do.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from ltxpack.imports import uncollected

# Module -> its names for what a rank other than 0 makes beside its share of a step: pictures.
OF_A_RANK = {"diffusers": ("AutoencoderKLLTX2Video",)}
OF_A_VIDEO = {
    "diffusers": ("AutoencoderKLLTX2Audio", "AutoencoderKLLTX2Video"),
    "diffusers.pipelines.ltx2": ("LTX2LatentUpsamplerModel", "LTX2TextConnectors", "LTX2VocoderWithBWE"),
    "transformers": ("Gemma3TextModel", "PreTrainedTokenizerFast"),
}


def import_libraries(names: Mapping[str, tuple[str, ...]] = OF_A_VIDEO) -> None:
    """Import them now: both libraries import a module when its name is first used."""
    with uncollected():
        for module, wanted in names.items():
            for name in wanted:
                getattr(importlib.import_module(module), name)
