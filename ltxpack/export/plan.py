"""What an exported file will hold, to the byte, before any is written (spec 09, section 3).

Tensors have the official names, which are those of the repacking, read backwards, and the order that safetensors gives
them. The weights of the transformer are copied from the base or a bake, or those of a bake that is made on the way.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ltxpack.errors import OverlayError, SourceError, UsageError, quoted
from ltxpack.files.tensorfile import DTYPE_BITS, build_header, parse_json, read_tensorfile, regular_size
from ltxpack.lora_bake.bake import UnwrittenBake, plan_unwritten
from ltxpack.lora_bake.plan import BakeOptions, BaseShard
from ltxpack.ltx23.codes import CODES, rotated_together
from ltxpack.ltx23.forms import MADE_FROM, MARKER, QUANTISATION, ROOT
from ltxpack.ltx23.releases import CHECKPOINT
from ltxpack.ltx23.renames import CHECKPOINT_TABLES
from ltxpack.manifest import BF16, FP8, Bake, Manifest, changed_file, read_manifest, recorded_bytes
from ltxpack.materialize.access import Access, InputFile
from ltxpack.materialize.plan import METADATA
from ltxpack.materialize.sources import choose, open_source_folder
from ltxpack.repack.items import ShardEntry, TensorSpec, stored_tensor
from ltxpack.reporter import Reporter

ENDING = ".safetensors"
# ``all``: the components of the checkpoint. ``transformer``: what is below one root there, connectors included.
PARTS = ("all", "transformer")
TRANSFORMER = "transformer"
# Official files hold these in float32, an overlay in bfloat16.
TABLE = "scale_shift_table"
LICENCE_KEYS = ("license", "licence")
# Raised when the same inputs would give other bytes than before.
EXPORT_VERSION = 1


@dataclass(frozen=True)
class ExportOptions:
    """What to write where: the base, the bake ``bake``, or what ``make`` asks for, made on the way.

    ``form``: what the bake must be stored as, None for any. ``source``: file, folder or repo with the checkpoint's
    metadata, for an overlay that does not keep it. ``force``: over a file that is there.
    """

    overlay: Path
    output: Path
    bake: str | None = None
    make: BakeOptions | None = None
    form: str | None = None
    parts: str = PARTS[0]
    source: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Place:
    """Where the ``nbytes`` of a tensor go: to ``offset`` of the file, None for nowhere. ``widened``: BF16 to F32."""

    name: str
    nbytes: int
    offset: int | None
    widened: bool = False


@dataclass(frozen=True)
class Unit:
    """A file of the overlay that is read in one go, what is made of it, and where each tensor of that goes."""

    shard: BaseShard
    entries: tuple[ShardEntry, ...]
    places: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of what is made of it."""
        return sum(place.nbytes for place in self.places)

    @property
    def names(self) -> frozenset[str]:
        """The tensors of the file that are made of it."""
        return frozenset(place.name for place in self.places if place.offset is not None)


