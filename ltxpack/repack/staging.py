"""Stop and go on: work is written beside its place, journaled file by file, and published by rename.

A staging folder holds ``journal.jsonl``, ``files/`` (laid out like the overlay) and, while an old version is being
replaced, ``old/``. It is ``.<name>.partial`` beside a new overlay, ``.ltxpack/<name>.partial`` inside an overlay that
gets a bake. Until publishing nothing of it is at its place. ``recover`` finishes or takes back a publishing that was
cut short, so that at every moment either the old or the new version, whole, is what the manifest names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ltxpack.errors import OverlayError
from ltxpack.files.publish import atomic_write, fsync_folder, write_failure
from ltxpack.manifest import (
    BAKE_NAME,
    MANIFEST_NAME,
    RESERVED_BAKE_NAMES,
    FileRecord,
    Manifest,
    is_overlay,
    read_manifest,
)
from ltxpack.repack.journal import Journal, JournalState, is_intact, read_journal
from ltxpack.repack.lock import WORK_FOLDER, OverlayLock, real_target
from ltxpack.reporter import Reporter

JOURNAL_NAME = "journal.jsonl"
PARTIAL = ".partial"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a staging folder and what it stands for are. ``folder``: "" for the overlay, else ``bakes/<name>``."""

    overlay: Path
    folder: str

    @property
    def target(self) -> Path:
        """What appears at the end."""
        return self.overlay / self.folder

    @property
    def work(self) -> Path:
        """The staging folder."""
        if self.folder:
            return self.overlay / WORK_FOLDER / (self.folder.rpartition("/")[2] + PARTIAL)
        return self.overlay.parent / f".{self.overlay.name}{PARTIAL}"

    @property
    def root(self) -> Path:
        """Stands for the overlay while files are written."""
        return self.work / "files"

    @property
    def payload(self) -> Path:
        """What is renamed to ``target``."""
        return self.root / self.folder

    @property
    def old(self) -> Path:
        """Where the version being replaced waits."""
        return self.work / "old"

    @property
    def journal(self) -> Path:
        """The journal's path."""
        return self.work / JOURNAL_NAME

    def refuse_links(self) -> None:
        """A link among the folders would lead what is written or removed out of the overlay. OverlayError."""
        inner = [self.overlay / WORK_FOLDER, *(self.overlay / part for part in self._parts())]
        for path in (*inner, self.work, self.root, *(self.root / part for part in self._parts()), self.old):
            if path.is_symlink():
                raise OverlayError("is a link where only a folder may be", file=path, next=f"remove {path}")

    def _parts(self) -> list[str]:
        parts = self.folder.split("/") if self.folder else []
        return ["/".join(parts[: number + 1]) for number in range(len(parts))]

    def named(self) -> tuple[FileRecord, ...] | None:
        """The files that the overlay's manifest, if it can be read, names for ``folder``."""
        with contextlib.suppress(OverlayError):
            manifest = read_manifest(self.overlay)
            if not self.folder:
                return tuple(manifest.records())
            bake = manifest.bakes.get(self.folder.rpartition("/")[2])
            return bake.files if bake else None
        return None


