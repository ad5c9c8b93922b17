"""An overlay of the published sizes that takes no room: real configs, headers, indexes and hashes, weights that are
holes in their files. Fewer blocks and layers, and files that are not hashed, serve the tests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from ltxpack.demo.checkpoint import GEMMA, tokenizer_documents
from ltxpack.files.tensorfile import TensorInfo, build_header, tensor_nbytes
from ltxpack.ltx23.classes import LOADED_CLASSES
from ltxpack.ltx23.codes import CODES, coded_linears, with_codes
from ltxpack.ltx23.expected import published_configs, published_tensors
from ltxpack.manifest import BF16, MANIFEST_NAME, Bake, BakedLora, Component, FileRecord, Lora, Manifest, Source
from ltxpack.repack.items import DEFAULT_MAX_SHARD_SIZE, DEFAULT_STEM, WriteBytes, assign_shards, stored_tensor

STRENGTHS = (0.25, 0.5)
STEMS = {"text_encoder": "model"}
READ = 1 << 26
# Stands for the hash of a file that is not hashed.
UNKNOWN = "0" * 64


@dataclass
class Holes:
    """Writes files of holes below ``root``, and hashes those that are the same once."""

    root: Path
    hashed: bool
    hashes: dict[tuple[str, int], str] = field(default_factory=dict)

    def write(self, path: str, head: bytes, nbytes: int = 0) -> FileRecord:
        """``head``, then ``nbytes`` that take no room."""
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + nbytes)
        key = (hashlib.sha256(head).hexdigest(), nbytes)
        if key not in self.hashes:
            self.hashes[key] = blake3_of(place) if self.hashed or not nbytes else UNKNOWN
        return FileRecord(path, len(head) + nbytes, self.hashes[key])

    def component(self, folder: str, tensors: Sequence[Any], config: dict[str, Any]) -> tuple[FileRecord, ...]:
        """config.json, and the shards and index that ``materialize`` would write."""
        entries = [
            stored_tensor(name, TensorInfo(name, dtype, shape, 0, tensor_nbytes(dtype, shape)), self.root)
            for name, dtype, shape in tensors
        ]
        stem = STEMS.get(folder, DEFAULT_STEM)
        records = [self.write(f"{folder}/config.json", json.dumps(config).encode())]
        for item in assign_shards(entries, DEFAULT_MAX_SHARD_SIZE, folder, stem):
            head = item.data if isinstance(item, WriteBytes) else item.header
            records.append(self.write(item.path, head, item.size - len(head)))
        return tuple(records)


def make_full_size(
    root: Path, *, blocks: int = 48, layers: int = 48, hashed: bool = True, forms: Sequence[str] = (BF16,)
) -> Path:
    """The overlay, in the new folder ``root``; its transformers have ``blocks`` blocks, its text encoder ``layers``
    layers, its bakes are in ``forms``.
    """
    holes = Holes(root, hashed)
    configs = published_configs()
    configs["transformer"]["num_layers"] = blocks
    configs["connectors"]["text_proj_in_factor"] = layers + 1
    configs["text_encoder"]["text_config"]["num_hidden_layers"] = layers
    tensors = published_tensors(configs)
    configs["text_encoder"] = {**GEMMA, "text_config": configs["text_encoder"]["text_config"]}
    components = {}
    for name, class_name in LOADED_CLASSES.items():
        files = holes.component(name, tensors[name], {"_class_name": class_name, **configs[name]})
        components[name] = Component("transformers" if name == "text_encoder" else "diffusers", class_name, files)
    documents = tokenizer_documents().items()
    files = tuple(holes.write(f"tokenizer/{name}", json.dumps(document).encode()) for name, document in documents)
    components["tokenizer"] = Component("transformers", "GemmaTokenizerFast", files)
    lora = Lora("distilled", holes.write("loras/distilled.safetensors", build_header([("a", "BF16", (1,))], {}), 2))
    bakes = {}
    for form in forms:
        plain = tensors["transformer"]
        stored = plain if form == BF16 else list(with_codes(plain, CODES[form]))
        linears = tuple(sorted(coded_linears({name: dtype for name, dtype, _ in stored})))
        for strength in STRENGTHS:
            name = f"distilled-{strength}" + ("" if form == BF16 else f"-{form}")
            files = holes.component(f"bakes/{name}", stored, configs["transformer"])
            baked = BakedLora(lora.name, lora.file.path, lora.file.size, lora.file.blake3, strength, None)
            bakes[name] = Bake((baked,), "fp32", "cpu", "cpu", files, (), form, linears)
    manifest = Manifest("2.3.0", 33, None, Source("Lightricks/LTX-2.3", None, ()), components, (lora,), (), bakes)
    (root / MANIFEST_NAME).write_bytes(manifest.dump())
    return root


def blake3_of(path: Path) -> str:
    """Of a whole file."""
    found = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:
        while data := file.read(READ):
            found.update(data)
    return found.hexdigest()
