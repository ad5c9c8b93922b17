"""Adapters' spellings of the modules of the text path: text connectors, text projections, Gemma's language model.

lora_keys.py has the modules of the transformer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ltxpack.ltx23.lora_keys import LoraKey, ModuleNames
from ltxpack.ltx23.renames import CONNECTORS
from ltxpack.ltx23.text_encoder import PUBLISHED_ROOTS, ROOTS, UNUSED

# The components of the text path; the folder of the first holds that of the second.
TEXT_COMPONENTS = ("text_encoder", "connectors")

_CHECKPOINT_ROOT = "model.diffusion_model."
_TO_OFFICIAL = CONNECTORS.reverse()
# Prefixes of kohya and others before a flattened name of the text encoder.
_FLAT = re.compile(r"lora_(?:te\d*|text_encoder\d*)_")
# Diffusers writes the component before the name; parse_key knows the prefixes of a wrapped model.
_COMPONENT = re.compile(r"(?:text_encoders?|connectors)\.(?:model\.|transformer\.)?")


def names_of(shapes: Mapping[str, tuple[int, ...]]) -> ModuleNames:
    """The spellings of the modules of a transformer, and of a text path if ``shapes`` has its tensors."""
    text = {name: shape for name, shape in shapes.items() if _is_text(name)}
    rest = {name: shape for name, shape in shapes.items() if name not in text}
    return BothNames(rest, TextNames(text)) if text else ModuleNames(rest)


def _is_text(name: str) -> bool:
    return name.startswith((*CONNECTORS.roots.values(), *PUBLISHED_ROOTS)) or UNUSED.match(name) is not None


class TextNames(ModuleNames):
    """All spellings of the modules of a text encoder and its connectors, by the tensor names of both."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(shapes, _spellings)

    def find(self, key: LoraKey) -> tuple[str, ...] | None:
        """As in the base class; a name may begin with its component or kohya's prefix of a text encoder."""
        flat = _FLAT.match(key.module)
        if flat is not None and not key.flat and "." not in key.module:
            return self._flat.get(key.module[flat.end() :])
        return super().find(key) or self._dotted.get(_COMPONENT.sub("", key.module, count=1))


class BothNames(ModuleNames):
    """The modules of a transformer first, then those of its text path."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], text: TextNames) -> None:
        super().__init__(shapes)
        self.linears |= text.linears
        self._text = text

    def find(self, key: LoraKey) -> tuple[str, ...] | None:
        """The modules of the transformer, else those of the text path."""
        return super().find(key) or self._text.find(key)


def _spellings(module: str) -> set[str]:
    """The names of ``module`` in diffusers, the official code, and files of Gemma."""
    root = next((root for root in CONNECTORS.roots.values() if f"{module}.".startswith(root)), None)
    if root is not None:
        official = _TO_OFFICIAL.rename(f"{module}.").removesuffix(".").removeprefix(_CHECKPOINT_ROOT)
        both = {module, official}
        return both | {name.removesuffix(".0") for name in both if name.endswith(".to_out.0")}
    if UNUSED.match(f"{module}."):
        return {module}
    inner = module.removeprefix(next(root for root in ROOTS if f"{module}.".startswith(root)))
    return {root + inner for root in ROOTS} | {root.removeprefix("model.") + inner for root in PUBLISHED_ROOTS}