class Staging:
    """The unfinished version of an overlay, or of one folder (``bakes/<name>``) of an overlay. A context manager.

    ``root`` stands for the overlay: write ``root / path`` and ``record`` each complete file. ``done`` holds what an
    earlier run with the same ``fingerprint`` left complete, checked by content. The overlay is locked meanwhile;
    several stagings of one overlay share the ``lock`` the caller holds. ``force`` allows an existing version to be
    replaced when publishing. Raises OverlayError (in use, exists, cannot be written).
    """

    def __init__(
        self,
        overlay: Path,
        fingerprint: str,
        reporter: Reporter,
        *,
        folder: str = "",
        lock: OverlayLock | None = None,
        force: bool = False,
    ) -> None:
        self.place = Place(real_target(overlay), folder)
        self.fingerprint = fingerprint
        self.done: dict[str, FileRecord] = {}
        self._reporter = reporter
        self._own_lock = lock is None
        self._lock = lock or OverlayLock(overlay, reporter)
        self._force = force
        self._published = False
        self._journal: Journal | None = None

    @property
    def root(self) -> Path:
        """Where files are written; stands for the overlay."""
        return self.place.root

    def __enter__(self) -> Self:
        if self._own_lock:
            self._lock.__enter__()
        try:
            with _telling(self.place.work):
                recover(self.place.overlay, self._reporter)
                self._refuse_existing()
                self._open()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        if kind and issubclass(kind, KeyboardInterrupt) and not self._published:
            self._reporter.note(
                f"stopped; {len(self.done)} finished files are kept, the same command goes on from there"
            )

    def record(self, record: FileRecord) -> None:
        """``record``'s file under ``root`` is complete and on the disk."""
        assert self._journal is not None
        self._journal.record(record)
        self.done[record.path] = record

    def publish(self, manifest: bytes) -> None:
        """Put the new overlay, with this manifest, in its place. Only for a staging of a whole overlay."""
        assert not self.place.folder
        with _telling(self.place.target):
            self.root.mkdir(parents=True, exist_ok=True)
            atomic_write(self.root / MANIFEST_NAME, manifest)
            self._announce()
            self._lock.hold_folder(self.place.payload)
            _swap(self.place)
            self._published = True
            self._close_and_clean()

    def _leave(self) -> None:
        if self._journal:
            self._journal.close()
        if self._own_lock:
            self._lock.__exit__(None, None, None)

    def _refuse_existing(self) -> None:
        place, target = self.place, self.place.target
        place.refuse_links()
        if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
            return
        if place.folder and place.named() is None:
            return
        if not is_overlay(place.overlay):
            raise OverlayError(
                "exists and is not an overlay",
                file=target,
                expected=f"a new or empty folder, or one with {MANIFEST_NAME}",
                next="choose another folder",
            )
        if not self._force:
            raise OverlayError("exists already", file=target, next="the same command with --force replaces it")

    def _open(self) -> None:
        """Keep what the journal vouches for, remove everything else, start the journal."""
        work = self.place.work
        work.mkdir(parents=True, exist_ok=True)
        state = read_journal(self.place.journal)
        if state.fingerprint == self.fingerprint:
            self.done = self._checked(state)
        elif state.records:
            self._reporter.note(f"{work}: work left by a run with other inputs is discarded")
        _sweep(self.root, keep=set(self.done))
        self.root.mkdir(exist_ok=True)
        fsync_folder(work.parent)
        self._journal = Journal(self.place.journal, self.fingerprint, self.done.values())

    def _checked(self, state: JournalState) -> dict[str, FileRecord]:
        records = state.records.values()
        if not records:
            return {}
        self._reporter.begin("checking what is done", sum(record.size for record in records), "B")
        good = {record.path: record for record in records if is_intact(record, self.root, self._reporter)}
        self._reporter.end()
        self._reporter.note(f"going on: {len(good)} of {len(records)} finished files are intact and kept")
        return good

    def _announce(self) -> None:
        """From here on ``recover`` knows that this may be half in its place."""
        assert self._journal is not None
        for name, _, _ in os.walk(self.place.work):
            fsync_folder(name)
        prefix = f"{self.place.folder}/" if self.place.folder else ""
        named = self.place.named() if os.path.lexists(self.place.target) else None
        replaced = [record.path.removeprefix(prefix) for record in named or ()]
        self._journal.publishing([*replaced, MANIFEST_NAME] if not prefix else replaced)

    def _close_and_clean(self) -> None:
        assert self._journal is not None
        self._journal.close()
        _clean(self.place, read_journal(self.place.journal), self._reporter)


def publish_bakes(stagings: Sequence[Staging], manifest: Manifest) -> None:
    """Put the bakes of ``stagings`` (one overlay) in their places, then the overlay's ``manifest`` that names them.

    Bakes that are replaced leave the manifest first: the overlay is valid at every moment. Raises OverlayError.
    """
    overlay = stagings[0].place.overlay
    path = overlay / MANIFEST_NAME
    with _telling(path):
        for staging in stagings:
            staging._announce()
        before = read_manifest(overlay)
        names = {staging.place.target.name for staging in stagings}
        kept = {name: bake for name, bake in before.bakes.items() if name not in names}
        if len(kept) < len(before.bakes):
            atomic_write(path, dataclasses.replace(before, bakes=kept).dump(), folder=stagings[0].place.work)
        for staging in stagings:
            _swap(staging.place)
        atomic_write(path, manifest.dump(), folder=stagings[0].place.work)
        for staging in stagings:
            staging._published = True
            staging._close_and_clean()


