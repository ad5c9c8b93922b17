"""Stop and go on: work is written in a staging folder, journaled file by file, and published by rename.

A staging folder holds ``journal.jsonl``, ``files/`` (laid out like the overlay) and, while an old version is being
replaced, ``old/``. It is ``.<name>.partial`` beside a new overlay, ``.ltxpack/<name>.partial`` inside an overlay that
gets a bake. Nothing of it is in its final place before publishing. ``recover`` finishes or undoes a publishing that was
cut short, so that at every moment the manifest names either the old or the new version, whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from ltxpack.errors import OverlayError, SourceError
from ltxpack.files import bounded_json
from ltxpack.files.publish import atomic_write, fsync_folder, write_errors
from ltxpack.files.reader import hash_file
from ltxpack.files.tensorfile import open_source
from ltxpack.manifest import (
    BAKE_NAME,
    MANIFEST_NAME,
    RESERVED_BAKE_NAMES,
    FileRecord,
    Manifest,
    is_overlay,
    read_manifest,
    safe_relative_path,
)
from ltxpack.repack.lock import WORK_FOLDER, OverlayLock, real_target, refuse_links
from ltxpack.reporter import Reporter

PARTIAL = ".partial"
FORMAT = 1
# A line is some 200 bytes, with what a bake measured some 100 KB; more than this is not read.
MAX_JOURNAL_BYTES = 16 * 1024 * 1024


class StagingPaths:
    """The paths of a staging folder. ``folder``: "" for the overlay itself, else ``bakes/<name>``.

    ``target`` appears at the end, ``work`` is the staging folder; in it ``root`` is laid out like the overlay,
    ``payload`` is what becomes ``target``, and ``old`` keeps the version that is being replaced.
    """

    def __init__(self, overlay: Path, folder: str) -> None:
        self.overlay, self.folder = overlay, folder
        self.target = overlay / folder
        beside = overlay.parent / f".{overlay.name}{PARTIAL}"
        self.work = overlay / WORK_FOLDER / (self.target.name + PARTIAL) if folder else beside
        self.root, self.old, self.journal = self.work / "files", self.work / "old", self.work / "journal.jsonl"
        self.payload = self.root / folder

    def refuse_links(self) -> None:
        """Raise OverlayError for a link among the folders: it would lead writes and removals out of the overlay."""
        parts = [parent for parent in (Path(self.folder), *Path(self.folder).parents) if parent.name]
        inner = [self.overlay / WORK_FOLDER, *(self.overlay / part for part in parts)]
        refuse_links(*inner, self.work, self.root, *(self.root / part for part in parts), self.old)

    def named(self) -> tuple[FileRecord, ...] | None:
        """The files that the overlay's manifest, if it can be read, names for ``folder``."""
        with contextlib.suppress(OverlayError):
            manifest = read_manifest(self.overlay)
            if not self.folder:
                return tuple(manifest.records())
            bake = manifest.bakes.get(self.target.name)
            return bake.files if bake else None
        return None


