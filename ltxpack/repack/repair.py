"""Writes damaged files of an overlay again, from the plan that made them. Removes nothing but what it replaces.

A file is written inside ``.ltxpack/``, compared with the manifest, and only then put in its place by rename: a file
that may share its bytes with another is never opened for writing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ltxpack.errors import OverlayError
from ltxpack.files.publish import atomic_write, fsync_folder, write_failure
from ltxpack.manifest import MANIFEST_NAME, FileRecord, Manifest
from ltxpack.repack.items import Item
from ltxpack.repack.lock import WORK_FOLDER, OverlayLock
from ltxpack.repack.staging import recover, remove_below
from ltxpack.repack.write import preflight, write_item
from ltxpack.reporter import Reporter


def repair(
    items: Sequence[Item],
    overlay: Path,
    manifest: Manifest,
    reporter: Reporter,
    *,
    copy: bool = False,
    lock: OverlayLock | None = None,
) -> Manifest:
    """Write ``items`` (see ``verify.damaged_items``) into ``overlay`` again; the manifest as it is afterwards.

    The manifest changes only where a link became a copy or the other way round. Raises OverlayError if what comes out
    is not what the manifest says: then the source is another one, and the file in the overlay stays as it is.
    """
    with contextlib.nullcontext() if lock else OverlayLock(overlay, reporter):
        recover(overlay, reporter)
        root = overlay / WORK_FOLDER / "repair"
        if root.is_symlink() or root.parent.is_symlink():
            raise OverlayError("is a link where only a folder may be", file=root)
        preflight(items, overlay, copy=copy)
        records = {record.path: record for record in manifest.records()}
        reporter.begin("repairing", sum(item.size for item in items), "B")
        try:
            root.mkdir(parents=True, exist_ok=True)
            changed = {item.path: _repaired(item, records, overlay, root, reporter, copy) for item in items}
            after = _with_records(manifest, changed)
            if after != manifest:
                atomic_write(overlay / MANIFEST_NAME, after.dump(), folder=root)
        except OSError as error:
            raise write_failure(error, overlay) from None
        finally:
            remove_below(root)
            with contextlib.suppress(OSError):
                root.parent.rmdir()
        reporter.end()
        return after


def _repaired(
    item: Item, records: Mapping[str, FileRecord], overlay: Path, root: Path, reporter: Reporter, copy: bool
) -> FileRecord:
    wanted, target = records[item.path], overlay / item.path
    linked = next((folder for folder in target.parents if folder.is_relative_to(overlay) and folder != overlay
                   and folder.is_symlink()), None)  # fmt: skip
    if linked is not None:
        raise OverlayError("is a link where only a folder may be", file=linked, next=f"remove {linked}")
    record = write_item(item, root, copy=copy, reporter=reporter)
    if (record.size, record.blake3) != (wanted.size, wanted.blake3):
        raise OverlayError(
            "cannot be repaired: the source is not the one it was made from",
            file=target,
            expected=f"blake3 {wanted.blake3}",
            found=f"blake3 {record.blake3}",
            next="name the source the overlay was made from, or materialize again with --force",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        (root / item.path).replace(target)
        fsync_folder(target.parent)
    except OSError as error:
        raise write_failure(error, target) from None
    return record


def _with_records(manifest: Manifest, changed: Mapping[str, FileRecord]) -> Manifest:
    """``manifest`` with these records in place of those of the same path, wherever they stand."""

    def renew(value: Any) -> Any:
        if isinstance(value, FileRecord):
            return changed.get(value.path, value)
        if isinstance(value, tuple):
            return tuple(renew(item) for item in value)
        if isinstance(value, Mapping):
            return {key: renew(item) for key, item in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {field.name: renew(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **parts)
        return value

    after: Manifest = renew(manifest)
    return after
