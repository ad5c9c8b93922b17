"""Compares every byte of an overlay with its manifest, and writes damaged files again from their plan.

It lists all faults, not only the first. It reads one file after the other at disk speed, in a few buffers.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ltxpack.errors import LtxpackError, OverlayError, listed
from ltxpack.files.foreign import LOST_AND_FOUND, is_foreign
from ltxpack.files.publish import atomic_write, fsync_folder, move_file, write_errors
from ltxpack.files.reader import hash_file
from ltxpack.files.tensorfile import read_index, read_tensorfile
from ltxpack.manifest import MANIFEST_NAME, FileRecord, Manifest, checked_bytes, read_manifest
from ltxpack.repack.items import INDEX_ENDING, Item
from ltxpack.repack.lock import WORK_FOLDER, OverlayLock, refuse_links
from ltxpack.repack.staging import folder_of, recover, remove_below, staging_bases, unfinished
from ltxpack.repack.write import preflight, write_item
from ltxpack.reporter import Reporter

# Where a repair writes files before they come into their places.
REPAIR_FOLDER = f"{WORK_FOLDER}/repair"
# The problem of a file that someone else put into the overlay, which no repair touches.
NOT_OURS = "is not in the manifest"


@dataclass(frozen=True)
class Fault:
    """One difference from the manifest. ``path`` is relative to the overlay."""

    path: str
    problem: str
    expected: str | None = None
    found: str | None = None

    @classmethod
    def of(cls, path: str, error: LtxpackError) -> Fault:
        """The fault of a file that ``error`` says is unreadable."""
        expected, found = (None if value is None else str(value) for value in (error.expected, error.found))
        return cls(path, error.problem, expected, found)


def verify(overlay: Path, reporter: Reporter) -> list[Fault]:
    """All faults of ``overlay``, by path; empty if it is unchanged. Raises OverlayError without a manifest.

    Unfinished work beside or inside it is no fault; ``reporter`` gets a note. Other processes may read the overlay
    meanwhile, but not write it: raises OverlayError if one does.
    """
    with OverlayLock(overlay, reporter, shared=True):
        manifest = read_manifest(overlay)
        records = {record.path: record for record in manifest.records()}
        begun = unfinished(overlay)
        for path in begun:
            reporter.note(f"{path}: unfinished work; run the command that began it again to finish it")
        # A Path raises where it may not look.
        read = [record for record in records.values() if not os.path.islink(overlay / record.path)]  # noqa: PTH114
        reporter.begin("verifying", sum(record.size for record in read), "B")
        faults = [fault for record in records.values() for fault in _file_faults(record, records, overlay, reporter)]
        reporter.end()
        # A bake whose publishing was killed may be in its place already without a name in the manifest.
        staged = {folder for folder in map(folder_of, begun) if folder is not None}
        strays = list(_strays(overlay, records, staged - manifest.baked.keys()))
        faults += [Fault(path, NOT_OURS) for path in strays if not is_foreign(path)]
        if foreign := sorted(filter(is_foreign, strays)):
            reporter.note(f"not the overlay's, and no damage: {listed(foreign)}")
        bad = {fault.path for fault in faults}
        bad |= {record.path for record in records.values() if _goal(record) in bad}
        # Folders whose shards together make one model: those of components and bakes, not ``loras``.
        models = [*(part.files for part in manifest.components.values()), *(b.files for b in manifest.baked.values())]
        for folder in sorted({posixpath.dirname(record.path) for files in models for record in files}):
            faults += _folder_faults(overlay, folder, records, bad)
        return sorted(faults, key=lambda fault: (fault.path, fault.problem))


def damaged(faults: Iterable[Fault], manifest: Manifest) -> frozenset[str]:
    """The paths to write again; stray files are not among them."""
    return frozenset(fault.path for fault in faults) & {record.path for record in manifest.records()}


def _file_faults(
    record: FileRecord, records: Mapping[str, FileRecord], overlay: Path, reporter: Reporter
) -> Iterator[Fault]:
    """A file with the right content in a link's place is no fault: copies of an overlay have them."""
    path = overlay / record.path
    links = [parent for parent in Path(record.path).parents if parent.name and (overlay / parent).is_symlink()]
    if links:
        yield Fault(record.path, "is in a folder that was replaced by a link", found=str(links[-1]))
        return
    try:
        status = path.lstat()
    except OSError as error:
        yield Fault(record.path, "is missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}")
        return
    is_link = stat.S_ISLNK(status.st_mode)
    # A copy of an overlay does not share the bytes of the source.
    shared = record.link == "hard" and status.st_nlink > 1
    cause = ": the source file it is hard-linked to was changed" if shared else ""
    if is_link and record.is_symlink:
        yield from _link_faults(record, records, os.readlink(path))  # noqa: PTH115 (a Path would tidy it)
    elif not stat.S_ISREG(status.st_mode):
        yield Fault(record.path, "was replaced", record.link or "a file of its own", "a link" if is_link else "no file")
    elif status.st_size != record.size:
        yield Fault(record.path, f"size differs{cause}", f"{record.size} bytes", f"{status.st_size} bytes")
    else:
        try:
            digest = hash_file(path, reporter)
        except LtxpackError as error:
            yield Fault(record.path, error.problem)
            return
        if digest != record.blake3:
            yield Fault(record.path, f"content differs{cause}", f"blake3 {record.blake3}", f"blake3 {digest}")


