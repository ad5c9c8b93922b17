"""Reads the configs and headers of a Gemma 3 folder: which files an overlay takes unchanged, and which it writes again.

It executes and trusts nothing in the folder: it refuses configs that name code, and a shard index must agree with the
shards' own headers (spec 01, section 1).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltxpack.errors import FormatError, OtherFormatError, SourceError, UnsupportedError
from ltxpack.files.foreign import HEAD_BYTES, lookalike
from ltxpack.files.tensorfile import MAX_TOKENIZER_BYTES, TensorInfo, open_source, plain_file_name
from ltxpack.ltx23.classes import TEXT_ENCODER_TYPE
from ltxpack.ltx23.configs import json_bytes
from ltxpack.ltx23.forms import TOLD, read_linears
from ltxpack.ltx23.releases import TEXT_ENCODER, TEXT_ENCODER_REPO
from ltxpack.ltx23.text_encoder import PUBLISHED_ROOTS, language_model, published_name, text_config
from ltxpack.materialize.access import OTHER_WEIGHTS, WEIGHTS, Access, InputFile, InputFolder
from ltxpack.materialize.checkpoint import AGAIN, FLOATS, STORED_DTYPE
from ltxpack.materialize.parts import shard_names
from ltxpack.repack.items import index_bytes

TOKENIZER_FOLDER = "tokenizer"
STEM = "model"
CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
REQUIRED = (CONFIG, TOKENIZER, "tokenizer_config.json")
MODEL_FILES = (CONFIG, "generation_config.json")
TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "chat_template.jinja", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
# The files and, for padding, the fields that name the tokens at a prompt's start and in its padding.
NAME_TOKENS, PADDING = ("tokenizer_config.json", "special_tokens_map.json"), ("pad_token", "eos_token")
# tokenizer.json holds a vocabulary of tens of megabytes and nothing that names code.
CHECKED_CONFIGS = [name for name in (*MODEL_FILES, *TOKENIZER_FILES) if name.endswith(".json") and name != TOKENIZER]

OTHER_ENCODER = f"{AGAIN}--text-encoder {TEXT_ENCODER_REPO}"
RENAME = "rename these files, then run the same command again"
_unsupported = functools.partial(UnsupportedError, next=OTHER_ENCODER)


@dataclass(frozen=True)
class TextEncoder:
    """The files that an overlay gets from a Gemma 3 folder.

    ``files``: all inputs. By path in the overlay: ``taken``, the unchanged files; ``written``, new small files.
    ``tensors``: the tensors to store again, by published name, each with its file.
    """

    files: Sequence[InputFile]
    taken: Mapping[str, InputFile]
    written: Mapping[str, bytes]
    tensors: Mapping[str, tuple[TensorInfo, InputFile]]


def read_text_encoder(folder: InputFolder, access: Access, connectors: Mapping[str, Any] | None) -> TextEncoder:
    """The files to take from ``folder``. Checks its configs and headers as a run does.

    The overlay takes BF16 weights under names that transformers loads unchanged, and stores others again.
    ``connectors``: their config, if known. Raises SourceError, FormatError or UnsupportedError.
    """
    files = folder.files
    _refuse_incomplete(folder, access)
    config = _checked_config(folder, access)
    weights = _weights(folder, access)
    placed = _tensors(weights, folder, access)
    tensors = {name: info for name, (info, _) in placed.items()}
    fields = text_config(config, files[CONFIG].label, OTHER_ENCODER)
    model = language_model(fields, tensors, folder.label, OTHER_ENCODER, FLOATS)
    _compare_with(connectors, model.size, folder)
    tokenizer = {f"{TOKENIZER_FOLDER}/{name}": files[name] for name in TOKENIZER_FILES if name in files}
    others = {f"{TEXT_ENCODER}/{name}": files[name] for name in MODEL_FILES if name in files}
    read = [*others.values(), *([files[INDEX]] if INDEX in files else []), *weights, *tokenizer.values()]
    as_published = model.root in PUBLISHED_ROOTS and config["model_type"] == TEXT_ENCODER_TYPE
    if as_published and all(info.dtype == STORED_DTYPE for info in model.tensors.values()):
        taken, index = _as_they_are(weights, folder, placed)
        return TextEncoder(read, others | taken | tokenizer, index, {})
    del others[f"{TEXT_ENCODER}/{CONFIG}"]
    written = {f"{TEXT_ENCODER}/{CONFIG}": json_bytes(_published_config(config, fields))}
    named = {published_name(name, model.root): found for name, found in placed.items()}
    return TextEncoder(read, others | tokenizer, written, named)


def _as_they_are(
    weights: Sequence[InputFile], folder: InputFolder, placed: Mapping[str, tuple[TensorInfo, InputFile]]
) -> tuple[dict[str, InputFile], dict[str, bytes]]:
    """The weights by their paths in the overlay, and an index for shards without one."""
    if INDEX in folder.files:
        return {f"{TEXT_ENCODER}/{file.name}": file for file in (folder.files[INDEX], *weights)}, {}
    if len(weights) == 1:
        return {f"{TEXT_ENCODER}/{WHOLE}": weights[0]}, {}
    total = sum(info.nbytes for info, _ in placed.values())
    index = index_bytes({name: file.name for name, (_, file) in placed.items()}, total)
    return {f"{TEXT_ENCODER}/{file.name}": file for file in weights}, {f"{TEXT_ENCODER}/{INDEX}": index}


def _published_config(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config for weights that are stored again: that of the whole Gemma 3, which the overlay's class needs."""
    whole = config if config["model_type"] == TEXT_ENCODER_TYPE else {"eos_token_id": config.get("eos_token_id", 1)}
    dropped = ("architectures", "transformers_version", "torch_dtype", "dtype")
    kept = {name: value for name, value in whole.items() if name not in dropped}
    text = {name: value for name, value in fields.items() if name not in dropped}
    classes = {"architectures": ["Gemma3ForConditionalGeneration"], "dtype": "bfloat16"}
    return {**kept, **classes, "model_type": TEXT_ENCODER_TYPE, "text_config": text}


