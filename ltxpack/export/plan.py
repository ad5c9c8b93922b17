"""The plan of an exported file, exact to the byte, made before any byte is written (spec 09, section 3).

Tensors have their official names, from the tables of the repacking read backwards, in the order of safetensors. The
transformer's weights are copied from the base or a bake, or come from a bake that is made on the way.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ltxpack.errors import OverlayError, SourceError, UsageError, quoted
from ltxpack.files.tensorfile import DTYPE_BITS, build_header, parse_json
from ltxpack.lora_bake.bake import UnwrittenBake, plan_unwritten
from ltxpack.lora_bake.plan import CONNECTORS, TRANSFORMER, BakeOptions, BaseShard
from ltxpack.ltx23.codes import CODES, rotated_together
from ltxpack.ltx23.forms import FP8_FORMAT, INT8_FORMAT, MADE_FROM, MARKER, PARTS, QUANTISATION, ROOT
from ltxpack.ltx23.releases import CHECKPOINT
from ltxpack.ltx23.renames import CHECKPOINT_TABLES
from ltxpack.manifest import BF16, DISTILLED_KIND, FP8, Bake, Manifest, changed_file, read_manifest, recorded_bytes
from ltxpack.materialize.access import Access, InputFile
from ltxpack.materialize.checkpoint import stated_loras
from ltxpack.materialize.plan import METADATA
from ltxpack.materialize.sources import choose, open_source_folder
from ltxpack.repack.items import ShardEntry, TensorSpec, stored_tensor
from ltxpack.reporter import Reporter

ENDING = ".safetensors"
HEADER = "its header"
# Official files hold these in float32, an overlay in bfloat16.
TABLE = "scale_shift_table"
LICENCE_KEYS = ("license", "licence")
# Rises when the same inputs give other bytes than before.
EXPORT_VERSION = 1


@dataclass(frozen=True)
class ExportOptions:
    """The options: export the base, the bake ``bake``, or the bake that ``make`` describes, made on the way.

    ``form``: the form that the bake must have, None for any. ``source``: a file, folder or repo with the checkpoint's
    metadata, for an overlay that does not keep it. ``force``: replace an existing file.
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
class Unit:
    """A file of the overlay that one pass reads, and the ``entries`` made from it.

    ``tensors``: theirs in order, each as the overlay stores it and as the file does, None if the file leaves it out.
    """

    shard: BaseShard
    entries: tuple[ShardEntry, ...]
    tensors: tuple[tuple[TensorSpec, TensorSpec | None], ...]

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored, _ in self.tensors)

    @property
    def exported(self) -> dict[str, TensorSpec]:
        """Its tensors in the exported file, by their names there."""
        return {spec.name: spec for _, spec in self.tensors if spec is not None}