@dataclass(frozen=True)
class ExportPlan:
    """The file: its ``header``, its ``tensors`` in order, ``literals`` among them, and the ``units`` with the others.

    ``bake``: what the transformer is, None for the base; ``made``: if it is made on the way.
    """

    header: bytes
    tensors: tuple[TensorSpec, ...]
    literals: Mapping[str, bytes]
    units: tuple[Unit, ...]
    bake: Bake | None
    made: UnwrittenBake | None

    @property
    def size(self) -> int:
        """The whole file in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def widened(self) -> int:
        """Tables stored in float32 though the overlay has bfloat16."""
        return sum(place.widened for unit in self.units for place in unit.places)

    @property
    def form(self) -> str:
        """How its quantised linears are stored."""
        return BF16 if self.bake is None else self.bake.format

    @property
    def quantised(self) -> int:
        """How many linears these are."""
        return 0 if self.bake is None else len(self.bake.quantised)

    def fingerprint(self) -> str:
        """Tells an unfinished file of this plan from others."""
        inputs: list[Any] = [EXPORT_VERSION, [dataclasses.astuple(unit.shard.record) for unit in self.units]]
        if self.made is not None:
            inputs += [self.made.plan.fingerprint(), dataclasses.asdict(self.made.arithmetic)]
        return blake3(self.header + json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def plan_export(options: ExportOptions, reporter: Reporter, *, headers_only: bool = False) -> ExportPlan:
    """The file. ``headers_only``: of LoRAs on the hub only headers are read.

    Raises OverlayError for an overlay that cannot give it, UsageError for a bake that is not there, and what a bake
    raises before it writes.
    """
    manifest = read_manifest(options.overlay)
    made = None if options.make is None else plan_unwritten(_making(options), reporter, headers_only=headers_only)
    bake = made.stated if made is not None else _bake(options, manifest)
    sources = list(_sources(options, manifest, made))
    names = [_official_names(component, entries, options) for component, _, entries in sources]
    tensors = [spec for found in names for _, spec in found if spec is not None]
    marks = {spec.name.removesuffix(".weight"): _mark(spec) for spec in tensors if spec.dtype in CODES.values()}
    literals: dict[str, bytes] = {}
    metadata = _metadata(options, manifest, bake, reporter)
    if marks and options.parts == PARTS[0]:
        metadata[QUANTISATION] = json.dumps({"format_version": "1.0", "layers": dict(sorted(marks.items()))})
    elif marks:
        literals = {f"{linear}.{MARKER}": json.dumps(mark).encode() for linear, mark in marks.items()}
    tensors += [TensorSpec(name, "U8", (len(data),)) for name, data in literals.items()]
    # As safetensors orders them: every tensor is aligned to its elements, bytes without a number come last.
    tensors.sort(key=lambda spec: (-DTYPE_BITS[spec.dtype], spec.dtype == "U8", spec.name))
    header = build_header(((spec.name, spec.dtype, spec.shape) for spec in tensors), metadata)
    offsets, end = dict[str, int](), len(header)
    for spec in tensors:
        offsets[spec.name] = end
        end += spec.nbytes
    units = tuple(
        Unit(shard, entries, tuple(_place(tensor, spec, offsets) for tensor, spec in found))
        for (_, shard, entries), found in zip(sources, names, strict=True)
    )
    return ExportPlan(header, tuple(tensors), literals, units, bake, made)


def _making(options: ExportOptions) -> BakeOptions:
    """What is made on the way; it needs no name of its own."""
    assert options.make is not None
    return dataclasses.replace(options.make, name="export", force=options.force, export=_flags(options))


def _flags(options: ExportOptions) -> str:
    parts = [] if options.parts == PARTS[0] else [f"--parts {options.parts}"]
    source = [] if options.source is None else [f"--source {quoted(options.source)}"]
    return " ".join([f"-o {quoted(options.output)}", *parts, *source])


def _place(tensor: TensorSpec, spec: TensorSpec | None, offsets: Mapping[str, int]) -> Place:
    if spec is None:
        return Place(tensor.name, tensor.nbytes, None)
    return Place(spec.name, tensor.nbytes, offsets[spec.name], spec.dtype != tensor.dtype)


# What is taken of the overlay


def _bake(options: ExportOptions, manifest: Manifest) -> Bake | None:
    if options.bake is None:
        return None
    if options.bake not in manifest.bakes:
        known, start = list(manifest.bakes), f"ltxpack export {quoted(options.overlay)} {_flags(options)}"
        close = difflib.get_close_matches(options.bake, known, 1, 0.0)
        again = f"{start} --bake {close[0]}" if close else f"{start} --strength 0.5"
        raise UsageError("no such bake", file=options.overlay, found=options.bake, items=known, next=again)
    found = manifest.bakes[options.bake]
    if options.form not in (None, found.format):
        raise UsageError(
            "a bake is copied as it is stored", file=options.overlay, expected=found.format, found=options.form,
            next="leave --bake out and give --strength: then it is made on the way",
        )  # fmt: skip
    return found


def _sources(
    options: ExportOptions, manifest: Manifest, made: UnwrittenBake | None
) -> Iterator[tuple[str, BaseShard, tuple[ShardEntry, ...]]]:
    """Component, file, and what is made of it, for every file with weights."""
    overlay = options.overlay
    wanted = CHECKPOINT_TABLES if options.parts == PARTS[0] else (TRANSFORMER, "connectors")
    missing = [component for component in wanted if component not in manifest.components]
    if missing:
        remake = f"ltxpack materialize SOURCE {quoted(overlay)} --force"
        raise OverlayError(f"holds no {', '.join(missing)}", file=overlay, next=remake)
    for component in wanted:
        if component == TRANSFORMER and made is not None:
            for shard in made.plan.base.shards:
                yield component, shard, tuple(made.plan.entries(shard))
            continue
        bake = _bake(options, manifest) if component == TRANSFORMER else None
        for record in (manifest.components[component] if bake is None else bake).files:
            if record.path.endswith(ENDING):
                path = overlay / record.path
                if (size := regular_size(path)) != record.size:
                    raise changed_file(path, f"{record.size} bytes", f"{size} bytes")
                shard = BaseShard(record, read_tensorfile(path))
                infos = shard.file.tensors.values()
                yield component, shard, tuple(stored_tensor(info.name, info, path) for info in infos)


def _official_names(
    component: str, entries: Sequence[ShardEntry], options: ExportOptions
) -> list[tuple[TensorSpec, TensorSpec | None]]:
    """Every tensor as it is in the overlay and as it is in the file; None if that does not hold it."""
    table, found = CHECKPOINT_TABLES[component], list[tuple[TensorSpec, TensorSpec | None]]()
    back = table.reverse()
    for tensor in (tensor for entry in entries for tensor in entry.tensors):
        official = back.rename(tensor.name)
        if table.rename(official) != tensor.name:
            verify = f"ltxpack verify {quoted(options.overlay)}"
            raise OverlayError("has no official name", file=options.overlay, tensor=tensor.name, next=verify)
        wide = tensor.dtype == "BF16" and TABLE in official.rpartition(".")[2]
        wanted = options.parts == PARTS[0] or official.startswith(ROOT)
        spec = TensorSpec(official, "F32" if wide else tensor.dtype, tensor.shape)
        found.append((tensor, spec if wanted else None))
    return found


def _mark(spec: TensorSpec) -> dict[str, Any]:
    """What loaders of ComfyUI ask for to take codes for what they are (spec 09, sections 1 and 7)."""
    if spec.dtype == CODES[FP8]:
        return {"format": "float8_e4m3fn"}
    return {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": rotated_together(spec.shape[1])}


# Metadata


def _metadata(options: ExportOptions, manifest: Manifest, bake: Bake | None, reporter: Reporter) -> dict[str, str]:
    """The checkpoint's own, verbatim, and under our key what the file was made of. Raises OverlayError, SourceError."""
    overlay = options.overlay
    record = next((record for record in manifest.files if record.path == METADATA), None)
    if record is not None:
        where = overlay / METADATA
        kept = parse_json(recorded_bytes(overlay, record), where)
        if not isinstance(kept, dict) or not all(isinstance(value, str) for value in kept.values()):
            raise changed_file(where, "a JSON object of strings", type(kept).__name__)
    elif options.source is None:
        source = quoted(manifest.source.repo or "SOURCE")
        raise OverlayError(
            "was made by a version of ltxpack that did not keep the checkpoint's metadata, which an export needs",
            file=overlay,
            next=f"the same command with --source {source}",
        )
    else:
        kept = _metadata_of(options.source, manifest, reporter)
    if manifest.licence and not any(kept.get(key) for key in LICENCE_KEYS):
        raise SourceError(
            "has no licence text, which the checkpoint had and which is to be passed on with its weights",
            file=options.source or overlay,
            next="the same command with --source SOURCE, the folder, file or repo that has it",
        )
    return {**kept, MADE_FROM: json.dumps(_made_from(options, manifest, bake), sort_keys=True)}


