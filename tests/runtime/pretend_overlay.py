"""An overlay of the published model's sizes that takes no room: real headers and configs, weight files with holes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blake3 import blake3
from transformers import Gemma3Config

from ltxpack.demo import _tokenizer
from ltxpack.files.tensorfile import build_header, tensor_nbytes
from ltxpack.ltx23.classes import LOADED_CLASSES
from ltxpack.ltx23.published import published_configs, published_tensors
from ltxpack.manifest import Bake, BakedLora, Component, FileRecord, Lora, Manifest, Source

UNKNOWN = "0" * 64
Tensors = Iterable[tuple[str, str, tuple[int, ...]]]


def write_overlay(root: Path, blocks: int, layers: int) -> Path:
    """Transformers of ``blocks`` blocks, base and both official bakes, and a text encoder of ``layers`` layers; all of
    them, and everything else, in the published widths.
    """
    configs = published_configs()
    configs["transformer"]["num_layers"] = blocks
    tensors = published_tensors(configs)
    configs["text_encoder"] = _gemma(configs["text_encoder"]["text_config"], layers)
    tensors["text_encoder"] = [entry for entry in tensors["text_encoder"] if _layer(entry[0]) < layers]
    # Read by Gemma's layers as by the connectors, which see one hidden state for each.
    components = {name: _component(root, name, name, configs[name], tensors[name]) for name in LOADED_CLASSES}
    documents = {
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"},
    }
    written = tuple(_document(root, f"tokenizer/{name}", document) for name, document in documents.items())
    components["tokenizer"] = Component("transformers", "GemmaTokenizer", written)
    lora = _weights(root, "loras/distilled.safetensors", [("a", "BF16", (1,))])
    bakes = {}
    for strength in (0.25, 0.5):
        name = f"distilled-{strength}"
        files = _component(root, f"bakes/{name}", "transformer", configs["transformer"], tensors["transformer"]).files
        loras = (BakedLora("distilled", "distilled.safetensors", lora.size, lora.blake3, strength, strength),)
        bakes[name] = Bake(loras, "fp32", "addmm", "cpu", files, ())
    manifest = Manifest("2.3.0", 33, None, Source(None, None, ()), components, (Lora("distilled", lora),), (), bakes)
    (root / "ltxpack.json").write_bytes(manifest.dump())
    return root


def _gemma(text: dict[str, Any], layers: int) -> dict[str, Any]:
    config: dict[str, Any] = Gemma3Config(text_config={**text, "num_hidden_layers": layers}).to_dict()
    return json.loads(json.dumps(config, default=str))


def _layer(name: str) -> int:
    _, found, rest = name.partition(".layers.")
    return int(rest.partition(".")[0]) if found else -1


def _component(root: Path, folder: str, name: str, config: dict[str, Any], tensors: Tensors) -> Component:
    files = (
        _document(root, f"{folder}/config.json", {"_class_name": LOADED_CLASSES[name], **config}),
        _weights(root, f"{folder}/model.safetensors", tensors),
    )
    return Component("diffusers", LOADED_CLASSES[name], files)


def _document(root: Path, path: str, document: Any) -> FileRecord:
    data = json.dumps(document).encode()
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(data)
    return FileRecord(path, len(data), blake3(data).hexdigest())


def _weights(root: Path, path: str, tensors: Tensors) -> FileRecord:
    layout = list(tensors)
    header = build_header(layout, {})
    size = len(header) + sum(tensor_nbytes(dtype, shape) for _, dtype, shape in layout)
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    with (root / path).open("wb") as file:
        file.write(header)
        file.truncate(size)
    return FileRecord(path, size, UNKNOWN)
