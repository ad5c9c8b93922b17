"""Work that can stop and go on: written in a staging folder, journaled file by file, and published by rename.

A staging folder holds ``journal.jsonl`` and ``files/`` (laid out like the overlay), on the filesystem of the result. It
is ``.<name>.partial`` beside a new overlay, ``.ltxpack/<name>.partial`` inside an existing folder. No file reaches its
final place before publishing. A new folder appears by one rename. An existing folder, which may be a mount point, the
current folder or another user's, stays, and publishing fills it file by file; it removes the manifest first and writes
it last. ``recover`` finishes or undoes an interrupted publishing. So at every moment the manifest, if there is one,
names either the old or the new version, whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ltxpack.errors import OverlayError, SourceError
from ltxpack.files import bounded_json
from ltxpack.files.foreign import entries, is_foreign
from ltxpack.files.publish import (
    atomic_write,
    existing_parent,
    fsync_folder,
    move_file,
    remove_temporaries,
    try_move,
    write_errors,
)
from ltxpack.files.reader import hash_file
from ltxpack.files.tensorfile import open_source
from ltxpack.manifest import (
    BAKE_NAME,
    BAKED,
    BAKES,
    MANIFEST_NAME,
    RESERVED_BAKE_NAMES,
    FileRecord,
    Manifest,
    checked_bytes,
    is_overlay,
    read_manifest,
    safe_relative_path,
)
from ltxpack.repack.lock import WORK_FOLDER, OverlayLock, real_target, refuse_links
from ltxpack.reporter import Reporter, SilentReporter

PARTIAL = ".partial"
# The name of a whole overlay's staging folder inside the overlay: no bake may have it.
WHOLE = "base"
FORMAT = 1
# A line has some 200 bytes, with the measurements of a bake some 100 KB; the reader stops here.
MAX_JOURNAL_BYTES = 16 * 1024 * 1024


class StagingPaths:
    """The paths of a staging folder. ``folder``: "" for the overlay itself, else that of a bake: ``bakes/<name>``.

    ``target`` appears at the end; ``prefix`` begins the paths in it. ``work`` is the staging folder; in it ``root`` is
    laid out like the overlay, and ``payload`` becomes ``target``. ``base`` holds ``work``; None: beside the overlay.
    """

    def __init__(self, overlay: Path, folder: str, base: Path | None) -> None:
        self.overlay, self.folder, self.base = overlay, folder, base
        self.target, self.prefix = overlay / folder, f"{folder}/" if folder else ""
        name = _work_name(folder) if folder else WHOLE
        inside = base / WORK_FOLDER / (name + PARTIAL) if base else None
        self.work = inside or overlay.parent / f".{overlay.name}{PARTIAL}"
        self.root, self.journal = self.work / "files", self.work / "journal.jsonl"
        self.payload = self.root / folder

    @classmethod
    def all(cls, overlay: Path, folder: str) -> list[Self]:
        """The possible staging folders, the usual place first."""
        if folder:
            bases = [overlay, *reversed(Path(folder).parents[:-1]), Path(folder)]
            return [cls(overlay, folder, overlay / base) for base in bases]
        return [cls(overlay, folder, base) for base in ((overlay, None) if overlay.is_dir() else (None,))]

    def refuse_links(self) -> None:
        """Raise OverlayError for a link among the folders: it would lead writes and removals out of the overlay."""
        parts = (Path(self.folder), *Path(self.folder).parents)
        refuse_links(*map(self.overlay.joinpath, parts), self.work.parent, self.work, *map(self.root.joinpath, parts))

    def try_out(self) -> None:
        """Try with empty files whether publishing can move files into their place. Raises OSError."""
        goal, name = existing_parent(self.target), f".{self.overlay.name}.trial"
        try_move(existing_parent(self.work), goal, name)
        folders = {(self.overlay / record.path).parent for record in self.named() or ()} | {self.overlay}
        for folder in folders - {goal}:
            if _is_folder(folder):
                try_move(folder, folder, name)

    def named(self) -> tuple[FileRecord, ...] | None:
        """The files of ``folder`` in the overlay's manifest; None if it cannot be read."""
        with contextlib.suppress(OverlayError):
            manifest = read_manifest(self.overlay)
            if not self.folder:
                return tuple(manifest.records())
            bake = manifest.baked.get(self.folder)
            return bake.files if bake else None
        return None


