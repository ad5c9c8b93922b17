"""Whether an overlay that is there already is the one a plan would write, without reading either whole.

Names, sizes and what the sources are known by must agree; where that is no more than a name (a local file), a
sample of its bytes is held against what the overlay stores of them. A retrained file of the same size and name
differs in every tensor, so the sample finds it; what the sample cannot find is damage, and that is verify's task.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from blake3 import blake3

from ltxpack.manifest import Manifest
from ltxpack.materialize.plan import OverlayPlan
from ltxpack.repack.work import CopyFile, Item, WriteBytes, WriteShard

SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 512

T = TypeVar("T")


class Sample(NamedTuple):
    """The same bytes in a source and in the overlay."""

    source: Path
    source_start: int
    written: Path
    written_start: int
    nbytes: int


def difference(plan: OverlayPlan, manifest: Manifest, overlay: Path) -> str | None:
    """What is other in ``overlay`` than the plan says, in words; None if it is the same."""
    return next(_differences(plan, manifest, overlay), None)


def _differences(plan: OverlayPlan, manifest: Manifest, overlay: Path) -> Iterator[str]:
    """Cheap ones first; each is only looked for when there was none before."""
    if manifest.source != plan.source:
        yield _source_difference(plan, manifest)
    planned = {item.path: item for item in plan.items()}
    bakes = {record.path for bake in manifest.bakes.values() for record in bake.files}
    records = {record.path: record for record in manifest.records() if record.path not in bakes}
    for path in sorted(planned.keys() ^ records.keys()):
        yield f"{path} {'would be new' if path in planned else 'would go'}"
    for path, item in planned.items():
        if records[path].size != item.size:
            yield f"{path} has {records[path].size} bytes instead of {item.size}"
        if isinstance(item, WriteBytes) and blake3(item.data).hexdigest() != records[path].blake3:
            yield f"{path} would have other content"
        if plan.copy and records[path].link is not None:
            yield f"{path} is a link, and copies are asked for"
        if not _is_there(overlay / path, item.size):
            yield f"{path} was changed or removed"
    for item in planned.values():
        if not all(_same(sample) for sample in _samples(item, overlay) if sample.source in plan.unproven):
            yield f"{item.path} was made from another file of the same name and size"


def _source_difference(plan: OverlayPlan, manifest: Manifest) -> str:
    """The first input that differs."""
    before = {(file.role, file.name): file for file in manifest.source.files}
    for file in plan.source.files:
        if before.get((file.role, file.name)) != file:
            return f"it was made from another {file.role.replace('_', ' ')} than {file.name}"
    return "it was made from other inputs"


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.lstat().st_size == size
    except OSError:
        return False


def _samples(item: Item, overlay: Path) -> Iterator[Sample]:
    written = overlay / item.path
    if isinstance(item, CopyFile):
        for position in range(SAMPLES_PER_FILE):
            start = max(0, item.size - SAMPLE_BYTES) * position // (SAMPLES_PER_FILE - 1)
            yield Sample(item.source, start, written, start, min(SAMPLE_BYTES, item.size))
    elif isinstance(item, WriteShard):
        offset = len(item.header)
        places = []
        for part in item.pieces:
            if not part.is_cast:
                middle = part.nbytes // 2 if part.nbytes > 2 * SAMPLE_BYTES else 0
                nbytes = min(SAMPLE_BYTES, part.nbytes)
                places.append(Sample(part.source, part.start + middle, written, offset + middle, nbytes))
            offset += part.size
        yield from _spread(places)


def _spread(places: Sequence[T]) -> list[T]:
    """At most SAMPLES_PER_FILE of ``places``, evenly spread."""
    count = min(SAMPLES_PER_FILE, len(places))
    return [places[position * len(places) // count] for position in range(count)]


def _same(sample: Sample) -> bool:
    try:
        with sample.source.open("rb") as source, sample.written.open("rb") as written:
            if os.path.sameopenfile(source.fileno(), written.fileno()):
                return True
            source.seek(sample.source_start)
            written.seek(sample.written_start)
            return source.read(sample.nbytes) == written.read(sample.nbytes)
    except OSError:
        return False
