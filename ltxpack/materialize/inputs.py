"""All inputs, read by their headers and small files, and checked against one another. No weight is read or fetched.

The text encoder's weights are taken over as they are. Nothing in its folder is executed or believed: configs that name
code are refused, and the shard index must say what the shards' own headers say (spec 01, section 1).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltxpack.errors import FormatError, SourceError, UnsupportedError
from ltxpack.files.tensorfile import MAX_TOKENIZER_BYTES, plain_file_name
from ltxpack.ltx23.classes import TEXT_ENCODER_TYPE
from ltxpack.ltx23.forms import described
from ltxpack.ltx23.releases import CHECKPOINT, LORA, TEXT_ENCODER, TEXT_ENCODER_REPO, UPSAMPLER
from ltxpack.materialize.checkpoint import (
    Checkpoint,
    Upsampler,
    checkpoint_header,
    read_checkpoint,
    read_lora,
    read_upsampler,
)
from ltxpack.materialize.sources import AGAIN, Access, InputFaults, InputFile, InputFolder, Sources

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
REQUIRED = (CONFIG, TOKENIZER, "tokenizer_config.json", "processor_config.json")
MODEL_FILES = (CONFIG, "generation_config.json")
TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "chat_template.jinja", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
# tokenizer.json holds a vocabulary, tens of megabytes of it, and nothing that names code.
CHECKED_CONFIGS = [name for name in (*MODEL_FILES, *TOKENIZER_FILES) if name.endswith(".json") and name != TOKENIZER]

_LAYER = re.compile(r"language_model\..*layers\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:.*\.)?language_model\.(?:.*\.)?embed_tokens\.weight")

OTHER_ENCODER = f"{AGAIN}--text-encoder {TEXT_ENCODER_REPO}"
_unsupported = functools.partial(UnsupportedError, next=OTHER_ENCODER)


@dataclass(frozen=True)
class Inputs:
    """What the overlay is made from. An input that is None is missing, or a LoRA that a distilled base needs not.

    ``text_encoder``: the files to take over, by the folder they go to.
    """

    sources: Sources
    checkpoint: Checkpoint
    upsampler: Upsampler | None
    text_encoder: Mapping[str, Sequence[InputFile]]

    def files(self) -> list[tuple[str, InputFile]]:
        """Every input file with its role, in a fixed order."""
        sources = self.sources
        single = [(CHECKPOINT, sources.checkpoint), (LORA, sources.lora), (UPSAMPLER, sources.upsampler)]
        files = [(role, file) for role, file in single if file is not None]
        members = itertools.chain(*self.text_encoder.values())
        return [*files, *((TEXT_ENCODER, file) for file in sorted(members, key=lambda file: file.name))]


def read_inputs(sources: Sources, access: Access) -> Inputs:
    """Read and check every input, before anything large is fetched.

    Raises one LtxpackError that names the faults of all inputs.
    """
    faults = InputFaults("inputs cannot be used")
    file, lora, own, folder = sources.checkpoint, sources.lora, sources.upsampler, sources.text_encoder
    checkpoint = faults.gather(CHECKPOINT, lambda: _read_checkpoint(file, access))
    configs = checkpoint.configs if checkpoint else None
    channels = configs["vae"]["latent_channels"] if configs else None
    connectors = configs["connectors"] if configs else None
    upsampler = encoder = None
    if lora is not None:
        faults.gather(LORA, lambda: _check_lora(lora, access))
    if own is not None:
        upsampler = faults.gather(UPSAMPLER, lambda: read_upsampler(access.header(own), channels, own.label))
    if folder is not None:
        encoder = faults.gather(TEXT_ENCODER, lambda: read_text_encoder(folder, access, connectors))
    faults.refuse()
    assert checkpoint is not None
    return Inputs(sources, checkpoint, upsampler, encoder or {})


def _read_checkpoint(file: InputFile, access: Access) -> Checkpoint:
    return read_checkpoint(checkpoint_header(lambda: access.header(file), file.label), file.label)


def _check_lora(lora: InputFile, access: Access) -> None:
    if not plain_file_name(lora.name) or not lora.name.endswith(".safetensors"):
        raise UnsupportedError("has a name that no overlay may hold", file=lora.label, expected="NAME.safetensors")
    header = read_lora(access.header(lora))
    if not header.is_lora:
        raise UnsupportedError(
            "is not a LoRA", file=lora.label, expected="pairs of lora_A and lora_B weights",
            found=described(access.header(lora)) or f"{len(header.others)} other tensors", next=f"{AGAIN}--lora FILE",
        )  # fmt: skip


def read_text_encoder(
    folder: InputFolder, access: Access, connectors: Mapping[str, Any] | None
) -> dict[str, list[InputFile]]:
    """The files to take over from ``folder``, by the folder they go to.

    ``folder`` is checked by its configs and headers, and against the ``connectors``' config, if that is known. Raises
    SourceError, FormatError or UnsupportedError.
    """
    files = folder.files
    missing = [name for name in REQUIRED if name not in files]
    if missing:
        raise SourceError("lacks files of the text encoder", file=folder.label, items=missing, next=OTHER_ENCODER)
    _check_configs(folder, access)
    if files[TOKENIZER].size > MAX_TOKENIZER_BYTES:  # a run would refuse it, after the download
        most, found = f"at most {MAX_TOKENIZER_BYTES} bytes", f"{files[TOKENIZER].size} bytes"
        label, problem = files[TOKENIZER].label, "is too large for a tokenizer"
        raise FormatError(problem, file=label, expected=most, found=found, next=OTHER_ENCODER)
    weights, index = _weights(folder, access)
    size = _size(folder, _shapes(weights, index, access), access.json(files[CONFIG]))
    expected = (connectors["caption_channels"], connectors["text_proj_in_factor"] - 1) if connectors else size
    if expected != size:
        wanted, found = ("width {} and {} layers".format(*each) for each in (expected, size))
        problem = "is a Gemma 3 of another size than the checkpoint was made with"
        raise _unsupported(problem, file=folder.label, expected=wanted, found=found)
    model = [files[name] for name in (*MODEL_FILES, *([INDEX] if index is not None else [])) if name in files]
    return {"text_encoder": model + weights, "tokenizer": [files[name] for name in TOKENIZER_FILES if name in files]}


def _check_configs(folder: InputFolder, access: Access) -> None:
    """Refuse another kind of model, and configs that would have a library run code or convert weights."""
    for name in (name for name in CHECKED_CONFIGS if name in folder.files):
        document = access.json(folder.files[name])
        label = folder.files[name].label
        if not isinstance(document, dict):
            raise FormatError("is not a JSON object", file=label)
        refused = [key for key in ("auto_map", "custom_pipelines", "quantization_config") if key in document]
        if refused:
            problem = f"has {refused[0]}, which is never followed"
            raise _unsupported(problem, file=label, expected="plain configs and BF16 weights")
    kind, label = access.json(folder.files[CONFIG]).get("model_type"), folder.files[CONFIG].label
    if kind != TEXT_ENCODER_TYPE:
        wanted, found = f"model_type {TEXT_ENCODER_TYPE}", f"model_type {kind}"
        raise _unsupported("is not the text encoder of LTX-2.3", file=label, expected=wanted, found=found)


def _weights(folder: InputFolder, access: Access) -> tuple[list[InputFile], Mapping[str, str] | None]:
    """The weight files, and the index if there is one."""
    files = folder.files
    if INDEX in files:
        weight_map = access.index(files[INDEX])
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if name not in files]
        if missing:
            raise SourceError("lacks shards that its index names", file=folder.label, items=missing)
        if not names:
            raise FormatError("names no shards", file=files[INDEX].label)
        return [files[name] for name in names], weight_map
    if WHOLE in files:
        return [files[WHOLE]], None
    found = [name for name in sorted(files) if name.endswith(".safetensors")]
    raise SourceError(
        "holds no weights of the text encoder", file=folder.label, expected=f"{WHOLE}, or shards with {INDEX}",
        found=", ".join(found) or "no .safetensors file", next=OTHER_ENCODER,
    )  # fmt: skip


def _shapes(
    weights: Sequence[InputFile], index: Mapping[str, str] | None, access: Access
) -> dict[str, tuple[int, ...]]:
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


def _size(folder: InputFolder, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> tuple[int, int]:
    """Width and depth of the language model, from its tensors. A config of another size would build another model."""
    embeddings = [shape for name, shape in shapes.items() if _EMBEDDINGS.fullmatch(name) and len(shape) == 2]
    layers = {int(match[1]) for name in shapes if (match := _LAYER.search(name)) and len(match[1]) < 6}
    if len(embeddings) != 1 or layers != set(range(len(layers))) or not layers:
        wanted = "language_model.*: one table of embeddings and layers from 0 on"
        found = f"{len(embeddings)} tables and {len(layers)} layers"
        raise _unsupported("holds no whole Gemma 3 language model", file=folder.label, expected=wanted, found=found)
    label, stated = folder.files[CONFIG].label, config.get("text_config")
    if not isinstance(stated, dict):
        raise FormatError("has no text_config", file=label)
    for field, value in (("hidden_size", embeddings[0][1]), ("num_hidden_layers", len(layers))):
        if stated.get(field, value) != value:
            problem = f"text_config.{field} is not that of the weights"
            raise FormatError(problem, file=label, expected=value, found=stated[field])
    return embeddings[0][1], len(layers)