class Journal:
    """The journal of unfinished work: its plan and its complete files. JSON, one line each.

    ``fingerprint``: the plan. ``records``: complete files by path. ``notes``: JSON that their writer added to some.
    ``replaced``: None, or once publishing has begun the old files to remove. The reader trusts only what it can check:
    it drops a torn or odd line and all lines after it, and a file counts as complete only if it has the size and the
    content that the journal states.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint = ""
        self.records: dict[str, FileRecord] = {}
        self.notes: dict[str, Any] = {}
        self.replaced: tuple[str, ...] | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The journal at ``path``; an empty one if there is none, or if another version wrote it."""
        journal = cls(path)
        with contextlib.suppress(SourceError, OSError, ValueError, LookupError, TypeError, AttributeError):
            journal._read()
        return journal

    def restart(self, fingerprint: str, records: dict[str, FileRecord]) -> None:
        """Begin a new file with these records, to which later calls add lines. Raises OverlayError."""
        self.fingerprint, self.records, self.replaced = fingerprint, dict(records), None
        self.notes = {path: note for path, note in self.notes.items() if path in records}
        lines: list[dict[str, Any]] = [{"journal": FORMAT, "fingerprint": fingerprint}]
        lines += map(self._entry, records.values())
        with write_errors(self.path):
            atomic_write(self.path, b"".join(map(_line, lines)))

    def record(self, record: FileRecord, note: Any = None) -> None:
        """Add that ``record`` is complete and on the disk; returns when this line is on the disk too."""
        if note is not None:
            self.notes[record.path] = note
        self._append(self._entry(record))
        self.records[record.path] = record

    def publishing(self, replaced: Iterable[str]) -> None:
        """Add that all files are complete and publishing begins; ``replaced``: old paths to remove."""
        self.replaced = tuple(sorted(replaced))
        self._append({"publishing": self.replaced})

    def _entry(self, record: FileRecord) -> dict[str, Any]:
        noted = {"note": self.notes[record.path]} if record.path in self.notes else {}
        return {**dataclasses.asdict(record), **noted}

    def _append(self, entry: dict[str, Any]) -> None:
        with write_errors(self.path), self.path.open("ab", buffering=0) as file:
            file.write(_line(entry))
            os.fsync(file.fileno())

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

    ``root`` is laid out like the overlay: write ``root / path`` and ``record`` each complete file. ``done`` holds the
    complete files of an earlier run with the same ``fingerprint``, checked by content. The caller holds the overlay's
    ``lock`` and has called :func:`recover`. ``force`` replaces an existing version. Raises OverlayError.
    """

    def __init__(
        self, lock: OverlayLock, fingerprint: str, reporter: Reporter, *, folder: str = "", force: bool = False
    ) -> None:
        self.paths = find_place(lock.overlay, folder)
        self.root, self.work = self.paths.root, self.paths.work
        self.fingerprint = fingerprint
        self._reporter = reporter
        self._lock = lock
        self._force = force
        self._journal = Journal(self.paths.journal)

    def __enter__(self) -> Self:
        with write_errors(self.work):
            self._refuse_existing()
            self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind and issubclass(kind, KeyboardInterrupt) and self.work.is_dir():
            self._reporter.note(
                f"stopped; {len(self.done)} finished files are kept, the same command goes on from there"
            )

    @property
    def done(self) -> Mapping[str, FileRecord]:
        return self._journal.records

    def record(self, record: FileRecord, note: Any = None) -> None:
        """Note that ``record``'s file under ``root`` is complete and on the disk. ``note``: JSON for a later run."""
        self._journal.record(record, note)

    def publish(self, manifest: Manifest) -> None:
        """Put the new overlay, with this manifest, in its place. Only for a staging of a whole overlay."""
        assert not self.paths.folder
        content = checked_bytes(manifest, self.paths.overlay)
        with write_errors(self.paths.target):
            self.root.mkdir(parents=True, exist_ok=True)
            atomic_write(self.root / MANIFEST_NAME, content)
            self.announce()
            if not self.paths.target.is_dir():
                self._lock.hold_folder(self.root)
            self.place()
            _clean(self.paths)

    def _refuse_existing(self) -> None:
        paths, target = self.paths, self.paths.target
        if not os.path.lexists(target) or (target.is_dir() and not _occupied(target)):
            return
        if paths.folder and paths.named() is None:
            return
        refuse_foreign(paths.overlay)
        if not self._force:
            raise OverlayError("exists already", file=target, next="the same command with --force replaces it")

    def _open(self) -> None:
        """Keep the files that match the journal, remove all others, start the journal."""
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

    def announce(self) -> None:
        """Journal that publishing begins: ``recover`` then expects it to be half done."""
        for name, _, _ in os.walk(self.work):
            fsync_folder(name)
        named = self.paths.named() if os.path.lexists(self.paths.target) else None
        self._journal.publishing(record.path.removeprefix(self.paths.prefix) for record in named or ())

    def place(self) -> None:
        _place(self.paths, self._journal, self._reporter)