def _goal(record: FileRecord) -> str:
    """The path in the overlay to which the symlink ``record`` leads; the record's own path for a file."""
    link = record.link if record.is_symlink and record.link else posixpath.basename(record.path)
    return posixpath.normpath(posixpath.join(posixpath.dirname(record.path), link))


def _link_faults(record: FileRecord, records: Mapping[str, FileRecord], found: str) -> Iterator[Fault]:
    """A sound link to a damaged or missing file is no fault of its own."""
    goal = _goal(record)
    target = records.get(goal)
    if found != record.link:
        yield Fault(record.path, "links elsewhere", record.link, found)
    elif target is None or target.is_symlink:
        yield Fault(record.path, "links to a file the manifest does not name", found=goal)
    elif (target.size, target.blake3) != (record.size, record.blake3):
        yield Fault(record.path, "links to other content than it was made for", record.blake3, target.blake3)


def _strays(overlay: Path, records: Mapping[str, FileRecord], begun: Collection[str]) -> Iterator[str]:
    """Paths in ``overlay`` that are not its own: a foreign folder as a whole, unfinished work not at all."""
    ours = {(place / WORK_FOLDER).relative_to(overlay).as_posix() for place in staging_bases(overlay)}
    # A bake may have a name that begins with a dot.
    recorded = {posixpath.dirname(path) for path in records}
    for name, folders, files in os.walk(overlay):
        place = Path(name).relative_to(overlay)
        folders[:] = [entry for entry in folders if (place / entry).as_posix() not in ours | {*begun, LOST_AND_FOUND}]
        inside = [entry for entry in folders if not is_foreign(entry) or (place / entry).as_posix() in recorded]
        whole = [entry for entry in folders if entry not in inside or (overlay / place / entry).is_symlink()]
        folders[:] = inside
        for path in ((place / entry).as_posix() for entry in (*files, *whole)):
            if path not in records and path != MANIFEST_NAME:
                yield path


def _folder_faults(overlay: Path, folder: str, records: Mapping[str, FileRecord], bad: set[str]) -> Iterator[Fault]:
    """Shards that do not fit each other or their index; leaves out the files in ``bad``."""
    names = [path for path in records if posixpath.dirname(path) == folder and path not in bad]
    owners: dict[str, list[str]] = defaultdict(list)
    shards = [path for path in names if path.endswith(".safetensors")]
    for path in shards:
        try:
            for tensor in read_tensorfile(overlay / path).tensors:
                owners[tensor].append(posixpath.basename(path))
        except LtxpackError as error:
            yield Fault.of(path, error)
    for tensor, files in owners.items():
        if len(files) > 1:
            yield Fault(f"{folder}/{files[-1]}", f"holds {tensor}, which is in another shard too", found=files[0])
    whole = not any(path.startswith(f"{folder}/") for path in bad)
    for path in (path for path in names if path.endswith(INDEX_ENDING) and whole):
        yield from _index_faults(overlay, path, {tensor: files[0] for tensor, files in owners.items()})


