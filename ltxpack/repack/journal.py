"""The journal of unfinished work: which plan it belongs to and which files are complete. JSON, one line each.

It is trusted only as far as it can be checked: a torn or odd line and all after it are dropped, and a file counts as
complete only if it has the size and the content that the journal states.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ltxpack.errors import SourceError
from ltxpack.files import bounded_json
from ltxpack.files.hashing import hash_file
from ltxpack.files.publish import atomic_write, write_errors
from ltxpack.files.tensorfile import open_source
from ltxpack.manifest import FileRecord, safe_relative_path
from ltxpack.reporter import Reporter

FORMAT = 1
# A line is some 200 bytes; more than this is not read.
MAX_BYTES = 16 * 1024 * 1024


@dataclass
class JournalState:
    """What a journal says. ``replaced``: None, or (once publishing began) the old files to remove."""

    fingerprint: str = ""
    records: dict[str, FileRecord] = field(default_factory=dict)
    replaced: tuple[str, ...] | None = None


class Journal:
    """Appends to a journal; every line is on the disk before ``append`` returns."""

    def __init__(self, path: Path, fingerprint: str, records: Iterable[FileRecord]) -> None:
        """Start ``path`` afresh with these records. Raises OverlayError if it cannot be written."""
        lines: list[dict[str, Any]] = [{"journal": FORMAT, "fingerprint": fingerprint}]
        lines += [dataclasses.asdict(record) for record in records]
        self._path = path
        with write_errors(path):
            atomic_write(path, b"".join(map(_line, lines)))
            self._file: BinaryIO = path.open("ab", buffering=0)

    def record(self, record: FileRecord) -> None:
        """``record`` is complete and on the disk."""
        self._append(dataclasses.asdict(record))

    def publishing(self, replaced: Iterable[str]) -> None:
        """All is complete and is now moved into place; ``replaced``: paths of the old version to remove."""
        self._append({"publishing": sorted(replaced)})

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def _append(self, entry: dict[str, Any]) -> None:
        with write_errors(self._path):
            self._file.write(_line(entry))
            os.fsync(self._file.fileno())


def read_journal(path: Path) -> JournalState:
    """What the journal at ``path`` says; empty if there is none or it is not one of this version."""
    state = JournalState()
    try:
        lines = _lines(path)
        first = bounded_json.parse(lines[0])
        if first["journal"] != FORMAT:
            return state
        state.fingerprint = str(first["fingerprint"])
        for line in lines[1:]:
            entry = bounded_json.parse(line)
            if "publishing" in entry:
                state.replaced = tuple(path for path in entry["publishing"] if safe_relative_path(path))
            elif safe_relative_path(entry["path"]) and type(entry["size"]) is int:
                record = FileRecord(**entry)
                state.records[record.path] = record
    except (SourceError, OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return state


def _lines(path: Path) -> list[bytes]:
    """The whole lines. Raises SourceError, OSError or JsonFault."""
    with open_source(path) as file:
        data = file.read(min(os.fstat(file.fileno()).st_size, MAX_BYTES))
    bounded_json.refuse_crowded(data)
    return data.split(b"\n")[:-1]


def is_intact(record: FileRecord, root: Path, reporter: Reporter) -> bool:
    """Whether the file under ``root`` is what ``record`` says, by size and content. Advances by its size."""
    path = root / record.path
    try:
        status = path.lstat()
        if record.link not in (None, "hard"):
            return stat.S_ISLNK(status.st_mode) and os.readlink(path) == record.link  # noqa: PTH115 (a Path would tidy it)
        if not stat.S_ISREG(status.st_mode) or status.st_size != record.size:
            return False
    except OSError:
        return False
    return hash_file(path, reporter) == record.blake3


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"