class Journal:
    """The journal of unfinished work: which plan it belongs to and which files are complete. JSON, one line each.

    ``fingerprint``: the plan. ``records``: complete files by path, ``notes``: what else their writer told of some, as
    JSON. ``replaced``: None, or (once publishing began) the old files to remove. It is trusted only as far as it can be
    checked: a torn or odd line and all after it are dropped, and a file counts as complete only if it has the size and
    the content that the journal states.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint = ""
        self.records: dict[str, FileRecord] = {}
        self.notes: dict[str, Any] = {}
        self.replaced: tuple[str, ...] | None = None
        self._file: BinaryIO | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """What the journal at ``path`` says; empty if there is none or it is not one of this version."""
        journal = cls(path)
        with contextlib.suppress(SourceError, OSError, ValueError, LookupError, TypeError, AttributeError):
            journal._read()
        return journal

    def restart(self, fingerprint: str, records: dict[str, FileRecord]) -> None:
        """Begin the file afresh with these records; from here on lines are added. Raises OverlayError."""
        self.fingerprint, self.records, self.replaced = fingerprint, dict(records), None
        self.notes = {path: note for path, note in self.notes.items() if path in records}
        lines: list[dict[str, Any]] = [{"journal": FORMAT, "fingerprint": fingerprint}]
        lines += map(self._entry, records.values())
        with write_errors(self.path):
            atomic_write(self.path, b"".join(map(_line, lines)))
            self._file = self.path.open("ab", buffering=0)

    def record(self, record: FileRecord, note: Any = None) -> None:
        """``record`` is complete and on the disk; so is this line when it returns."""
        if note is not None:
            self.notes[record.path] = note
        self._append(self._entry(record))
        self.records[record.path] = record

    def publishing(self, replaced: Iterable[str]) -> None:
        """All is complete and is now moved into place; ``replaced``: paths of the old version to remove."""
        self.replaced = tuple(sorted(replaced))
        self._append({"publishing": self.replaced})

    def close(self) -> None:
        """Close the file; it stays."""
        if self._file is not None:
            self._file.close()

    def _entry(self, record: FileRecord) -> dict[str, Any]:
        noted = {"note": self.notes[record.path]} if record.path in self.notes else {}
        return {**dataclasses.asdict(record), **noted}

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        with write_errors(self.path):
            self._file.write(_line(entry))
            os.fsync(self._file.fileno())

    def _read(self) -> None:
        with open_source(self.path) as file:
            data = file.read(min(os.fstat(file.fileno()).st_size, MAX_JOURNAL_BYTES))
        bounded_json.refuse_crowded(data)
        first, *lines = data.split(b"\n")[:-1]
        head = bounded_json.parse(first)
        if head["journal"] != FORMAT:
            return
        self.fingerprint = str(head["fingerprint"])
        for line in lines:
            entry = bounded_json.parse(line)
            if "publishing" in entry:
                self.replaced = tuple(path for path in entry["publishing"] if safe_relative_path(path))
            elif safe_relative_path(entry["path"]) and type(entry["size"]) is int:
                note = entry.pop("note", None)
                record = FileRecord(**entry)
                self.records[record.path] = record
                if note is not None:
                    self.notes[record.path] = note


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"


class Staging:
    """The unfinished version of an overlay, or of one folder (``bakes/<name>``) of an overlay. A context manager.

    ``root`` is laid out like the overlay: write ``root / path`` and ``record`` each complete file. ``done`` holds what
    an earlier run with the same ``fingerprint`` left complete, checked by content. The caller holds the ``lock`` of the
    overlay and has called :func:`recover`. ``force`` allows publishing to replace an existing version. Raises
    OverlayError (exists, cannot be written).
    """

    def __init__(
        self, lock: OverlayLock, fingerprint: str, reporter: Reporter, *, folder: str = "", force: bool = False
    ) -> None:
        self.paths = StagingPaths(real_target(lock.overlay), folder)
        self.root, self.work = self.paths.root, self.paths.work
        self.fingerprint = fingerprint
        self._reporter = reporter
        self._lock = lock
        self._force = force
        self._published = False
        self._journal = Journal(self.paths.journal)

    def __enter__(self) -> Self:
        with write_errors(self.work):
            self._refuse_existing()
            self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._journal.close()
        if kind and issubclass(kind, KeyboardInterrupt) and not self._published:
            self._reporter.note(
                f"stopped; {len(self.done)} finished files are kept, the same command goes on from there"
            )

    @property
    def done(self) -> Mapping[str, FileRecord]:
        """The complete files by path."""
        return self._journal.records

    def record(self, record: FileRecord, note: Any = None) -> None:
        """``record``'s file under ``root`` is complete and on the disk. ``note``: JSON for the run that goes on."""
        self._journal.record(record, note)

    def publish(self, manifest: bytes) -> None:
        """Put the new overlay, with this manifest, in its place. Only for a staging of a whole overlay."""
        assert not self.paths.folder
        with write_errors(self.paths.target):
            self.root.mkdir(parents=True, exist_ok=True)
            atomic_write(self.root / MANIFEST_NAME, manifest)
            self._announce()
            self._lock.hold_folder(self.root)
            _swap(self.paths)
            self._finish()

    def _refuse_existing(self) -> None:
        paths, target = self.paths, self.paths.target
        paths.refuse_links()
        if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
            return
        if paths.folder and paths.named() is None:
            return
        refuse_foreign(paths.overlay)
        if not self._force:
            raise OverlayError("exists already", file=target, next="the same command with --force replaces it")

    def _open(self) -> None:
        """Keep what the journal vouches for, remove everything else, start the journal."""
        self.work.mkdir(parents=True, exist_ok=True)
        journal = self._journal = Journal.read(self.paths.journal)
        done: dict[str, FileRecord] = {}
        if journal.records and journal.fingerprint == self.fingerprint:
            found, reporter = journal.records, self._reporter
            reporter.begin("checking what is done", sum(record.size for record in found.values()), "B")
            done = {path: record for path, record in found.items() if _is_intact(record, self.root, reporter)}
            reporter.end()
            reporter.note(f"going on: {len(done)} of {len(found)} finished files are intact and kept")
        elif journal.records:
            self._reporter.note(f"{self.work}: unfinished work of a run with other inputs is discarded")
        remove_below(self.root, keep=done)
        self.root.mkdir(exist_ok=True)
        fsync_folder(self.work.parent)
        journal.restart(self.fingerprint, done)

    def _announce(self) -> None:
        """Journal that publishing begins: from here on ``recover`` expects it to be half done."""
        for name, _, _ in os.walk(self.work):
            fsync_folder(name)
        prefix = f"{self.paths.folder}/" if self.paths.folder else ""
        named = self.paths.named() if os.path.lexists(self.paths.target) else None
        replaced = [record.path.removeprefix(prefix) for record in named or ()]
        self._journal.publishing([*replaced, MANIFEST_NAME] if not prefix else replaced)

    def _finish(self) -> None:
        self._published = True
        self._journal.close()
        _clean(self.paths, self._journal, self._reporter)