def _refuse_incomplete(folder: InputFolder, access: Access) -> None:
    """Raises SourceError for a folder that lacks more than weights; for weights alone it names the missing files."""
    files = folder.files
    missing = [name for name in REQUIRED if name not in files]
    weights = sorted(folder.own(WEIGHTS, *OTHER_WEIGHTS))
    if missing:
        problem = "lacks files of the text encoder"
        if CONFIG in missing and weights:
            problem = "holds weights without the configs and the tokenizer that a text encoder also needs"
        found = ", ".join(_told(files[name], access) for name in weights[:3]) or None
        items = [f"{name} (tokenizer.model is not read)" if name == TOKENIZER else name for name in missing]
        raise SourceError(problem, file=folder.label, found=found, items=items, next=OTHER_ENCODER)
    if files[TOKENIZER].size > MAX_TOKENIZER_BYTES:  # a run would refuse it, after the download
        most, found = f"at most {MAX_TOKENIZER_BYTES} bytes", f"{files[TOKENIZER].size} bytes"
        label, problem = files[TOKENIZER].label, "is too large for a tokenizer"
        raise FormatError(problem, file=label, expected=most, found=found, next=OTHER_ENCODER)
    if files[TOKENIZER].repo is None:
        with open_source(files[TOKENIZER].path) as file:
            other = lookalike(file.read(HEAD_BYTES))
        if other is None or not other.what.startswith("JSON"):
            found = other.what if other else "other bytes"
            told = other.instead if other else OTHER_ENCODER
            raise FormatError("is no JSON", file=files[TOKENIZER].label, expected="JSON", found=found, next=told)


def _told(file: InputFile, access: Access) -> str:
    """The name of a file of weights, and its form."""
    try:
        return f"{file.name} ({TOLD[read_linears(access.header(file)).form]})"
    except FormatError as error:
        return f"{file.name} ({error.found if isinstance(error, OtherFormatError) else error.problem})"