def publish_bakes(stagings: Sequence[Staging], manifest: Manifest, *, repair: bool = False) -> None:
    """Put the bakes of ``stagings`` (one overlay) in their places, then the overlay's ``manifest`` that names them.

    The manifest loses replaced bakes first, so that the overlay is valid at every moment. Those of a ``repair`` stay in
    it: if that is killed, nothing else says how to make them. Raises OverlayError.
    """
    overlay = stagings[0].paths.overlay
    path, content = overlay / MANIFEST_NAME, checked_bytes(manifest, overlay)
    with write_errors(path):
        for staging in stagings:
            staging.announce()
        before = read_manifest(overlay)
        folders = {staging.paths.folder for staging in stagings}
        kept = {folder: bake for folder, bake in before.baked.items() if folder not in folders}
        if len(kept) < len(before.baked) and not repair:
            atomic_write(path, before.with_baked(kept).dump())
        for staging in stagings:
            staging.place()
        atomic_write(path, content)
        for staging in stagings:
            _clean(staging.paths)


def find_place(overlay: Path, folder: str = "") -> StagingPaths:
    """The staging folder for ``folder`` of ``overlay``: that of unfinished work, else one beside the result.

    It tries whether the last step can work there, in milliseconds. Raises OverlayError if no place works.
    """
    places = StagingPaths.all(real_target(overlay), folder)
    problem: OSError | None = None
    with write_errors(places[0].target):
        for place in sorted(places, key=lambda place: not place.journal.is_file()):
            place.refuse_links()
            try:
                place.try_out()
            except OSError as error:
                problem = problem or error
            else:
                return place
        assert problem is not None
        raise problem


def refuse_foreign(overlay: Path) -> None:
    """Raises OverlayError if ``overlay`` exists and is neither an overlay nor empty."""
    try:
        if is_overlay(overlay) or not (overlay.exists() or overlay.is_symlink()):
            return
        folder = overlay.is_dir()
        if folder and (not _occupied(overlay) or any(map(_is_half_filled, StagingPaths.all(real_target(overlay), "")))):
            return
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise OverlayError(problem, file=overlay, next="choose another folder") from None
    raise OverlayError(
        "exists and is not an overlay" if folder else "exists and is not a folder", file=overlay,
        expected=f"a new folder, or one with {MANIFEST_NAME}", next="choose another folder",
    )  # fmt: skip


def recover(overlay: Path, reporter: Reporter) -> None:
    """Finish or undo a killed publishing of ``overlay``. Call it under the OverlayLock."""
    overlay = real_target(overlay)
    with contextlib.suppress(OSError):
        remove_temporaries(overlay / MANIFEST_NAME)
    for paths in _begun(overlay):
        journal = Journal.read(paths.journal)
        if journal.replaced is not None:
            _settle(paths, journal, reporter)
        _remove_if_empty(paths)


def unfinished(overlay: Path) -> list[Path]:
    """The staging folders of ``overlay`` that exist."""
    return [paths.work for paths in _begun(real_target(overlay))]