def publish_bakes(stagings: Sequence[Staging], manifest: Manifest) -> None:
    """Put the bakes of ``stagings`` (one overlay) in their places, then the overlay's ``manifest`` that names them.

    Bakes that are replaced leave the manifest first: the overlay is valid at every moment. Raises OverlayError.
    """
    overlay, work = stagings[0].paths.overlay, stagings[0].work
    path = overlay / MANIFEST_NAME
    with write_errors(path):
        for staging in stagings:
            staging._announce()
        before = read_manifest(overlay)
        names = {staging.paths.target.name for staging in stagings}
        kept = {name: bake for name, bake in before.bakes.items() if name not in names}
        if len(kept) < len(before.bakes):
            atomic_write(path, dataclasses.replace(before, bakes=kept).dump(), folder=work)
        for staging in stagings:
            _swap(staging.paths)
        atomic_write(path, manifest.dump(), folder=work)
        for staging in stagings:
            staging._finish()


def refuse_foreign(overlay: Path) -> None:
    """Refuse an ``overlay`` that is there and is none. Raises OverlayError."""
    try:
        if is_overlay(overlay) or not (overlay.exists() or overlay.is_symlink()):
            return
        folder = overlay.is_dir()
        if folder and not any(overlay.iterdir()):
            return
    except OSError as error:
        problem = f"cannot be looked into: {error.strerror}"
        raise OverlayError(problem, file=overlay, next="choose another folder") from None
    raise OverlayError(
        "exists and is not an overlay" if folder else "exists and is not a folder", file=overlay,
        expected=f"a new folder, or one with {MANIFEST_NAME}", next="choose another folder",
    )  # fmt: skip


def recover(overlay: Path, reporter: Reporter) -> None:
    """Finish or undo what a killed publishing left of ``overlay``. Call it under the OverlayLock."""
    overlay = real_target(overlay)
    names = [path.name.removesuffix(PARTIAL) for path in sorted((overlay / WORK_FOLDER).glob(f"*{PARTIAL}"))]
    bakes = [name for name in names if BAKE_NAME.fullmatch(name) and name not in RESERVED_BAKE_NAMES]
    for folder in ("", *(f"bakes/{name}" for name in bakes)):
        paths = StagingPaths(overlay, folder)
        journal = Journal.read(paths.journal)
        if journal.replaced is not None:
            _settle(paths, journal, reporter)
        _remove_if_empty(paths)


def unfinished(overlay: Path) -> list[Path]:
    """The staging folders of ``overlay`` that are there."""
    overlay = real_target(overlay)
    inside = sorted((overlay / WORK_FOLDER).glob(f"*{PARTIAL}"))
    return [path for path in (StagingPaths(overlay, "").work, *inside) if path.is_dir()]


