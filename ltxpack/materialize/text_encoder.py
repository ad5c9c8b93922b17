"""The text encoder's folder: which of its files enter the overlay, and whether they are the Gemma 3 that is needed.

The weights are taken over as they are. Nothing in the folder is executed or believed: configs that name code are
refused, the shard index is held against the shards' own headers (spec 01, section 1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltxpack.errors import FormatError, SourceError, UnsupportedError
from ltxpack.files.tensorfile import MAX_TOKENIZER_BYTES
from ltxpack.ltx23.classes import TEXT_ENCODER_TYPE
from ltxpack.ltx23.releases import TEXT_ENCODER_REPO
from ltxpack.materialize.access import Access, Located
from ltxpack.materialize.sources import TextEncoderFolder

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
REQUIRED = (CONFIG, TOKENIZER, "tokenizer_config.json", "processor_config.json")
MODEL_FILES = (CONFIG, "generation_config.json")
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
)
# tokenizer.json holds a vocabulary, tens of megabytes of it, and nothing that names code.
CHECKED_CONFIGS = tuple(
    name for name in (*MODEL_FILES, *TOKENIZER_FILES) if name.endswith(".json") and name != TOKENIZER
)

_LAYER = re.compile(r"language_model\..*layers\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:.*\.)?language_model\.(?:.*\.)?embed_tokens\.weight")


@dataclass(frozen=True)
class TextEncoder:
    """The files to take over, and how wide and deep the language model is."""

    model: tuple[Located, ...]
    tokenizer: tuple[Located, ...]
    hidden_size: int
    layers: int


def read_text_encoder(folder: TextEncoderFolder, access: Access) -> TextEncoder:
    """Check ``folder`` by its configs and headers. Raises SourceError, FormatError or UnsupportedError."""
    files = folder.files
    missing = [name for name in REQUIRED if name not in files]
    if missing:
        raise SourceError(
            "lacks files of the text encoder",
            file=folder.label,
            items=missing,
            next=f"--text-encoder {TEXT_ENCODER_REPO}",
        )
    _check_configs(folder, access)
    _check_tokenizer(files[TOKENIZER])
    weights, index = _weights(folder, access)
    shapes = _shapes(weights, index, access)
    hidden_size, layers = _size(folder, shapes)
    _check_stated_size(access.json(files[CONFIG]), hidden_size, layers, folder)
    model = [files[name] for name in MODEL_FILES if name in files]
    if index is not None:
        model.append(files[INDEX])
    tokenizer = [files[name] for name in TOKENIZER_FILES if name in files]
    return TextEncoder((*model, *weights), tuple(tokenizer), hidden_size, layers)


def check_fit(encoder: TextEncoder, connectors: Mapping[str, Any], folder: TextEncoderFolder) -> None:
    """Whether the checkpoint's text projections take what this encoder gives. Raises UnsupportedError."""
    expected = (connectors["caption_channels"], connectors["text_proj_in_factor"])
    if (encoder.hidden_size, encoder.layers + 1) == expected:
        return
    raise UnsupportedError(
        "is a Gemma 3 of another size than the checkpoint was made with", file=folder.label,
        expected=f"width {expected[0]} and {expected[1] - 1} layers",
        found=f"width {encoder.hidden_size} and {encoder.layers} layers", next=f"--text-encoder {TEXT_ENCODER_REPO}",
    )  # fmt: skip


def _check_configs(folder: TextEncoderFolder, access: Access) -> None:
    """Refuse another kind of model, and configs that would have a library run code or convert weights."""
    for name in CHECKED_CONFIGS:
        if name not in folder.files:
            continue
        document = access.json(folder.files[name])
        if not isinstance(document, dict):
            raise FormatError("is not a JSON object", file=folder.files[name].label)
        refused = [key for key in ("auto_map", "custom_pipelines", "quantization_config") if key in document]
        if refused:
            raise UnsupportedError(
                f"has {refused[0]}, which is never followed", file=folder.files[name].label,
                expected="plain configs and BF16 weights", next=f"--text-encoder {TEXT_ENCODER_REPO}",
            )  # fmt: skip
    kind = access.json(folder.files[CONFIG]).get("model_type")
    if kind != TEXT_ENCODER_TYPE:
        raise UnsupportedError(
            "is not the text encoder of LTX-2.3", file=folder.files[CONFIG].label,
            expected=f"model_type {TEXT_ENCODER_TYPE}", found=f"model_type {kind}",
            next=f"--text-encoder {TEXT_ENCODER_REPO}",
        )  # fmt: skip


