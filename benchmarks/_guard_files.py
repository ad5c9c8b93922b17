"""What is read, written, kept in memory and asked of the hub, counted without any of it: from plans and headers.

The files are of the published sizes, their weights holes. The hub is the tests' server, its files tiny.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from _full_size import Holes, make_full_size
from hub_server import HubServer
from materialize import tiny_source

from ltxpack.demo.checkpoint import GEMMA, lora_shapes, tokenizer_documents
from ltxpack.export import plan as exporting
from ltxpack.files.tensorfile import build_header, tensor_nbytes
from ltxpack.lora_bake import BakeOptions, find
from ltxpack.lora_bake.adapter import open_adapter
from ltxpack.lora_bake.bake import plan_unwritten
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.ltx23.expected import (
    FLOAT32_TENSORS,
    published_configs,
    published_files,
    published_tensors,
    source_inventory,
)
from ltxpack.ltx23.releases import CHECKPOINT, DEFAULT_FILES, LORA, OFFICIAL_REPO, TEXT_ENCODER_REPO, UPSAMPLER
from ltxpack.ltx23.renames import CHECKPOINT_TABLES
from ltxpack.manifest import FORMATS, MANIFEST_NAME, FileRecord, Lora, read_manifest
from ltxpack.materialize import Options, materialize, plan_overlay
from ltxpack.repack.items import CopyFile, ShardEntry, WriteShard
from ltxpack.reporter import SilentReporter
from ltxpack.runtime.overlay import official_transformers
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import HQ, RECIPES
from ltxpack.runtime.settings import RESIDENT, STREAM, SWAP
from ltxpack.runtime.weights.machine import this_machine
from ltxpack.runtime.weights.plan import best_plan
from ltxpack.runtime.weights.sizes import model_sizes

GB = 10**9
RANK = 384
# A machine for each mode: GB of the card and of the host.
MACHINES = {RESIDENT: (141, 128), SWAP: (80, 128), STREAM: (24, 64)}
Tensor = tuple[str, str, tuple[int, ...]]
Numbers = Mapping[str, int]
Counts = Iterator[tuple[str, int]]


def _in_a_folder(count: Callable[[Path], Counts]) -> Callable[[Numbers], Counts]:
    """``count`` in a folder of its own."""

    def counted(_: Numbers) -> Counts:
        with tempfile.TemporaryDirectory(prefix="ltxpack-guard-") as folder:
            yield from count(Path(folder))

    return counted


def videos(_: Numbers) -> Counts:
    """Of every recipe in every mode: the largest memory, and what the first and each further video reads."""
    for recipe, form in product(RECIPES.values(), FORMATS):
        stages = official_transformers(recipe, form=form)
        model = model_sizes(None, stages, "bfloat16")
        work = Request.of("", recipe=recipe.name).work(stages)
        for mode, sizes in MACHINES.items():
            plan = best_plan(model, work, this_machine(*(size * GB for size in sizes)), mode)
            name = f"{recipe.name}, {form}, {mode}"
            assert plan is not None, f"{name} does not fit {sizes} GB"
            yield f"{name}: card memory", plan.card
            yield f"{name}: host memory", plan.host
            yield f"{name}: first video reads", plan.first_read
            yield f"{name}: next video reads", plan.next_read


@_in_a_folder
def offline(scratch: Path) -> Counts:
    """Bytes that materialize, bakes and exports of the published model read and write."""
    plan = plan_overlay(Options(str(_source(scratch / "source")), scratch / "none"), SilentReporter())
    assert not plan.missing
    items = list(plan.items())
    shards = [item for item in items if isinstance(item, WriteShard)]
    yield "materialize: bytes read", _read(entry for shard in shards for entry in shard.entries)
    yield "materialize: bytes written", sum(item.size for item in items if not isinstance(item, CopyFile))
    yield "materialize: bytes linked", sum(item.size for item in items if isinstance(item, CopyFile))
    overlay = _overlay(scratch / "overlay")
    with patch.object(find, "open_adapter", _once(open_adapter)):
        yield from _bakes_and_exports(overlay, scratch)


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """What it returns first, for every call: all bakes here have the same LoRA and the same base."""
    made: list[Any] = []

    def once(*given: Any) -> Any:
        if not made:
            made.append(function(*given))
        return made[0]

    return once


def _bakes_and_exports(overlay: Path, scratch: Path) -> Counts:
    for form in FORMATS:
        options = BakeOptions(overlay, (HQ.strengths[0],), formats=(form,))
        bake = plan_unwritten(options, SilentReporter(), headers_only=True).plan
        lora = sum(use.adapter.size for use in bake.loras)
        entries = [entry for shard in bake.shards.values() for entry in shard.entries]
        yield f"bake-lora, {form}: bytes read", _read(entries) + lora
        yield f"bake-lora, {form}: bytes written", sum(item.size for item in bake.items)
        for parts in ("all", "transformer"):
            asked = exporting.ExportOptions(overlay, scratch / "none.safetensors", make=options, parts=parts)
            with patch.object(exporting, "_metadata", lambda *inputs: {}):
                export = exporting.plan_export(asked, SilentReporter(), headers_only=True)
            read = _read(entry for unit in export.units for entry in unit.entries)
            yield f"export {parts}, {form}: bytes read", read + lora
            yield f"export {parts}, {form}: bytes written", export.size


def _read(entries: Iterable[ShardEntry]) -> int:
    """Each range of a file once."""
    return sum(one.nbytes for one in {one for entry in entries for one in entry.producer.ranges})


@_in_a_folder
def hub(scratch: Path) -> Counts:
    """Requests that the tests' hub gets: for a plan, for an overlay, and for the same one again."""
    source = tiny_source.make_source(scratch / "published")
    model = {DEFAULT_FILES[role]: source / name for role, name in tiny_source.NAMES.items()}
    text = {path.name: path for path in (source / tiny_source.GEMMA).iterdir()}
    options = Options(OFFICIAL_REPO, scratch / "from-hub")
    with HubServer({OFFICIAL_REPO: model, TEXT_ENCODER_REPO: text}) as server, pytest.MonkeyPatch.context() as patched:
        server.use(patched, scratch / "cache")
        for name, work in (("plan", plan_overlay), ("materialize", materialize), ("materialize again", materialize)):
            before = len(server.requests)
            work(options, SilentReporter())
            yield f"hub, {name}: requests", len(server.requests) - before


