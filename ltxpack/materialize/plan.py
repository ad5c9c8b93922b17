"""The plan of an overlay: every file with its size, before a byte moves. Pure.

The plan does not contain the manifest (ltxpack.json), which is written last, from the records of the written files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltxpack.files.tensorfile import TensorInfo
from ltxpack.ltx23.classes import COMPONENTS, DISTILLED
from ltxpack.ltx23.configs import json_bytes, model_index, scheduler_config
from ltxpack.ltx23.releases import CHECKPOINT, IMAGE_CRF, TEXT_ENCODER
from ltxpack.manifest import DISTILLED_KIND, FULL_KIND, Component, FileRecord, Lora, Manifest, Source, SourceFile
from ltxpack.materialize.access import InputFile
from ltxpack.materialize.checkpoint import FLOATS, STORED_DTYPE, Checkpoint, Upsampler
from ltxpack.materialize.inputs import Inputs
from ltxpack.materialize.text_encoder import STEM, TOKENIZER_FOLDER, TextEncoder
from ltxpack.repack.items import (
    DEFAULT_STEM,
    Cast,
    CopyFile,
    Item,
    WriteBytes,
    WriteShard,
    assign_shards,
    stored_tensor,
)

LORA_FOLDER = "loras"
MODEL_INDEX = "model_index.json"
SCHEDULER = "scheduler"
# The checkpoint's own metadata, every string unchanged, for exports.
METADATA = "source/metadata.json"
# New name -> tensor and its file.
Placed = Mapping[str, tuple[TensorInfo, Path]]


@dataclass(frozen=True)
class ComponentPlan:
    """One folder of the overlay. ``cast``: tensors with another dtype than in the source."""

    name: str
    items: tuple[Item, ...]
    cast: tuple[str, ...] = ()


@dataclass(frozen=True)
class OverlayPlan:
    """The contents of an overlay. ``missing``: role and reason of inputs that were not found.

    ``stated``: the manifest without its files. ``unproven``: sources without a hash or a commit of the hub.
    """

    components: tuple[ComponentPlan, ...]
    loras: tuple[CopyFile, ...]
    files: tuple[WriteBytes, ...]
    missing: tuple[str, ...]
    stated: Manifest
    copy: bool = False
    unproven: frozenset[Path] = frozenset()

    def items(self) -> Iterator[Item]:
        yield from self.files
        for component in self.components:
            yield from component.items
        yield from self.loras

    def to_json(self) -> dict[str, Any]:
        """``--plan --json``: files with sizes and actions, missing inputs, the sum of the sizes."""
        # If no link is possible, the writer copies the file.
        actions = {WriteShard: "repack", WriteBytes: "write", CopyFile: "copy" if self.copy else "link"}
        files = [{"path": item.path, "bytes": item.size, "action": actions[type(item)]} for item in self.items()]
        files.sort(key=lambda file: str(file["path"]))
        total = sum(item.size for item in self.items())
        return {"files": files, "missing": list(self.missing), "total_bytes": total}

    def manifest(self, records: Mapping[str, FileRecord]) -> Manifest:
        """The manifest, given the record of every planned file by path."""
        components = {}
        for component in self.components:
            facts = COMPONENTS[component.name]
            files = tuple(records[item.path] for item in component.items)
            components[component.name] = Component(facts.library, facts.name, files, component.cast)
        loras = tuple(Lora(DISTILLED, records[lora.path]) for lora in self.loras)
        written = tuple(records[file.path] for file in self.files)
        return replace(self.stated, components=components, loras=loras, files=written)


def make_plan(inputs: Inputs, max_shard_size: int, copy: bool) -> OverlayPlan:
    """The plan of an overlay from ``inputs``, which may not be on this machine yet."""
    checkpoint, sources, lora = inputs.checkpoint, inputs.sources, inputs.sources.lora
    components = plan_checkpoint(checkpoint, max_shard_size)
    if inputs.upsampler is not None and sources.upsampler is not None:
        components.append(plan_upsampler(inputs.upsampler, sources.upsampler, max_shard_size))
    distilled = inputs.distilled_by is not None
    components.append(plan_scheduler(distilled))
    components += plan_text_encoder(inputs.text_encoder, max_shard_size) if inputs.text_encoder else []
    kind = DISTILLED_KIND if distilled else FULL_KIND
    source = _source(inputs, max_shard_size)
    metadata = checkpoint.metadata
    stated = Manifest(metadata.model_version, IMAGE_CRF, metadata.licence, source, {}, (), (), transformer_kind=kind)
    return OverlayPlan(
        components=tuple(components),
        loras=() if lora is None else (CopyFile(f"{LORA_FOLDER}/{lora.name}", lora.path, lora.size),),
        files=(plan_model_index(), plan_metadata(checkpoint)),
        missing=tuple(f"{role}: {reason}" for role, reason in sources.missing.items()),
        stated=stated,
        copy=copy,
        unproven=frozenset(file.path for _, file in inputs.files() if file.sha256 is None and file.repo is None),
    )


def plan_checkpoint(checkpoint: Checkpoint, max_shard_size: int) -> list[ComponentPlan]:
    planned = []
    for name, config in checkpoint.configs.items():
        placed = {target: (info, checkpoint.places[info.name]) for target, info in checkpoint.tensors[name].items()}
        planned.append(_repacked(name, config, placed, max_shard_size))
    return planned


def plan_upsampler(upsampler: Upsampler, file: InputFile, max_shard_size: int) -> ComponentPlan:
    """The component, with the upsampler's file unchanged if possible."""
    name = "latent_upsampler"
    if not upsampler.as_is:
        placed = {target: (info, file.path) for target, info in upsampler.tensors.items()}
        return _repacked(name, upsampler.config, placed, max_shard_size)
    copied = CopyFile(f"{name}/{DEFAULT_STEM}.safetensors", file.path, file.size)
    return ComponentPlan(name, (_config(name, upsampler.config), copied))