def staging_bases(overlay: Path) -> list[Path]:
    """The folders of ``overlay`` that may hold staging folders: all that may be mount points with bakes."""
    inner = [base for place in BAKED for base in (overlay / place, *sorted((overlay / place).glob("*/")))]
    return [overlay, *inner]


def _begun(overlay: Path) -> list[StagingPaths]:
    """The existing staging folders, of the whole overlay and of bakes."""
    places = StagingPaths.all(overlay, "")
    for base in staging_bases(overlay):
        for path in sorted((base / WORK_FOLDER).glob(f"*{PARTIAL}")):
            folder = folder_of(path)
            if folder is not None:
                places.append(StagingPaths(overlay, folder, base))
    return [place for place in places if place.work.is_dir()]


def _work_name(folder: str) -> str:
    """The name of a bake's staging folder: the bake's name, with its place before it if that is not bakes/."""
    place, _, name = folder.rpartition("/")
    return name if place == BAKES else f"{place}@{name}"


def folder_of(work: Path) -> str | None:
    """The folder of the bake that ``work`` stages; None for another name."""
    place, at, name = work.name.removesuffix(PARTIAL).rpartition("@")
    place = place if at else BAKES
    written = BAKE_NAME.fullmatch(name) and name not in RESERVED_BAKE_NAMES and place in BAKED
    return f"{place}/{name}" if written and _work_name(f"{place}/{name}") + PARTIAL == work.name else None


def _occupied(folder: Path) -> bool:
    """Whether ``folder`` holds anything except files of systems and our unfinished work."""
    return any(entries(folder))


def _is_half_filled(paths: StagingPaths) -> bool:
    """Whether publishing was filling the folder of a whole overlay and stopped between two manifests."""
    journal = Journal.read(paths.journal)
    if journal.replaced is None or not (paths.payload / MANIFEST_NAME).is_file() or is_overlay(paths.target):
        return False
    if paths.base is not None or journal.replaced:
        return True
    # A folder that did not exist when the work began may hold anything by now.
    names = (path.relative_to(paths.target).as_posix() for path in _files_below(paths.target))
    return all(name in journal.records for name in names if not is_foreign(name))


def remove_below(root: Path, keep: Collection[str] = ()) -> None:
    """Remove every file below ``root`` except those in ``keep``, and empty folders; does not follow links."""
    if root.is_dir():
        for path in list(_files_below(root)):
            if path.relative_to(root).as_posix() not in keep:
                path.unlink()
        _remove_empty(root)


def _settle(paths: StagingPaths, journal: Journal, reporter: Reporter) -> None:
    """Finish or undo one publishing that has begun."""
    paths.refuse_links()
    with write_errors(paths.target):
        named = paths.named() if paths.folder else None
        if paths.folder and named is None:
            _take_back(paths, journal)
            return
        if named is not None:  # by a repair, which leaves the bake in the manifest
            begun = set(named) == set(journal.records.values())
        else:
            begun = paths.target.is_dir() and _is_half_filled(paths)
        if begun:
            _place(paths, journal, reporter)
            _clean(paths)
        elif _is_published(paths):
            _clean(paths)


def _is_published(paths: StagingPaths) -> bool:
    """Whether nothing is left to move; a manifest that was moved as a copy may exist twice."""
    left = list(_files_below(paths.payload))
    staged, there = paths.payload / MANIFEST_NAME, paths.target / MANIFEST_NAME
    return not left or (left == [staged] and there.is_file() and there.read_bytes() == staged.read_bytes())


def _place(paths: StagingPaths, journal: Journal, reporter: Reporter) -> None:
    """Move the new version into its place: by one rename, or file by file into an existing folder."""
    paths.target.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(paths.target):
        with contextlib.suppress(OSError):  # then file by file
            paths.payload.rename(paths.target)
            fsync_folder(paths.payload.parent)
            fsync_folder(paths.target.parent)
            return
    _fill(paths, journal, reporter)


