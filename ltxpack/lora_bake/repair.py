"""Writes damaged files of a bake again, from the clean base and with the arithmetic the manifest names.

As in repack.repair: a file is written inside ``.ltxpack/``, compared with the manifest, then renamed to its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ltxpack.errors import DeviceError, OverlayError, SourceError, quoted
from ltxpack.files.publish import fsync_folder, write_failure
from ltxpack.lora_bake.adapter import adapter_files
from ltxpack.lora_bake.base import read_base, refuse_links
from ltxpack.lora_bake.job import Arithmetic, Job
from ltxpack.lora_bake.reading import hash_adapter
from ltxpack.lora_bake.report import AppliedLora, TargetStat
from ltxpack.lora_bake.resolve import Found
from ltxpack.manifest import Bake, BakedLora, FileRecord, Manifest, changed_file, read_manifest
from ltxpack.repack import repair as repack_repair
from ltxpack.repack.execute import preflight
from ltxpack.repack.lock import WORK_FOLDER, OverlayLock
from ltxpack.repack.staging import recover, remove_below
from ltxpack.repack.work import Item
from ltxpack.reporter import Reporter


def repair_bake(
    overlay: Path,
    name: str,
    damaged: Collection[str],
    reporter: Reporter,
    *,
    loras: Sequence[Path] = (),
    lock: OverlayLock | None = None,
) -> None:
    """Write ``damaged`` (paths in the overlay, see repack.verify) of the bake ``name`` again.

    ``loras``: files or PEFT folders of LoRAs that the overlay does not keep; known by content, not by name. Raises
    SourceError if one is missing, DeviceError if the bake was made on a device that is not here, OverlayError if the
    base has changed or what comes out is not what the manifest says.
    """
    from ltxpack.lora_bake.work import usable

    with contextlib.nullcontext(lock) if lock else OverlayLock(overlay) as held:
        recover(overlay, reporter)
        manifest = read_manifest(overlay)
        bake = manifest.bakes[name]
        arithmetic = Arithmetic(bake.rule, bake.kernel, bake.device)
        if not usable(arithmetic, bake.rule):
            raise DeviceError(f"the bake was made with {bake.kernel} on {bake.device}, which is not here", file=name)
        job = _job(overlay, manifest, name, bake, loras)
        wanted = set(damaged)
        plain: tuple[Item, ...] = (*job.small, *job.links)
        small = [item for item in plain if item.path in wanted]
        reports = {item.path for item in job.longest_reports(arithmetic)} & wanted
        shards = {rewrite.item.path for rewrite in job.rewrites} & wanted
        if shards or reports:
            stats = _shards(job, arithmetic, bake, wanted, bool(reports), reporter)
            small += [item for item in job.reports(arithmetic, stats) if item.path in reports] if reports else []
        if small:
            repack_repair.repair(small, overlay, manifest, reporter, lock=held)


def _job(overlay: Path, manifest: Manifest, name: str, bake: Bake, loras: Sequence[Path]) -> Job:
    base = read_base(overlay, manifest)
    known = {lora.file.blake3: overlay / lora.file.path for lora in manifest.loras}
    wanted = [lora.blake3 for lora in bake.loras]
    given = {path: hash_adapter(*adapter_files(path)) for path in loras}
    for path, digest in given.items():
        known.setdefault(digest, path)
    missing = {lora.blake3: lora for lora in bake.loras if lora.blake3 not in known}
    if missing:
        raise _missing(overlay, manifest, name, list(missing.values()), given)
    applied = []
    for lora, digest in zip(bake.loras, wanted, strict=True):
        adapter = Found(lora.name, known[digest]).adapter(base.shapes, allow_unmatched=True)
        for kept in (kept for kept in manifest.loras if kept.file.blake3 == digest):
            if hash_adapter(adapter.path, adapter.config) != digest:
                raise changed_file(overlay / kept.file.path, f"blake3 {digest}", "other content")
        applied.append(AppliedLora(lora, adapter))
    return Job(name, tuple(applied), bake.rule, base, overlay)


def _missing(
    overlay: Path, manifest: Manifest, name: str, missing: Sequence[BakedLora], given: Mapping[Path, str]
) -> SourceError:
    """The error for LoRAs that are not at hand; a file given that no bake was made from is named beside them."""
    used = {lora.blake3 for bake in manifest.bakes.values() for lora in bake.loras}
    others = [f"{path} (blake3 {digest[:8]})" for path, digest in given.items() if digest not in used]
    problem = f"the LoRA of the bake {name} is needed to repair it"
    # Those that are right are typed again: without them the next command would miss them instead.
    flags = [f"--lora {quoted(path)}" for path, digest in given.items() if digest in used]
    return SourceError(
        f"{problem}, and a file given does not match" if others else problem,
        file=overlay,
        expected=", ".join(f"{lora.file} (blake3 {lora.blake3[:8]})" for lora in missing) if others else None,
        found=", ".join(others) if others else None,
        items=[f"{lora.file} (blake3 {lora.blake3})" for lora in missing],
        next=" ".join([f"ltxpack verify {quoted(overlay)} --repair", *flags, *["--lora FILE"] * len(missing)]),
    )


def _shards(
    job: Job, arithmetic: Arithmetic, bake: Bake, wanted: set[str], all_of_them: bool, reporter: Reporter
) -> list[TargetStat]:
    """Fuse the wanted shards again (all, if the reports need their figures); what was measured."""
    from ltxpack.lora_bake.factors import FactorReader
    from ltxpack.lora_bake.stream import Engine, Output
    from ltxpack.lora_bake.work import strengths_of

    records = {record.path: record for record in bake.files}
    rewrites = [rewrite for rewrite in job.rewrites if all_of_them or rewrite.item.path in wanted]
    root = job.overlay / WORK_FOLDER / "repair"
    refuse_links(job.overlay, [root, job.overlay / "bakes", job.overlay / job.folder])
    largest = sorted((rewrite.item for rewrite in rewrites), key=lambda item: item.size)[-1:]
    preflight(largest, job.overlay, copy=False)
    stats: list[TargetStat] = []
    reporter.begin(f"repair {job.name}", sum(rewrite.item.size for rewrite in rewrites), "B")
    try:
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(FactorReader(lora.adapter)) for lora in job.loras]
            engine = stack.enter_context(Engine(job.overlay, readers, arithmetic, reporter))
            for rewrite in rewrites:
                output = Output(rewrite.item, root, job.touched, strengths_of(job))
                [made] = engine.fuse_shard(rewrite.shard, [output])
                _place(job, root, made, records[made.path], made.path in wanted)
                stats += output.stats.values()
    finally:
        remove_below(root)
        with contextlib.suppress(OSError):
            root.parent.rmdir()
    reporter.end()
    return stats


def _place(job: Job, root: Path, made: FileRecord, record: FileRecord, damaged: bool) -> None:
    """Put a shard in its place if what is there is damaged; refuse one that is not what the manifest says."""
    target = job.overlay / made.path
    if made != record:
        raise OverlayError(
            "cannot be repaired: the arithmetic of this machine gives other bytes",
            file=target,
            expected=f"blake3 {record.blake3}",
            found=f"blake3 {made.blake3}",
            next=f"ltxpack bake-lora {quoted(job.overlay)} --force makes the bake anew",
        )
    try:
        if damaged:
            target.parent.mkdir(parents=True, exist_ok=True)
            (root / made.path).replace(target)
            fsync_folder(target.parent)
        else:
            (root / made.path).unlink()
    except OSError as error:
        raise write_failure(error, target) from None
