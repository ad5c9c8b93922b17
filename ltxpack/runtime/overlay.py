"""An overlay as the runtime sees it: its manifest, its folders, and whether their bytes are still as written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ltxpack.errors import OverlayError, SourceError, quoted
from ltxpack.files.hashing import hash_file
from ltxpack.ltx23.classes import LOADED_CLASSES
from ltxpack.manifest import FileRecord, Manifest, changed_file, read_manifest

BASE = "base"


@dataclass(frozen=True)
class Overlay:
    """An overlay folder and its validated manifest."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: Path) -> Overlay:
        """Read the manifest; every file must be there in its size, every component of its class.

        Raises OverlayError. Contents are checked by :meth:`check` when a part is used.
        """
        overlay = cls(root, read_manifest(root))
        for name, wanted in LOADED_CLASSES.items():
            component = overlay.manifest.components.get(name)
            found = component and component.class_name
            if found != wanted:
                raise OverlayError(
                    f"component {name} is not what this runtime loads",
                    file=root,
                    expected=wanted,
                    found=found,
                    next=f"ltxpack materialize SOURCE {quoted(root)} --force",
                )
        for record in overlay.manifest.records():
            overlay._check_size(record)
        return overlay

    def folder(self, part: str) -> Path:
        """The folder of a component."""
        return self.root / part

    def transformer_folder(self, name: str) -> Path:
        """The folder of the base transformer or of a bake."""
        return self.root / "transformer" if name == BASE else self.root / "bakes" / name

    def transformer_records(self, name: str) -> tuple[FileRecord, ...]:
        """The files of the base transformer or of a bake."""
        manifest = self.manifest
        return manifest.components["transformer"].files if name == BASE else manifest.bakes[name].files

    def records(self, component: str) -> tuple[FileRecord, ...]:
        """The files of a component."""
        return self.manifest.components[component].files

    def check(self, records: Iterable[FileRecord]) -> None:
        """Compare files with the blake3 in the manifest. Raises OverlayError for the first that changed.

        The hash is taken through the page cache, so the load that follows does not read the disk again.
        """
        for record in records:
            self._check_size(record)
            path = self.root / record.path
            try:
                digest = hash_file(path, cached=True)
            except SourceError as error:
                raise changed_file(path, "readable", error.problem) from None
            if digest != record.blake3:
                raise changed_file(path, f"blake3 {record.blake3}", f"blake3 {digest}")

    def _check_size(self, record: FileRecord) -> None:
        path = self.root / record.path
        if not path.is_file():
            raise changed_file(path, f"a file of {record.size} bytes", "none")
        size = path.stat().st_size
        if size != record.size:
            raise changed_file(path, f"{record.size} bytes", size)