def recover(overlay: Path, reporter: Reporter) -> tuple[str, ...]:
    """Finish or take back what a killed publishing left of ``overlay``. Call it under the OverlayLock.

    Returns the fingerprints of the publishings that turned out to be complete. Staging does this by itself.
    """
    overlay = real_target(overlay)
    found = [path.name.removesuffix(PARTIAL) for path in sorted((overlay / WORK_FOLDER).glob(f"*{PARTIAL}"))]
    names = [name for name in found if BAKE_NAME.fullmatch(name) and name not in RESERVED_BAKE_NAMES]
    places = [Place(overlay, ""), *(Place(overlay, f"bakes/{name}") for name in names)]
    complete = []
    for place in places:
        state = read_journal(place.journal)
        if state.replaced is not None and _settle(place, state, reporter):
            complete.append(state.fingerprint)
        _remove_if_empty(place)
    return tuple(complete)


def unfinished(overlay: Path) -> list[Path]:
    """The staging folders of ``overlay`` that are there."""
    overlay = real_target(overlay)
    beside = overlay.parent / f".{overlay.name}{PARTIAL}"
    return [path for path in (beside, *sorted((overlay / WORK_FOLDER).glob(f"*{PARTIAL}"))) if path.is_dir()]


def remove_below(root: Path) -> None:
    """Remove the staging folder ``root`` with all it holds; links in it are removed, never followed."""
    _sweep(root, keep=set())


def _settle(place: Place, state: JournalState, reporter: Reporter) -> bool:
    """Make one begun publishing whole again. Returns whether it was complete."""
    place.refuse_links()
    with _telling(place.target):
        if not place.payload.exists() and (not place.folder or place.named() is not None):
            _clean(place, state, reporter)
            return True
        if not place.folder:
            if place.old.exists() and not os.path.lexists(place.target):
                place.old.rename(place.target)
        elif place.payload.exists():
            if place.named() is None:
                _drop_named(place.target, state)
                _drop_old(place, state, reporter)
        elif place.target.exists():
            place.payload.parent.mkdir(parents=True, exist_ok=True)
            place.target.rename(place.payload)
            _drop_old(place, state, reporter)
    return False


def _swap(place: Place) -> None:
    """Move the old version aside, the new one in its place."""
    place.target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(place.target):
        place.target.rename(place.old)
        fsync_folder(place.target.parent)
    place.payload.rename(place.target)
    fsync_folder(place.payload.parent)
    fsync_folder(place.target.parent)


def _clean(place: Place, state: JournalState, reporter: Reporter) -> None:
    """After a publishing: what the old manifest named goes, foreign files move to the new version."""
    _drop_old(place, state, reporter)
    _sweep(place.work, keep={JOURNAL_NAME})
    place.journal.unlink(missing_ok=True)
    _remove_if_empty(place)


def _remove_if_empty(place: Place) -> None:
    """The staging folder, and ``.ltxpack`` with the last one in it."""
    with contextlib.suppress(OSError):
        place.work.rmdir()
        if place.folder:
            place.work.parent.rmdir()


def _drop_old(place: Place, state: JournalState, reporter: Reporter) -> None:
    """Remove the old version; files in it that its manifest did not name move to the new one, or aside."""
    _drop_named(place.old, state)
    if not place.old.is_dir():
        return
    for path in list(_files_below(place.old)):
        name = path.relative_to(place.old)
        home = place.target / name
        if os.path.lexists(home):
            home = place.overlay.parent / f"{place.overlay.name}.kept" / place.folder / name
            reporter.warn(f"{name}: not ltxpack's, but in the way of a new file; it is now {home}")
        home.parent.mkdir(parents=True, exist_ok=True)
        path.rename(home)
    _remove_empty(place.old)


def _drop_named(folder: Path, state: JournalState) -> None:
    """Remove the files of the old version that its manifest named, never through a link to elsewhere."""
    if not folder.is_dir():
        return
    for name in state.replaced or ():
        path = folder / name
        if not any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(folder)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
    _remove_empty(folder)


def _sweep(root: Path, keep: set[str]) -> None:
    """Remove every file below ``root`` whose path is not in ``keep``, and empty folders."""
    if not root.is_dir():
        return
    for path in _files_below(root):
        if path.relative_to(root).as_posix() not in keep:
            path.unlink()
    _remove_empty(root)


def _files_below(root: Path) -> Iterator[Path]:
    """Everything below ``root`` that is not a folder; a link to a folder counts as a file."""
    for folder, folders, files in os.walk(root):
        yield from (Path(folder, name) for name in files)
        yield from (path for path in map(Path(folder).joinpath, folders) if path.is_symlink())


def _remove_empty(root: Path) -> None:
    for name, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            Path(name).rmdir()


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_failure(error, Path(error.filename or path)) from None