def _check_tokenizer(file: Located) -> None:
    """What a run would refuse is told before it is fetched."""
    if file.size > MAX_TOKENIZER_BYTES:
        raise FormatError(
            "is too large for a tokenizer", file=file.label, expected=f"at most {MAX_TOKENIZER_BYTES} bytes",
            found=f"{file.size} bytes", next=f"--text-encoder {TEXT_ENCODER_REPO}",
        )  # fmt: skip


def _weights(folder: TextEncoderFolder, access: Access) -> tuple[list[Located], Mapping[str, str] | None]:
    """The weight files, and the index if there is one."""
    files = folder.files
    if INDEX in files:
        weight_map = access.index(files[INDEX]).weight_map
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if name not in files]
        if missing:
            raise SourceError("lacks shards that its index names", file=folder.label, items=missing)
        if not names:
            raise FormatError("names no shards", file=files[INDEX].label)
        return [files[name] for name in names], weight_map
    if WEIGHTS in files:
        return [files[WEIGHTS]], None
    found = [name for name in sorted(files) if name.endswith(".safetensors")]
    raise SourceError(
        "holds no weights of the text encoder", file=folder.label, expected=f"{WEIGHTS}, or shards with {INDEX}",
        found=", ".join(found) or "no .safetensors file", next=f"--text-encoder {TEXT_ENCODER_REPO}",
    )  # fmt: skip


def _shapes(weights: Sequence[Located], index: Mapping[str, str] | None, access: Access) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor; the index must say exactly what the shards hold. Raises FormatError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in weights:
        tensors = access.header(shard).tensors
        named = tensors.keys() if index is None else {name for name, file in index.items() if file == shard.name}
        wrong = sorted(named ^ tensors.keys())
        if wrong:
            items = [f"{name}: {'not in the file' if name in named else 'not in the index'}" for name in wrong]
            raise FormatError("does not hold what its index says", file=shard.label, items=items)
        shapes.update((name, info.shape) for name, info in tensors.items())
    return shapes


def _size(folder: TextEncoderFolder, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Width and depth of the language model, from its tensors."""
    embeddings = [shape for name, shape in shapes.items() if _EMBEDDINGS.fullmatch(name) and len(shape) == 2]
    layers = {int(match[1]) for name in shapes if (match := _LAYER.search(name)) and len(match[1]) < 6}
    if len(embeddings) != 1 or layers != set(range(len(layers))) or not layers:
        raise UnsupportedError(
            "holds no whole Gemma 3 language model", file=folder.label,
            expected="language_model.*: one table of embeddings and layers from 0 on",
            found=f"{len(embeddings)} tables and {len(layers)} layers", next=f"--text-encoder {TEXT_ENCODER_REPO}",
        )  # fmt: skip
    return embeddings[0][1], len(layers)


def _check_stated_size(config: Mapping[str, Any], hidden_size: int, layers: int, folder: TextEncoderFolder) -> None:
    """A config of another size than the weights would build another model."""
    stated = config.get("text_config")
    if not isinstance(stated, dict):
        raise FormatError("has no text_config", file=folder.files[CONFIG].label)
    for field, value in (("hidden_size", hidden_size), ("num_hidden_layers", layers)):
        if stated.get(field, value) != value:
            raise FormatError(
                f"text_config.{field} is not that of the weights", file=folder.files[CONFIG].label,
                expected=value, found=stated[field],
            )  # fmt: skip