def _fill(paths: StagingPaths, journal: Journal, reporter: Reporter) -> None:
    """Move the staged files one by one; a second call goes on. Removes an overlay's manifest first, writes it last."""
    target, payload, prefix = paths.target, paths.payload, paths.prefix
    staged = [path.relative_to(payload).as_posix() for path in _files_below(payload)]
    if not paths.folder:
        (target / MANIFEST_NAME).unlink(missing_ok=True)
        fsync_folder(target)
        staged.remove(MANIFEST_NAME)
    replaced = frozenset(journal.replaced or ())
    _drop_named(target, replaced - {path.removeprefix(prefix) for path in journal.records})
    for name in sorted(staged):
        record = journal.records.get(prefix + name)
        ours = name in replaced or (record is not None and _is_intact(record, paths.overlay, SilentReporter()))
        _clear_the_way(paths, name, ours, reporter)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(target / name)
        move_file(payload / name, target / name)
    for folder in {target, *((target / name).parent for name in staged)}:
        fsync_folder(folder)
    if not paths.folder:
        move_file(payload / MANIFEST_NAME, target / MANIFEST_NAME)
        fsync_folder(target)


def _clear_the_way(paths: StagingPaths, name: str, ours: bool, reporter: Reporter) -> None:
    """Move aside a file that the new file ``name`` must not replace. ``ours``: it may replace a file of its name."""
    home = paths.target / name
    folders = [paths.target / parent for parent in reversed(Path(name).parents)]
    found = next((folder for folder in folders if os.path.lexists(folder) and not _is_folder(folder)), None)
    if found is None and os.path.lexists(home) and (_is_folder(home) or not ours):
        found = home
    if found is None:
        return
    inner = found.relative_to(paths.overlay)
    aside = paths.overlay.parent / f"{paths.overlay.name}.kept" / inner
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside = found.rename(_free_name(aside))
    except OSError:  # another filesystem, or another user's
        _remove_empty(paths.overlay.parent / f"{paths.overlay.name}.kept")
        aside = _free_name(paths.overlay / ".kept" / inner)
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(found, aside)
    reporter.warn(f"{inner}: not ltxpack's, but in the way of a new file; it is now {aside}")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _free_name(path: Path) -> Path:
    """``path``, or a similar name if that exists."""
    while os.path.lexists(path):
        path = path.with_name(f"{path.name}~")
    return path


def _take_back(paths: StagingPaths, journal: Journal) -> None:
    """Undo the publishing of a bake that the manifest does not name: stage its files again, remove the old ones."""
    for path in journal.records:
        home, staged = paths.overlay / path, paths.root / path
        if os.path.lexists(home) and not os.path.lexists(staged) and not _through_link(home, paths.target):
            staged.parent.mkdir(parents=True, exist_ok=True)
            move_file(home, staged)
            fsync_folder(staged.parent)
    _drop_named(paths.target, journal.replaced or ())
    with contextlib.suppress(OSError):
        paths.target.rmdir()


def _clean(paths: StagingPaths) -> None:
    """Remove the staging folder after a publishing."""
    remove_below(paths.work, keep={paths.journal.name})
    paths.journal.unlink(missing_ok=True)
    _remove_if_empty(paths)


def _remove_if_empty(paths: StagingPaths) -> None:
    """Remove the staging folder, and ``.ltxpack`` with the last one in it."""
    with contextlib.suppress(OSError):
        paths.work.rmdir()
        if paths.base is not None:
            paths.work.parent.rmdir()


def _drop_named(folder: Path, names: Iterable[str]) -> None:
    """Remove the files that an old version's manifest named, never through a link to another folder."""
    for path in map(folder.joinpath, names):
        if not _through_link(path, folder):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                path.unlink()
            with contextlib.suppress(OSError):
                for emptied in itertools.takewhile(lambda parent: parent != folder, path.parents):
                    emptied.rmdir()


def _through_link(path: Path, folder: Path) -> bool:
    """Whether a folder between ``folder`` and ``path`` is a link."""
    return any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(folder))


def _is_intact(record: FileRecord, root: Path, reporter: Reporter) -> bool:
    """Whether the file under ``root`` has the size and content of ``record``. Advances ``reporter`` by its size."""
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
    """All files below ``root``; a link to a folder counts as a file."""
    for folder, folders, files in os.walk(root):
        yield from (Path(folder, name) for name in files)
        yield from (path for path in map(Path(folder).joinpath, folders) if path.is_symlink())


def _remove_empty(root: Path) -> None:
    for name, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            Path(name).rmdir()
