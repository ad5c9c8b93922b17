"""An overlay's weights as one safetensors file with the official names, for ComfyUI and the official code.

Tensors are renamed and copied; only the tables that official files keep in float32 are widened (spec 09, section 3).
The names come from the tables of the repacking, read backwards.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxpack.errors import OverlayError, UsageError, quoted
from ltxpack.files.publish import check_writable, fsync_folder, write_errors
from ltxpack.files.reader import Range, hash_file
from ltxpack.files.tensorfile import DTYPE_BITS, TensorInfo, read_json, read_tensorfile, regular_size
from ltxpack.ltx23.renames import CHECKPOINT_TABLES
from ltxpack.manifest import FileRecord, Manifest, changed_file, read_manifest
from ltxpack.materialize.plan import METADATA
from ltxpack.repack.items import Buffer, ShardEntry, TensorSpec, WriteShard, stored_tensor
from ltxpack.repack.lock import OverlayLock, real_target, refuse_links
from ltxpack.repack.write import preflight, write_shard
from ltxpack.reporter import Reporter

ENDING = ".safetensors"
# ``all``: the components of the checkpoint. ``transformer``: what is below one root there, connectors included.
PARTS = ("all", "transformer")
TRANSFORMER_ROOT = "model.diffusion_model."
# Official files hold these in float32, an overlay in bfloat16.
TABLE = "scale_shift_table"
# The metadata key of ours: what the file was made of.
MADE_FROM = "ltxpack"


@dataclass(frozen=True)
class ExportOptions:
    """What to write where. ``bake``: this bake instead of the base; ``force``: over a file that is there."""

    overlay: Path
    output: Path
    bake: str | None = None
    parts: str = PARTS[0]
    force: bool = False


@dataclass(frozen=True)
class ExportReport:
    """The file that was written; ``widened``: tensors stored in float32 though the overlay has bfloat16."""

    path: Path
    size: int
    blake3: str
    tensors: int
    widened: int


@dataclass(frozen=True, slots=True)
class Widened:
    """The bfloat16 values of ``source`` as float32, exactly."""

    source: Range

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The one range."""
        return (self.source,)

    def make(self, data: Iterator[memoryview]) -> Iterator[Buffer]:
        """The same values, twice as long."""
        import numpy as np

        for part in data:
            yield memoryview((np.frombuffer(part, "<u2").astype("<u4") << 16).view("u1").data)


def plan_export(options: ExportOptions) -> WriteShard:
    """The file, to the byte, from headers alone. Raises OverlayError for an overlay that cannot give it."""
    overlay, manifest = options.overlay, read_manifest(options.overlay)
    entries = [
        _entry(official, info, path)
        for component, files in _folders(options, manifest).items()
        for official, info, path in _tensors(component, files, overlay)
        if options.parts == PARTS[0] or official.startswith(TRANSFORMER_ROOT)
    ]
    # As safetensors orders them: every tensor is aligned to its elements.
    entries.sort(key=lambda entry: (-DTYPE_BITS[entry.tensors[0].dtype], entry.tensors[0].name))
    return WriteShard(options.output.name, tuple(entries), _metadata(options, manifest))


def export(options: ExportOptions, reporter: Reporter) -> ExportReport:
    """Write the file: whole, on the disk and read back, or not at all.

    Raises UsageError for an output that cannot be written or is there already, OverlayError as :func:`plan_export` and
    for a full disk, SourceError and FormatError for a shard that cannot be read.
    """
    output = _checked(options)
    folder = output.parent / f".{output.name[:200]}.ltxpack"
    refuse_links(folder)
    with OverlayLock(options.overlay, reporter, shared=True), OverlayLock(folder, reporter), _emptied(folder):
        item = plan_export(options)
        preflight([item], folder, copy=True)
        reporter.begin("writing", item.size, "B")
        record = write_shard(item, folder, reporter)
        reporter.begin("reading back", item.size, "B")
        _read_back(folder / item.path, item, record, reporter)
        reporter.end()
        with write_errors(output):
            (folder / item.path).replace(output)
            fsync_folder(output.parent)
    widened = sum(isinstance(entry.producer, Widened) for entry in item.entries)
    return ExportReport(options.output, item.size, record.blake3, len(item.entries), widened)


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """The file is made in ``folder``: what a killed export left there goes first, and the folder goes at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    with write_errors(folder):
        folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _checked(options: ExportOptions) -> Path:
    """Where the file goes, absolute. Raises UsageError for a place that is not to be written to."""
    output = options.output.absolute()
    if output.suffix != ENDING:
        raise UsageError(
            "is no name for a safetensors file", file=options.output, expected=f"a name ending in {ENDING}",
            next=f"choose -o {quoted(options.output.with_suffix(ENDING))}",
        )  # fmt: skip
    check_writable(output, "-o", f"ltx-2.3{ENDING}")
    overlay = real_target(options.overlay)
    if overlay in output.resolve().parents:
        raise UsageError("is inside the overlay", file=options.output, next="choose -o in another folder")
    if output.exists() and not options.force:
        raise UsageError("exists already", file=options.output, next="choose another -o, or add --force")
    return output


def _folders(options: ExportOptions, manifest: Manifest) -> dict[str, Sequence[FileRecord]]:
    """The files of each component of the checkpoint; those of the bake as the transformer's."""
    remake = f"ltxpack materialize SOURCE {quoted(options.overlay)} --force"
    wanted = CHECKPOINT_TABLES if options.parts == PARTS[0] else ("transformer", "connectors")
    missing = [component for component in wanted if component not in manifest.components]
    if missing:
        raise OverlayError(f"holds no {', '.join(missing)}", file=options.overlay, next=remake)
    files: dict[str, Sequence[FileRecord]]
    files = {component: manifest.components[component].files for component in wanted}
    if options.bake is not None:
        if options.bake not in manifest.bakes:
            known = ", ".join(manifest.bakes) or "no bake"
            raise UsageError(
                "no such bake", file=options.overlay, expected=known, found=options.bake, next="choose another --bake"
            )
        files["transformer"] = manifest.bakes[options.bake].files
    return files


