"""``verify --repair``: what is damaged is made again, from the source and from the clean base, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from ltxpack.errors import SourceError, quoted
from ltxpack.lora_bake.repair import repair_bake
from ltxpack.manifest import Manifest, read_manifest
from ltxpack.materialize import Options, fetched_plan
from ltxpack.repack.repair import repair
from ltxpack.repack.verify import Fault, damaged, damaged_items, verify
from ltxpack.reporter import Reporter


def restore(
    overlay: Path, reporter: Reporter, *, source: Options | None = None, loras: Sequence[Path] = ()
) -> list[Fault]:
    """Repair ``overlay`` and verify it again: the faults that are left (a stray file is never removed).

    ``source`` says where the checkpoint's files are, as for ``materialize``; None means the hub repo in the manifest.
    ``loras`` are the LoRA files of bakes that the overlay does not keep. Raises LtxpackError, among them SourceError
    if a file is needed and not at hand, OverlayError if what comes out is not what the manifest says.
    """
    faults = verify(overlay, reporter)
    manifest = read_manifest(overlay)
    paths = damaged(faults, manifest)
    if not paths:
        return faults
    of_bakes = {name: paths & {record.path for record in bake.files} for name, bake in manifest.bakes.items()}
    base = paths.difference(*of_bakes.values())
    if base:
        _restore_base(overlay, manifest, base, source, reporter)
    for name, wanted in of_bakes.items():
        if wanted:
            reporter.note(f"bakes/{name}: {len(wanted)} files")
            repair_bake(overlay, name, wanted, reporter, loras=loras)
    return verify(overlay, reporter)


def _restore_base(
    overlay: Path, manifest: Manifest, paths: Collection[str], source: Options | None, reporter: Reporter
) -> None:
    reporter.note(f"materialize: {len(paths)} files")
    options = source or _recorded_source(overlay, manifest, paths)
    options = dataclasses.replace(options, max_shard_size=manifest.source.max_shard_size)
    plan = fetched_plan(options, reporter)
    linked = any(record.link == "hard" for record in manifest.records())
    repair(damaged_items(list(plan.items()), paths), overlay, manifest, reporter, copy=not linked)


def _recorded_source(overlay: Path, manifest: Manifest, paths: Collection[str]) -> Options:
    recorded = manifest.source
    if recorded.repo is None:
        raise SourceError(
            "was made from local files; a repair needs to know where they are",
            file=overlay,
            items=sorted(paths),
            next=f"ltxpack verify {quoted(overlay)} --repair --source FOLDER",
        )
    return Options(recorded.repo, overlay, revision=recorded.revision)