def plan_text_encoder(encoder: TextEncoder, max_shard_size: int) -> list[ComponentPlan]:
    stored = {name: (info, file.path) for name, (info, file) in encoder.tensors.items()}
    shards, cast = _stored(TEXT_ENCODER, stored, max_shard_size, STEM) if stored else ((), ())
    small = tuple(WriteBytes(path, data) for path, data in encoder.written.items())
    taken = [CopyFile(path, file.path, file.size) for path, file in encoder.taken.items()]
    model, tokenizer = (
        tuple(item for item in taken if item.path.startswith(f"{folder}/"))
        for folder in (TEXT_ENCODER, TOKENIZER_FOLDER)
    )
    return [ComponentPlan(TEXT_ENCODER, (*small, *model, *shards), cast), ComponentPlan(TOKENIZER_FOLDER, tokenizer)]


def plan_scheduler(distilled: bool) -> ComponentPlan:
    content = json_bytes(scheduler_config(distilled))
    return ComponentPlan(SCHEDULER, (WriteBytes(f"{SCHEDULER}/scheduler_config.json", content),))


def plan_model_index() -> WriteBytes:
    """The index with which diffusers loads the overlay."""
    return WriteBytes(MODEL_INDEX, json_bytes(model_index()))


def plan_metadata(checkpoint: Checkpoint) -> WriteBytes:
    """The checkpoint's metadata: keys in order, with escapes, so that every string reads back exactly."""
    return WriteBytes(METADATA, json_bytes(dict(checkpoint.file.metadata)))


def _config(name: str, config: Mapping[str, Any]) -> WriteBytes:
    return WriteBytes(f"{name}/config.json", json_bytes(config))


def _repacked(name: str, config: Mapping[str, Any], tensors: Placed, max_shard_size: int) -> ComponentPlan:
    shards, cast = _stored(name, tensors, max_shard_size)
    return ComponentPlan(name, (_config(name, config), *shards), cast)


def _stored(
    name: str, tensors: Placed, max_shard_size: int, stem: str = DEFAULT_STEM
) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """Shards of ``tensors``, and the names of cast tensors.

    All floats are stored in BF16: F32 tables would promote the whole residual stream in diffusers (spec 01, §3). Parts
    of a text encoder that no prompt passes may hold other numbers, which stay as they are.
    """
    entries = [
        stored_tensor(target, info, path, STORED_DTYPE if info.dtype in FLOATS else None)
        for target, (info, path) in tensors.items()
    ]
    cast = tuple(sorted(entry.tensors[0].name for entry in entries if isinstance(entry.producer, Cast)))
    return assign_shards(entries, max_shard_size, name, stem), cast


def _source(inputs: Inputs, max_shard_size: int) -> Source:
    files = []
    for role, file in inputs.files():
        release = file.known.release.name if file.known.release else None
        repo, revision = (file.repo.repo, file.repo.commit) if file.repo else (None, None)
        files.append(SourceFile(role, file.name, file.size, file.sha256, release, repo, revision))
    assert files[0].role == CHECKPOINT
    return Source(files[0].repo, files[0].revision, tuple(files), max_shard_size)
