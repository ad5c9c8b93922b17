"""Gemma 3's language model by headers: the spellings of its tensors, and the tensors that its config needs.

Both halves use this: ``materialize`` before it takes a folder over, ``run`` before it reads a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ltxpack.errors import FormatError, UnsupportedError
from ltxpack.files.tensorfile import FLOATS, TensorFile, TensorInfo
from ltxpack.ltx23.classes import TEXT_ENCODER_TYPE, TEXT_ROOT
from ltxpack.ltx23.expected import inventory
from ltxpack.ltx23.fields import MAX_DIMENSION, MAX_REPEATS
from ltxpack.ltx23.forms import refuse_quantised

T = TypeVar("T", bound=TensorInfo)

# The type of the language model alone; other configs have its fields under text_config.
TEXT_ONLY_TYPE = "gemma3_text"
# Prefixes of the language model's names: the published one; those of newer transformers, with a head and without;
# those of the language model alone, with a head and without.
PUBLISHED_ROOTS = (TEXT_ROOT, "model.language_model.")
ROOTS = (*PUBLISHED_ROOTS, "language_model.", "model.", "")
EMBEDDINGS = "embed_tokens.weight"
# Parts of Gemma 3 that no prompt passes.
UNUSED = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.|(?:language_model\.)?lm_head\.")
_LAYER = re.compile(r"layers\.(\d{1,5})\.")
# The sizes in a config -> the defaults of transformers' Gemma3TextConfig.
SIZES = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip


@dataclass(frozen=True)
class LanguageModel(Generic[T]):
    """The language model in a text encoder's files. ``tensors`` by their names in the module, without ``root``."""

    root: str
    tensors: Mapping[str, T]

    @property
    def size(self) -> tuple[int, int]:
        """Width, and number of layers."""
        return self.tensors[EMBEDDINGS].shape[1], _layers(self.tensors)


def text_config(document: Mapping[str, Any], label: object, next: str) -> Mapping[str, Any]:
    """The language model's own fields of a config.json, with all SIZES.

    Raises UnsupportedError for another model, FormatError for impossible fields.
    """
    kind = document.get("model_type")
    if kind not in (TEXT_ENCODER_TYPE, TEXT_ONLY_TYPE):
        problem, expected = "is not the text encoder of LTX-2.3", f"model_type {TEXT_ENCODER_TYPE} or {TEXT_ONLY_TYPE}"
        raise UnsupportedError(problem, file=str(label), expected=expected, found=f"model_type {kind}", next=next)
    fields = document.get("text_config", document if kind == TEXT_ONLY_TYPE else None)
    if not isinstance(fields, Mapping):
        raise FormatError("has no text_config", file=str(label), next=next)
    sizes = {name: fields.get(name, default) for name, default in SIZES.items()}
    for name, value in sizes.items():
        most = MAX_REPEATS if name == "num_hidden_layers" else MAX_DIMENSION
        if type(value) is not int or not 0 < value <= most:
            expected = f"a whole number from 1 to {most}"
            raise FormatError(f"has no sound {name}", file=str(label), expected=expected, found=value, next=next)
    return {**fields, **sizes}


def language_model(
    fields: Mapping[str, Any], tensors: Mapping[str, T], label: object, next: str, floats: Collection[str] = FLOATS
) -> LanguageModel[T]:
    """The language model of ``fields`` (see :func:`text_config`) among ``tensors``, none missing and none foreign.

    ``floats``: dtypes that the caller can load. Raises UnsupportedError naming every fault, and FormatError if config
    and weights differ in size.
    """
    own = {name: info for name, info in tensors.items() if not UNUSED.match(name)}
    root = root_of(own)
    if root is None:
        expected, found = f"{TEXT_ROOT}{EMBEDDINGS} and the layers", ", ".join(sorted(own)[:3]) or "no tensors"
        problem = "holds no Gemma 3 language model"
        raise UnsupportedError(problem, file=str(label), expected=expected, found=found, next=next)
    refuse_quantised(TensorFile(Path(str(label)), 0, own, {}), label, "prompts are read with", next)
    known = {name.removeprefix(root): info for name, info in own.items() if name.startswith(root)}
    _compare_sizes(fields, known, label, next)
    listed = inventory("text_encoder", {"text_config": fields})
    wanted = {name.removeprefix(TEXT_ROOT): shape for name, shape in listed.items()}
    foreign = [name for name in sorted(own) if not name.startswith(root) or name.removeprefix(root) not in wanted]
    faults = [f"missing: {root}{name} {list(shape)}" for name, shape in wanted.items() if name not in known]
    faults += [f"unknown: {name}" for name in foreign]
    for name, info in ((name, known[name]) for name in wanted if name in known):
        if info.shape != wanted[name]:
            faults.append(f"shape: {info.name}: expected {list(wanted[name])}, found {list(info.shape)}")
        elif info.dtype not in floats:
            faults.append(f"dtype: {info.name}: expected {' or '.join(sorted(floats))}, found {info.dtype}")
    if faults:
        problem = "does not hold the language model that its config describes"
        if any("lora_" in name for name in foreign):
            problem = "holds a LoRA that is not merged into the weights"
        raise UnsupportedError(problem, file=str(label), items=faults, next=next)
    return LanguageModel(root, known)


def root_of(names: Collection[str]) -> str | None:
    """The prefix of the language model's names among ``names``; None if there is no language model."""
    return next((root for root in ROOTS if root + EMBEDDINGS in names), None)


def published_name(name: str, root: str) -> str:
    """The name in Google's files of a tensor of a language model with the prefix ``root``."""
    if UNUSED.match(name):
        bare = name.removeprefix("model.")
        return f"language_model.{bare}" if bare.startswith("lm_head.") else bare
    return TEXT_ROOT + name.removeprefix(root)


def _compare_sizes(fields: Mapping[str, Any], known: Mapping[str, TensorInfo], label: object, next: str) -> None:
    """Raises FormatError for a config of another size, for which all tensors would count as missing."""
    table = known[EMBEDDINGS].shape
    found = {"num_hidden_layers": _layers(known), **({"hidden_size": table[1]} if len(table) == 2 else {})}
    for field, value in found.items():
        if fields[field] != value:
            problem = f"{field} in its config is not that of its weights"
            raise FormatError(problem, file=str(label), expected=value, found=fields[field], next=next)


def _layers(names: Collection[str]) -> int:
    return 1 + max((int(found[1]) for name in names if (found := _LAYER.match(name))), default=-1)