def _checkpoint() -> list[Tensor]:
    """Every tensor of the published checkpoint."""
    configs = published_configs()
    return [
        (name, "F32" if name.endswith(FLOAT32_TENSORS) else "BF16", shape)
        for component in CHECKPOINT_TABLES
        for name, shape in source_inventory(component, configs[component]).items()
    ]


def _lora() -> list[Tensor]:
    """Every tensor of the published distilled LoRA."""
    shapes = {name: shape for name, _, shape in _checkpoint()}
    return [(name, "BF16", shape) for name, shape in lora_shapes(shapes, RANK).items()]


def _source(folder: Path) -> Path:
    """The inputs of materialize as they are published."""
    holes, files, configs = Holes(folder, hashed=False), published_files(), published_configs()
    upsampler = source_inventory("latent_upsampler", configs["latent_upsampler"])
    metadata = {"config": json.dumps(files["checkpoint"]), "model_version": "2.3.0"}
    _write(holes, DEFAULT_FILES[CHECKPOINT], _checkpoint(), metadata)
    _write(holes, DEFAULT_FILES[LORA], _lora(), {})
    tensors = [(name, "BF16", shape) for name, shape in upsampler.items()]
    _write(holes, DEFAULT_FILES[UPSAMPLER], tensors, {"config": json.dumps(files["upsampler"])})
    _write(holes, "gemma/model.safetensors", published_tensors(configs)["text_encoder"], {})
    config = {**GEMMA, "text_config": configs["text_encoder"]["text_config"]}
    for name, document in {"config.json": config, **tokenizer_documents()}.items():
        holes.write(f"gemma/{name}", json.dumps(document).encode())
    return folder


def _overlay(folder: Path) -> Path:
    """The published overlay without bakes, with the LoRA in its size."""
    manifest = read_manifest(make_full_size(folder, hashed=False))
    record = _write(Holes(folder, hashed=False), manifest.loras[0].file.path, _lora(), {})
    manifest = replace(manifest, loras=(Lora(DISTILLED, record),), bakes={})
    (folder / MANIFEST_NAME).write_bytes(manifest.dump())
    return folder


def _write(holes: Holes, path: str, tensors: Sequence[Tensor], metadata: dict[str, str]) -> FileRecord:
    nbytes = sum(tensor_nbytes(dtype, shape) for _, dtype, shape in tensors)
    return holes.write(path, build_header(tensors, metadata), nbytes)