def remove_below(root: Path, keep: Collection[str] = ()) -> None:
    """Remove every file below ``root`` but those of ``keep``, then empty folders; links are removed, not followed."""
    if root.is_dir():
        for path in list(_files_below(root)):
            if path.relative_to(root).as_posix() not in keep:
                path.unlink()
        _remove_empty(root)


def _settle(paths: StagingPaths, journal: Journal, reporter: Reporter) -> None:
    """Make one begun publishing whole again."""
    paths.refuse_links()
    with write_errors(paths.target):
        if not paths.payload.exists() and (not paths.folder or paths.named() is not None):
            _clean(paths, journal, reporter)
        elif not paths.folder:
            if paths.old.exists() and not os.path.lexists(paths.target):
                paths.old.rename(paths.target)
        elif paths.payload.exists():
            if paths.named() is None:
                _drop_named(paths.target, journal)
                _drop_old(paths, journal, reporter)
        elif paths.target.exists():
            paths.payload.parent.mkdir(parents=True, exist_ok=True)
            paths.target.rename(paths.payload)
            _drop_old(paths, journal, reporter)


def _swap(paths: StagingPaths) -> None:
    """Move the old version aside, the new one in its place."""
    paths.target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(paths.target):
        paths.target.rename(paths.old)
        fsync_folder(paths.target.parent)
    paths.payload.rename(paths.target)
    fsync_folder(paths.payload.parent)
    fsync_folder(paths.target.parent)


def _clean(paths: StagingPaths, journal: Journal, reporter: Reporter) -> None:
    """After a publishing: remove what the old manifest named, move foreign files to the new version."""
    _drop_old(paths, journal, reporter)
    remove_below(paths.work, keep={paths.journal.name})
    paths.journal.unlink(missing_ok=True)
    _remove_if_empty(paths)


def _remove_if_empty(paths: StagingPaths) -> None:
    """Remove the staging folder, and ``.ltxpack`` with the last one in it."""
    with contextlib.suppress(OSError):
        paths.work.rmdir()
        if paths.folder:
            paths.work.parent.rmdir()


def _drop_old(paths: StagingPaths, journal: Journal, reporter: Reporter) -> None:
    """Remove the old version; files in it that its manifest did not name move to the new one, or aside."""
    _drop_named(paths.old, journal)
    if not paths.old.is_dir():
        return
    for path in list(_files_below(paths.old)):
        name = path.relative_to(paths.old)
        home = paths.target / name
        if os.path.lexists(home):
            home = paths.overlay.parent / f"{paths.overlay.name}.kept" / paths.folder / name
            reporter.warn(f"{name}: not ltxpack's, but in the way of a new file; it is now {home}")
        home.parent.mkdir(parents=True, exist_ok=True)
        path.rename(home)
    _remove_empty(paths.old)


def _drop_named(folder: Path, journal: Journal) -> None:
    """Remove the files of the old version that its manifest named, never through a link to elsewhere."""
    if not folder.is_dir():
        return
    for name in journal.replaced or ():
        path = folder / name
        if not any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(folder)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
    _remove_empty(folder)


def _is_intact(record: FileRecord, root: Path, reporter: Reporter) -> bool:
    """Whether the file under ``root`` is what ``record`` says, by size and content. Advances by its size."""
    path = root / record.path
    try:
        status = path.lstat()
        if record.is_symlink:
            return stat.S_ISLNK(status.st_mode) and os.readlink(path) == record.link  # noqa: PTH115 (a Path would tidy it)
        if not stat.S_ISREG(status.st_mode) or status.st_size != record.size:
            return False
    except OSError:
        return False
    return hash_file(path, reporter) == record.blake3


def _files_below(root: Path) -> Iterator[Path]:
    """Everything below ``root`` that is not a folder; a link to a folder counts as a file."""
    for folder, folders, files in os.walk(root):
        yield from (Path(folder, name) for name in files)
        yield from (path for path in map(Path(folder).joinpath, folders) if path.is_symlink())


def _remove_empty(root: Path) -> None:
    for name, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            Path(name).rmdir()