def _tensors(component: str, files: Sequence[FileRecord], overlay: Path) -> Iterator[tuple[str, TensorInfo, Path]]:
    """Official name, place and file of every tensor of ``component``. Raises OverlayError for a file that changed."""
    table = CHECKPOINT_TABLES[component]
    back = table.reverse()
    for record in files:
        path = overlay / record.path
        if not record.path.endswith(ENDING):
            continue
        found = regular_size(path)
        if not record.is_symlink and found != record.size:
            raise changed_file(path, f"{record.size} bytes", f"{found} bytes")
        for name, info in read_tensorfile(path).tensors.items():
            official = back.rename(name)
            if table.rename(official) != name:
                raise OverlayError(
                    "has no official name", file=path, tensor=name, next=f"ltxpack verify {quoted(overlay)}"
                )
            yield official, info, path


def _entry(official: str, info: TensorInfo, path: Path) -> ShardEntry:
    if info.dtype != "BF16" or TABLE not in official.rpartition(".")[2]:
        return stored_tensor(official, info, path)
    return ShardEntry((TensorSpec(official, "F32", info.shape),), Widened(Range(path, info.start, info.nbytes)))


def _metadata(options: ExportOptions, manifest: Manifest) -> dict[str, str]:
    """The checkpoint's own, verbatim, and under our key what the file was made of."""
    overlay = options.overlay
    record = next((record for record in manifest.files if record.path == METADATA), None)
    if record is None:
        raise OverlayError(
            "was made by a version of ltxpack that did not keep the checkpoint's metadata, which an export needs",
            file=overlay,
            next=f"ltxpack materialize SOURCE {quoted(overlay)} --force",
        )
    path = overlay / METADATA
    digest = hash_file(path)
    if digest != record.blake3:
        raise changed_file(path, f"blake3 {record.blake3}", f"blake3 {digest}")
    kept = read_json(path)
    if not isinstance(kept, dict) or not all(isinstance(value, str) for value in kept.values()):
        raise changed_file(path, "a JSON object of strings", type(kept).__name__)
    return {**kept, MADE_FROM: json.dumps(_made_from(options, manifest), sort_keys=True)}


def _made_from(options: ExportOptions, manifest: Manifest) -> dict[str, Any]:
    changes = f"renamed and copied by ltxpack, {TABLE} tensors as float32 of their bfloat16 values"
    found: dict[str, Any] = {
        "notice": f"This file is not the published one: {changes}.",
        "parts": options.parts,
        "source": [{"role": file.role, "name": file.name, "sha256": file.sha256} for file in manifest.source.files],
    }
    if options.bake is not None:
        bake = manifest.bakes[options.bake]
        loras = [{"file": lora.file, "blake3": lora.blake3, "strength": lora.strength} for lora in bake.loras]
        found |= {"bake": options.bake, "loras": loras, "rule": bake.rule}
    return found


def _read_back(path: Path, item: WriteShard, record: FileRecord, reporter: Reporter) -> None:
    """Raises OverlayError if the disk does not give back what was written."""
    names = set(read_tensorfile(path).tensors)
    found = hash_file(path, reporter)
    if found != record.blake3 or names != {tensor.name for tensor in item.tensors}:
        raise OverlayError(
            "did not come back from the disk as it was written",
            file=path,
            expected=f"blake3 {record.blake3}",
            found=f"blake3 {found}",
            next="check the disk, then run this again",
        )