def _metadata_of(source: str, manifest: Manifest, reporter: Reporter) -> dict[str, str]:
    """That of the checkpoint in ``source``, by its header. Raises SourceError for another one than the overlay's."""
    access = Access(reporter)
    folder, single = open_source_folder(source, None, access)
    checkpoint, *_ = [found for found in manifest.source.files if found.role == CHECKPOINT]
    named = folder.find(checkpoint.name)
    file = single or (named if isinstance(named, InputFile) else choose(CHECKPOINT, folder, access))
    if file.size != checkpoint.size:
        expected, found = f"{checkpoint.name}, {checkpoint.size} bytes", f"{file.size} bytes"
        raise SourceError("is not the checkpoint of this overlay", file=file.label, expected=expected, found=found)
    return dict(access.header(file).metadata)


def _made_from(options: ExportOptions, manifest: Manifest, bake: Bake | None) -> dict[str, Any]:
    changes = f"renamed and copied by ltxpack, {TABLE} tensors as float32 of their bfloat16 values"
    loras = [] if bake is None else [lora for lora in bake.loras if not lora.idle]
    changes += f", {len(loras)} LoRAs merged" if loras else ""
    changes += f", {len(bake.quantised)} linears quantised to {bake.format}" if bake and bake.quantised else ""
    found: dict[str, Any] = {
        "notice": f"This file is not the published one: {changes}.",
        "parts": options.parts,
        "source": [{"role": file.role, "name": file.name, "sha256": file.sha256} for file in manifest.source.files],
    }
    if bake is None:
        return found
    merged = [{"file": lora.file, "blake3": lora.blake3, "strength": lora.stated} for lora in bake.loras]
    found |= {"bake": options.bake, "loras": merged, "rule": bake.rule}
    if bake.quantised:
        found["format"] = bake.format
    if bake.format == FP8:
        calibration = bake.calibration
        found["calibration"] = calibration and {"name": calibration.name, "blake3": calibration.blake3}
    return found
