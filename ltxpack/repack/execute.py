"""Carries out a plan: checks that it can be done, then writes item after item into a staging folder.

Knows how items are written, not what they mean.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from ltxpack.errors import FormatError, OverlayError, SourceError
from ltxpack.manifest import FileRecord, safe_relative_path
from ltxpack.repack.staging import Staging
from ltxpack.repack.stream import copy_file, write_bytes, write_link, write_shard
from ltxpack.repack.work import CopyFile, Item, LinkFile, WriteBytes, WriteShard, sources
from ltxpack.reporter import Reporter

# What a file needs beside its bytes: blocks not filled, its name, the journal.
BYTES_PER_FILE = 16 * 1024


def execute(items: Sequence[Item], staging: Staging, *, copy: bool, reporter: Reporter) -> tuple[FileRecord, ...]:
    """Write what ``staging`` does not hold yet; the records of all items, in order of the plan.

    ``copy`` forbids links. Raises OverlayError (no space, no permission: before the first byte, or disk full on the
    way), SourceError and FormatError for sources; ``staging`` keeps what was complete.
    """
    _refuse_paths(items)
    left = [item for item in items if item.path not in staging.done]
    preflight(left, staging.root, copy=copy)
    if left:
        reporter.begin("writing", sum(item.size for item in left), "B")
        for item in left:
            staging.record(write_item(item, staging.root, copy=copy, reporter=reporter))
        reporter.end()
    return tuple(staging.done[item.path] for item in items)


def write_item(item: Item, root: Path, *, copy: bool, reporter: Reporter) -> FileRecord:
    """Write one item under ``root``, whole and on the disk."""
    match item:
        case WriteShard():
            return write_shard(item, root, reporter)
        case CopyFile():
            return copy_file(item, root, reporter, allow_link=not copy)
        case LinkFile():
            record = write_link(item, root)
        case WriteBytes():
            record = write_bytes(item, root)
    reporter.advance(item.size)
    return record


def preflight(items: Sequence[Item], folder: Path, *, copy: bool, done: Collection[str] = ()) -> int:
    """Check that ``items`` (but those in ``done``) can be read and written under ``folder``, there already or not.

    Returns the bytes that will take space. Raises SourceError or FormatError for a source that is missing, unreadable
    or too short, OverlayError for a folder that is not writable or too small.
    """
    items = [item for item in items if item.path not in done]
    for path, needed in sources(items).items():
        _check_source(path, needed)
    written = bytes_to_write(items, folder, copy=copy)
    require_space(folder, written, len(items))
    return written


def require_space(folder: Path, written: int, files: int) -> None:
    """Refuse (OverlayError) a ``folder``, there already or not, that is not writable or lacks ``written`` bytes."""
    base = existing_parent(folder)
    if not os.access(base, os.W_OK | os.X_OK):
        raise OverlayError("may not be written", file=base, next="choose another folder, or see to its permissions")
    free = shutil.disk_usage(base).free
    if written + BYTES_PER_FILE * files > free:
        raise OverlayError(
            "the disk is too small",
            file=base,
            expected=f"{written} bytes free",
            found=f"{free} bytes",
            next="free some space, or choose another folder, then run the same command again",
        )


def bytes_to_write(items: Sequence[Item], folder: Path, *, copy: bool) -> int:
    """Bytes that take space under ``folder``: all but those of links and of files that can be linked."""
    return sum(
        item.size
        for item in items
        if not isinstance(item, LinkFile)
        and not (isinstance(item, CopyFile) and not copy and can_share(item.source, folder))
    )


def can_share(source: Path, folder: Path) -> bool:
    """Whether a file there can probably be reflinked or hard-linked into ``folder``."""
    try:
        status = source.stat()
        # Linux (protected_hardlinks) lets users link only what they own or may write.
        mine = not hasattr(os, "geteuid") or os.geteuid() in (0, status.st_uid) or os.access(source, os.W_OK)
        return mine and status.st_dev == existing_parent(folder).stat().st_dev
    except OSError:
        return False


def existing_parent(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that exists."""
    folder = Path(os.path.realpath(folder))
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _check_source(path: Path, needed: int) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise SourceError("does not exist", file=path) from None
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=path) from None
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
        raise SourceError("cannot be read: no regular file, or no permission", file=path)
    if status.st_size < needed:
        raise FormatError(
            f"is truncated: {needed - status.st_size} bytes are missing",
            file=path,
            expected=f"{needed} bytes",
            found=f"{status.st_size} bytes",
            next="fetch or copy the file again",
        )


def _refuse_paths(items: Sequence[Item]) -> None:
    """A plan that would write outside the overlay, or one file twice, is a fault of whoever made it."""
    seen: set[str] = set()
    for item in items:
        if not safe_relative_path(item.path) or item.path in seen:
            raise OverlayError("is no place for a file of the overlay, or one taken twice", file=item.path)
        seen.add(item.path)