def _index_faults(overlay: Path, path: str, owners: Mapping[str, str]) -> Iterator[Fault]:
    try:
        weight_map = read_index(overlay / path)
    except LtxpackError as error:
        yield Fault.of(path, error)
        return
    wrong = sorted(tensor for tensor in {*owners, *weight_map} if owners.get(tensor) != weight_map.get(tensor))
    if wrong:
        first = wrong[0]
        problem = f"does not fit its shards: {len(wrong)} tensors, the first {first}"
        yield Fault(path, problem, owners.get(first, "in no shard"), weight_map.get(first, "not named"))


def repair(
    items: Sequence[Item], overlay: Path, manifest: Manifest, reporter: Reporter, *, copy: bool = False
) -> Manifest:
    """Write ``items``, none of a bake, into ``overlay`` again; returns the resulting manifest.

    Each file is written inside ``.ltxpack/``, compared with the manifest, and then renamed into its place: a file that
    may share its bytes with another is never opened for writing. The manifest changes only if a link became a copy or
    the other way round. Raises OverlayError for a file of another source; the overlay keeps its own.
    """
    root = overlay / REPAIR_FOLDER
    with OverlayLock(overlay, reporter), write_errors(overlay):
        recover(overlay, reporter)
        refuse_links(root, root.parent)
        preflight(items, overlay, copy=copy)
        records = {record.path: record for record in manifest.records()}
        reporter.begin("repairing", sum(item.size for item in items), "B")
        try:
            root.mkdir(parents=True, exist_ok=True)
            changed = {}
            for item in items:
                target = overlay / item.path
                refuse_links(*(overlay / parent for parent in Path(item.path).parents if parent.name))
                changed[item.path] = write_item(item, root, overlay, copy=copy, reporter=reporter)
                _refuse_other_content(changed[item.path], records[item.path], target)
                target.parent.mkdir(parents=True, exist_ok=True)
                move_file(root / item.path, target)
                fsync_folder(target.parent)
            after = _with_records(manifest, changed)
            if after != manifest:
                atomic_write(overlay / MANIFEST_NAME, checked_bytes(after, overlay))
        finally:
            _remove_work(root)
        reporter.end()
        return after


def finish_killed(overlay: Path, reporter: Reporter) -> None:
    """Finish or undo a killed publishing, and remove what a killed repair left."""
    root = overlay / REPAIR_FOLDER
    if root.is_dir() or unfinished(overlay):
        with OverlayLock(overlay, reporter), write_errors(overlay):
            recover(overlay, reporter)
            refuse_links(root, root.parent)
            _remove_work(root)


def _remove_work(root: Path) -> None:
    remove_below(root)
    with contextlib.suppress(OSError):
        root.parent.rmdir()


def _refuse_other_content(found: FileRecord, wanted: FileRecord, target: Path) -> None:
    if (found.size, found.blake3) != (wanted.size, wanted.blake3):
        problem = "cannot be repaired: the source is not the one it was made from"
        expected, other = f"blake3 {wanted.blake3}", f"blake3 {found.blake3}"
        advice = "name the source the overlay was made from, or materialize again with --force"
        raise OverlayError(problem, file=target, expected=expected, found=other, next=advice)


def _with_records(manifest: Manifest, changed: Mapping[str, FileRecord]) -> Manifest:
    """``manifest`` with the records ``changed`` in place of those with the same path."""

    def renewed(files: Iterable[FileRecord]) -> tuple[FileRecord, ...]:
        return tuple(changed.get(record.path, record) for record in files)

    components = {name: replace(part, files=renewed(part.files)) for name, part in manifest.components.items()}
    loras = tuple(replace(lora, file=changed.get(lora.file.path, lora.file)) for lora in manifest.loras)
    return replace(manifest, files=renewed(manifest.files), components=components, loras=loras)
