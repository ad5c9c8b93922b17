"""From vendor checkpoints to an overlay: understand the inputs, plan every file, fetch, write, publish.

The commands call ``plan_overlay`` and ``materialize``. Nothing here imports torch or diffusers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ltxpack.errors import OverlayError, listed
from ltxpack.files.publish import require_space
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import read_tensorfile
from ltxpack.files.units import human_bytes
from ltxpack.ltx23.releases import TEXT_ENCODER
from ltxpack.manifest import Manifest, is_overlay, read_manifest
from ltxpack.materialize.access import Access
from ltxpack.materialize.checkpoint import STORED_DTYPE, merged_loras
from ltxpack.materialize.existing import differences, restore_base
from ltxpack.materialize.hub.client import Hub
from ltxpack.materialize.inputs import Inputs, read_inputs
from ltxpack.materialize.inspect import inspect_path
from ltxpack.materialize.plan import METADATA, OverlayPlan, make_plan
from ltxpack.materialize.sources import FLAGS, resolve
from ltxpack.repack.items import DEFAULT_MAX_SHARD_SIZE, CopyFile, Item, fingerprint
from ltxpack.repack.lock import OverlayLock
from ltxpack.repack.staging import Staging, find_place, recover, refuse_foreign, unfinished
from ltxpack.repack.write import execute
from ltxpack.reporter import Reporter

__all__ = ["Options", "OverlayPlan", "Report", "inspect_path", "materialize", "plan_overlay", "restore_base"]

BLOCK = 64 * 1024
# Sound weights have shorter stretches of zeros: biases, the rows of unused tokens.
LONG = 1024 * 1024
_PROBE, _ZEROS = bytes(64), bytes(BLOCK)


@dataclass(frozen=True)
class Options:
    """The arguments of the command line, named like the flags. ``source`` is a repo id, a folder or a file."""

    source: str
    overlay: Path
    checkpoint: str | None = None
    lora: str | None = None
    upsampler: str | None = None
    text_encoder: str | None = None
    part: tuple[str, ...] = ()
    revision: str | None = None
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE
    copy: bool = False
    force: bool = False


@dataclass(frozen=True)
class Report:
    """The result. ``written`` is False if the overlay existed already."""

    manifest: Manifest
    total_bytes: int
    written: bool


def plan_overlay(options: Options, reporter: Reporter) -> OverlayPlan:
    """The plan alone, from headers. The plan lists absent inputs as missing; only the checkpoint must be there.

    Raises LtxpackError for inputs that are ambiguous, broken or not convertible, and for a target that is not ours.
    """
    refuse_foreign(options.overlay)
    if is_overlay(options.overlay) and not options.force:
        reporter.note(f"{options.overlay}: is there already; nothing is written if it was made from the same inputs")
    inputs = _read(options, Access(reporter), reporter, allow_missing=True)
    return make_plan(inputs, options.max_shard_size, options.copy)


def materialize(options: Options, reporter: Reporter, hub: Hub | None = None) -> Report:
    """Write the overlay, unless it exists already from the same inputs.

    The target is checked first, then the headers of all inputs; large files are fetched after that. A call that was
    killed at any point can be made again and goes on. Raises LtxpackError.
    """
    refuse_foreign(options.overlay)
    access = Access(reporter, hub)
    inputs = _read(options, access, reporter)
    with OverlayLock(options.overlay, reporter) as lock:
        recover(options.overlay, reporter)
        plan = make_plan(inputs, options.max_shard_size, options.copy)
        done = _done_already(plan, options, reporter)
        if done is not None:
            return done
        items = list(plan.items())
        find_place(options.overlay)
        _fetch(inputs, items, options, access, reporter)
        mark = fingerprint(items, {"copy": options.copy})
        zeros = ZeroStretches()
        with Staging(lock, mark, reporter, force=options.force) as staging:
            records = execute(items, staging, copy=options.copy, reporter=reporter, watch=zeros.watch)
            access.refuse_changed()
            _tell_zeros(zeros, reporter)
            manifest = plan.manifest({record.path: record for record in records})
            staging.publish(manifest)
    return Report(manifest, sum(item.size for item in items), written=True)


def _fetch(inputs: Inputs, items: Sequence[Item], options: Options, access: Access, reporter: Reporter) -> None:
    """Fetch every input, after a check that the disk has room for the repacked files. Raises LtxpackError."""
    remote = [file for _, file in inputs.files() if file.repo]
    repacked = [item.size for item in items if not isinstance(item, CopyFile)]
    if remote and not unfinished(options.overlay):  # the writer checks for unfinished work itself
        require_space(options.overlay, sum(repacked), len(repacked))
    if remote:
        total = human_bytes(sum(file.size for file in remote))
        reporter.note(f"from the hub: {len(remote)} files, {total}, less those in the hub cache already")
    for file in remote:
        access.fetch(file)
    copied = sum(item.size for item in items) - sum(repacked)
    how = "copy" if options.copy else "link where the filesystem can, else to copy"
    reporter.note(f"to write: {human_bytes(sum(repacked))}; to {how}: {human_bytes(copied)}")


def _tell_zeros(zeros: ZeroStretches, reporter: Reporter) -> None:
    """Warn of files with long stretches of zeros in their weights, as an unfinished download leaves them."""
    for path, stretches in itertools.groupby(zeros.long(), lambda stretch: stretch.path):
        found = list(stretches)
        names = [
            info.name
            for info in read_tensorfile(path).tensors.values()
            if any(info.start < part.start + part.nbytes and part.start < info.start + info.nbytes for part in found)
        ]
        amount = human_bytes(sum(part.nbytes for part in found))
        reporter.warn(
            f"{path}: {amount} of its weights are zeros, from byte {found[0].start} on ({listed(names, 3)}): perhaps"
            " a download that did not finish. Compare its hash with the published one, or fetch it again"
        )


class ZeroStretches:
    """The blocks of zeros in the bytes that pass :meth:`watch`, by file.

    The check costs some microseconds for 4 MB: it compares a whole block only if the block begins with zeros.
    """

    def __init__(self) -> None:
        self._blocks: dict[Path, list[tuple[int, int]]] = {}

    def watch(self, ranges: Sequence[Range], data: Iterable[memoryview]) -> Iterator[memoryview]:
        """Pass on ``data``, the bytes of ``ranges`` in order, and note its blocks of zeros."""
        for (path, start, _), view in zip(ranges, data, strict=True):
            for at in range(0, len(view), BLOCK):
                if view[at]:
                    continue
                block = view[at : at + BLOCK]
                if block[: len(_PROBE)] == _PROBE[: len(block)] and bytes(block) == _ZEROS[: len(block)]:
                    self._blocks.setdefault(path, []).append((start + at, start + at + len(block)))
            yield view

    def long(self) -> Iterator[Range]:
        """The stretches of at least ``LONG`` bytes, with adjacent blocks joined."""
        for path, blocks in self._blocks.items():
            start = end = -1
            for first, last in [*sorted(blocks), (-1, -1)]:
                if first < 0 or first > end:
                    if end - start >= LONG:
                        yield Range(path, start, end - start)
                    start = first
                end = max(end, last)


def _done_already(plan: OverlayPlan, options: Options, reporter: Reporter) -> Report | None:
    """The report if the overlay exists, made from these inputs; None if there is none, or with ``force``.

    Raises OverlayError for another overlay, or one whose manifest cannot be read.
    """
    if not is_overlay(options.overlay):
        return None
    if options.force:
        with contextlib.suppress(OverlayError):
            bakes = [folder.removeprefix("bakes/") for folder in read_manifest(options.overlay).baked]
            if bakes:  # they come from the transformer that is being replaced
                names = ", ".join(bakes)
                reporter.warn(f"{options.overlay}: is replaced and loses its bakes ({names}); bake them again")
        return None
    manifest = read_manifest(options.overlay)
    other = next(differences(plan, manifest, options.overlay), None)
    if other is not None:
        again = "the same command with --force replaces it"
        raise OverlayError(f"holds another overlay: {other}", file=options.overlay, next=again)
    if plan.unproven:
        reporter.note(
            f"{len(plan.unproven)} local files were compared with the overlay by name, size and a sample of every"
            " tensor, not byte by byte; --force makes the overlay again"
        )
    if METADATA not in {record.path for record in manifest.files}:
        reporter.note(f"an earlier version made the overlay, without {METADATA}, which exports need; --force adds it")
    return Report(manifest, sum(item.size for item in plan.items()), written=False)


def _read(options: Options, access: Access, reporter: Reporter, allow_missing: bool = False) -> Inputs:
    """The inputs. Notes say which files and releases they are, and what will differ from the source."""
    flags = {role: getattr(options, role) for role in FLAGS}
    parts, revision = options.part, options.revision
    found = resolve(options.source, flags, access, parts=parts, revision=revision, allow_missing=allow_missing)
    inputs = read_inputs(found, access)
    for role, file in inputs.files():
        release = file.known.release
        if role != TEXT_ENCODER:
            reporter.note(f"{role}: {file.label}" + (f" (release {release.name})" if release else ""))
        if file.known.warning:
            reporter.warn(file.known.warning)
    if inputs.sources.text_encoder is not None:
        reporter.note(f"text encoder: {inputs.sources.text_encoder.label}")
    checkpoint, base = inputs.checkpoint, inputs.sources.checkpoint[0].input
    if merged := merged_loras(checkpoint.file):
        told = f"{base.label} is an export with LoRAs merged into it ({', '.join(merged)})"
        reporter.warn(f"{told}: the base and all bakes of this overlay have them")
    if inputs.text_encoder and inputs.text_encoder.tensors:
        reporter.note("text encoder: is written again, in BF16 and under the published names")
    if doubled := checkpoint.doubled:
        reporter.warn(f"two files of the checkpoint hold {listed(doubled, 1)}: the overlay takes the first file's")
    cast = sum(info.dtype != STORED_DTYPE for tensors in checkpoint.tensors.values() for info in tensors.values())
    if cast:
        reporter.detail(f"{cast} tensors that are not BF16 in the checkpoint are stored as BF16")
    if checkpoint.dropped:
        reporter.detail(f"left out, because no module reads them: {', '.join(checkpoint.dropped)}")
    by = inputs.distilled_by or ("hash" if base.known.release else "file name")
    kind = "distilled, for the recipe distilled; bake no distilled LoRA into it" if inputs.distilled_by else "full"
    reporter.note(f"kind of transformer, by its {by}: {kind}")
    for note in inputs.lora.notes if inputs.lora else ():
        reporter.note(f"lora: {note}")
    for warning in inputs.lora.warnings if inputs.lora else ():
        reporter.warn(f"lora: {warning}")
    return inputs