@dataclass(frozen=True)
class ExportPlan:
    """The file: the ``spans`` (offset, bytes) of header and tensors, small ``literals``, and the ``units`` of the rest.

    ``bake``: the transformer's bake, None for the base. ``made``: that bake if it is made on the way.
    """

    header: bytes
    spans: Mapping[str, tuple[int, int]]
    literals: Mapping[str, bytes]
    units: tuple[Unit, ...]
    bake: Bake | None
    made: UnwrittenBake | None

    @property
    def size(self) -> int:
        return sum(nbytes for _, nbytes in self.spans.values())

    @property
    def tensors(self) -> int:
        return len(self.spans) - 1

    @property
    def widened(self) -> int:
        """The number of tables that are bfloat16 in the overlay and float32 in the file."""
        pairs = (pair for unit in self.units for pair in unit.tensors)
        return sum(spec is not None and spec.dtype != stored.dtype for stored, spec in pairs)

    @property
    def form(self) -> str:
        return BF16 if self.bake is None else self.bake.format

    @property
    def quantised(self) -> int:
        return 0 if self.bake is None else len(self.bake.quantised)

    def fingerprint(self) -> str:
        """Identifies this plan's inputs."""
        inputs: list[Any] = [EXPORT_VERSION, [dataclasses.astuple(unit.shard.record) for unit in self.units]]
        if self.made is not None:
            inputs += [self.made.plan.fingerprint(), dataclasses.asdict(self.made.arithmetic)]
        return blake3(self.header + json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def plan_export(options: ExportOptions, reporter: Reporter, *, headers_only: bool = False) -> ExportPlan:
    """The plan of the file. With ``headers_only`` it reads only the headers of LoRAs on the hub.

    Raises OverlayError for an overlay that lacks a part, UsageError for an unknown bake, and the errors of a bake
    before it writes.
    """
    manifest = read_manifest(options.overlay)
    made = None
    if options.make is not None:  # the name of this bake is never seen
        make = dataclasses.replace(options.make, name="export", force=options.force, export=_flags(options))
        made = plan_unwritten(make, reporter, headers_only=headers_only)
    bake = made.plan.stated if made is not None else _bake(options, manifest)
    units = tuple(_units(options, manifest, bake, made))
    tensors = [spec for unit in units for spec in unit.exported.values()]
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
    spans = {HEADER: (0, len(header))}
    end = len(header)
    for spec in tensors:
        spans[spec.name] = (end, spec.nbytes)
        end += spec.nbytes
    return ExportPlan(header, spans, literals, units, bake, made)


def _flags(options: ExportOptions) -> str:
    parts = [] if options.parts == PARTS[0] else [f"--parts {options.parts}"]
    source = [] if options.source is None else [f"--source {quoted(options.source)}"]
    return " ".join([f"-o {quoted(options.output)}", *parts, *source])


# The sources of the bytes


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


def _units(options: ExportOptions, manifest: Manifest, bake: Bake | None, made: UnwrittenBake | None) -> Iterator[Unit]:
    """Every file with weights."""
    overlay = options.overlay
    wanted = CHECKPOINT_TABLES if options.parts == PARTS[0] else (TRANSFORMER, CONNECTORS)
    if missing := [component for component in wanted if component not in manifest.components]:
        remake = f"ltxpack materialize SOURCE {quoted(overlay)} --force"
        raise OverlayError(f"holds no {', '.join(missing)}", file=overlay, next=remake)
    for component in wanted:
        if component == TRANSFORMER and made is not None:
            for shard in made.plan.base.shards:
                yield _unit(component, shard, made.plan.entries(shard), options)
            continue
        own = bake if component == TRANSFORMER else None
        for record in (own or manifest.components[component]).files:
            if record.path.endswith(ENDING):
                shard = BaseShard.open(overlay, record)
                entries = (stored_tensor(*item, shard.file.path) for item in shard.file.tensors.items())
                yield _unit(component, shard, entries, options)


def _unit(component: str, shard: BaseShard, entries: Iterable[ShardEntry], options: ExportOptions) -> Unit:
    table, found = CHECKPOINT_TABLES[component], list[tuple[TensorSpec, TensorSpec | None]]()
    back, entries = table.reverse(), tuple(entries)
    for tensor in (tensor for entry in entries for tensor in entry.tensors):
        official = back.rename(tensor.name)
        if table.rename(official) != tensor.name:
            verify = f"ltxpack verify {quoted(options.overlay)}"
            raise OverlayError("has no official name", file=options.overlay, tensor=tensor.name, next=verify)
        wide = tensor.dtype == "BF16" and TABLE in official.rpartition(".")[2]
        wanted = options.parts == PARTS[0] or official.startswith(ROOT)
        spec = TensorSpec(official, "F32" if wide else tensor.dtype, tensor.shape)
        found.append((tensor, spec if wanted else None))
    return Unit(shard, entries, tuple(found))


def _mark(spec: TensorSpec) -> dict[str, Any]:
    """The mark by which ComfyUI's loaders recognise codes (spec 09, sections 1 and 7)."""
    if spec.dtype == CODES[FP8]:
        return {"format": FP8_FORMAT}
    return {"format": INT8_FORMAT, "convrot": True, "convrot_groupsize": rotated_together(spec.shape[1])}


# Metadata


def _metadata(options: ExportOptions, manifest: Manifest, bake: Bake | None, reporter: Reporter) -> dict[str, str]:
    """The checkpoint's metadata, verbatim, and the sources of this file. Raises OverlayError or SourceError."""
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
    # A file that was made from codes may still speak of them.
    kept = {key: value for key, value in kept.items() if key != QUANTISATION}
    return {**kept, MADE_FROM: json.dumps(_made_from(options, manifest, bake, stated_loras(kept)), sort_keys=True)}


def _metadata_of(source: str, manifest: Manifest, reporter: Reporter) -> dict[str, str]:
    """The metadata of the checkpoint in ``source``. Raises SourceError if it is not the overlay's checkpoint."""
    access = Access(reporter)
    folder, single = open_source_folder(source, None, access)
    checkpoint = next((found for found in manifest.source.files if found.role == CHECKPOINT), None)
    if checkpoint is None:
        remake = "ltxpack materialize SOURCE OVERLAY --force"
        raise OverlayError("the overlay does not record which checkpoint it was made from", next=remake)
    named = folder.find(checkpoint.name)
    file = single or (named if isinstance(named, InputFile) else choose(CHECKPOINT, folder, access))
    if file.size != checkpoint.size:
        expected, found = f"{checkpoint.name}, {checkpoint.size} bytes", f"{file.size} bytes"
        raise SourceError("is not the checkpoint of this overlay", file=file.label, expected=expected, found=found)
    return dict(access.header(file).metadata)


def _made_from(
    options: ExportOptions, manifest: Manifest, bake: Bake | None, before: list[dict[str, Any]]
) -> dict[str, Any]:
    """``before``: the entries of the LoRAs that were in the checkpoint already, an export too."""
    changes = f"renamed and copied by ltxpack, {TABLE} tensors as float32 of their bfloat16 values"
    loras = [] if bake is None else [lora for lora in bake.loras if not lora.idle]
    count = len(before) + len(loras)
    changes += f", {count} LoRA{'s' * (count > 1)} merged" if count else ""
    changes += f", {len(bake.quantised)} linears quantised to {bake.format}" if bake and bake.quantised else ""
    found: dict[str, Any] = {
        "notice": f"This file is not the published one: {changes}.",
        "parts": options.parts,
        "source": [{"role": file.role, "name": file.name, "sha256": file.sha256} for file in manifest.source.files],
    }
    found |= {"loras": before} if before else {}
    found |= {"kind": DISTILLED_KIND} if manifest.distilled else {}
    if bake is None:
        return found
    merged = [{"file": lora.file, "blake3": lora.blake3, "strength": lora.stated} for lora in bake.loras]
    found |= {"bake": options.bake, "loras": [*before, *merged], "rule": bake.rule}
    if bake.quantised:
        found["format"] = bake.format
    if bake.format == FP8:
        calibration = bake.calibration
        found["calibration"] = calibration and {"name": calibration.name, "blake3": calibration.blake3}
    return found