def _checked_config(folder: InputFolder, access: Access) -> Mapping[str, Any]:
    """config.json. Raises UnsupportedError for configs that make a library run code or convert weights."""
    documents = {name: access.json(folder.files[name]) for name in CHECKED_CONFIGS if name in folder.files}
    for name, document in documents.items():
        label = folder.files[name].label
        if not isinstance(document, dict):
            raise FormatError("is not a JSON object", file=label)
        quantised = document.get("quantization_config")
        if quantised is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            how = f" by {method}" if isinstance(method, str) else ""
            problem = f"says that the weights are quantised{how} (quantization_config)"
            raise _unsupported(problem, file=label, expected="a text encoder in BF16")
        refused = [key for key in ("auto_map", "custom_pipelines") if key in document]
        if refused:
            raise _unsupported(f"has {refused[0]}, which is never followed", file=label, expected="plain configs")
    named = {key for name in NAME_TOKENS for key, value in documents.get(name, {}).items() if value}
    if "bos_token" not in named or named.isdisjoint(PADDING):
        problem, expected = "names no token to begin or to pad a prompt with", f"bos_token, and {' or '.join(PADDING)}"
        raise _unsupported(problem, file=folder.files[NAME_TOKENS[0]].label, expected=expected)
    config: Mapping[str, Any] = documents[CONFIG]
    return config


def _weights(folder: InputFolder, access: Access) -> list[InputFile]:
    """The files of weights: those of the index, the whole one, a complete set of shards, or the only one."""
    files = folder.files
    if INDEX in files:
        names = sorted(set(access.index(files[INDEX]).values()))
        if not names:
            raise FormatError("names no shards", file=files[INDEX].label)
        missing = [name for name in names if name not in files]
        if missing:
            raise SourceError("lacks shards that its index names", file=folder.label, items=missing)
        return [files[name] for name in names]
    found = sorted(folder.own(WEIGHTS))
    shards = shard_names(found[0]) if found and WHOLE not in found else []
    if shards and set(found) <= set(shards):
        if missing := [name for name in shards if name not in found]:
            raise SourceError("lacks shards of the text encoder", file=folder.label, items=missing)
        if odd := [files[name].name for name in shards if not plain_file_name(files[name].name)]:
            problem = "has shards with names that no overlay may hold"
            raise UnsupportedError(problem, file=folder.label, items=odd, next=RENAME)
        return [files[name] for name in shards]
    if WHOLE in found or len(found) == 1:
        return [files[WHOLE if WHOLE in found else found[0]]]
    others = [_told(files[name], access) for name in sorted(files) if name.lower().endswith((WEIGHTS, *OTHER_WEIGHTS))]
    raise SourceError(
        "holds no weights of the text encoder", file=folder.label, expected=f"{WHOLE}, or shards with {INDEX}",
        found=", ".join(others[:3]) or "no .safetensors file", next=OTHER_ENCODER,
    )  # fmt: skip


def _tensors(
    weights: Sequence[InputFile], folder: InputFolder, access: Access
) -> dict[str, tuple[TensorInfo, InputFile]]:
    """Every tensor by its name in the files, with its file. Raises FormatError if an index disagrees."""
    index = access.index(folder.files[INDEX]) if INDEX in folder.files else None
    placed: dict[str, tuple[TensorInfo, InputFile]] = {}
    for shard in weights:
        tensors = access.header(shard).tensors
        named = tensors.keys() if index is None else {name for name, file in index.items() if file == shard.name}
        wrong = sorted(named ^ tensors.keys())
        if wrong:
            items = [f"{name}: {'not in the file' if name in named else 'not in the index'}" for name in wrong]
            raise FormatError("does not hold what its index says", file=shard.label, items=items)
        twice = sorted(tensors.keys() & placed.keys())
        if twice:
            raise FormatError("holds tensors that another shard holds as well", file=shard.label, items=twice)
        placed.update((name, (info, shard)) for name, info in tensors.items())
    return placed


def _compare_with(connectors: Mapping[str, Any] | None, size: tuple[int, int], folder: InputFolder) -> None:
    expected = (connectors["caption_channels"], connectors["text_proj_in_factor"] - 1) if connectors else size
    if expected != size:
        wanted, found = ("width {} and {} layers".format(*each) for each in (expected, size))
        problem = "is a Gemma 3 of another size than the checkpoint was made with"
        raise _unsupported(problem, file=folder.label, expected=wanted, found=found)
