"""Input files and folders, on this machine or on the hub: finds the ones that a text names, reads and fetches them.

Reads headers and small files; fetches weights only when asked. Knows no roles of an overlay's inputs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ltxpack.errors import FormatError, SourceError, UsageError, one_line
from ltxpack.files import tensorfile
from ltxpack.files.foreign import entries, finished_name, is_foreign, refuse_unfinished
from ltxpack.files.typed import at_home, denied, similar_names, similar_paths
from ltxpack.ltx23.releases import RELEASES, Recognised, recognise
from ltxpack.materialize.hub.client import Hub, RepoFile, cached_sha256, parse_reference
from ltxpack.materialize.hub.errors import Reference
from ltxpack.reporter import Reporter

WEIGHTS = ".safetensors"
# Weights that are found only to be refused by name.
OTHER_WEIGHTS = (".gguf", ".ckpt", ".pt", ".pth")
# Endings of files that may enter an overlay besides weights.
TEXT_ENDINGS = (".json", ".jinja", ".txt")
MAX_CONFIG_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class InputFile:
    """One input file. ``path``: the real file here, or its future path in the hub cache.

    ``name`` is printable. ``repo``: the file on the hub, with its repo and commit; None for a local file. ``member``:
    its name within the repo, or the path at which a local file was found.
    """

    name: str
    size: int
    sha256: str | None
    path: Path
    repo: RepoFile | None
    member: str

    @property
    def label(self) -> str:
        return f"{self.repo.repo}/{self.member}" if self.repo else self.member

    @property
    def known(self) -> Recognised:
        return recognise(self.name, self.size, self.sha256)

    @property
    def distilled_by(self) -> str | None:
        """The evidence for a distilled checkpoint: hash, size (each published file has its own) or name; else None."""
        by_size = next((release for release in RELEASES if release.size == self.size), None)
        known = (("hash", self.known.release), ("size", by_size))
        by, name = next(((by, release.name) for by, release in known if release), ("file name", self.name.lower()))
        return by if "distilled" in name else None


@dataclass(frozen=True)
class InputFolder:
    """A local folder, a repo on the hub, or a folder of one: ``files`` by relative path, local ones one level deep.

    ``repo`` is None for a local folder. ``broken``: name of an unusable file -> reason.
    """

    label: str
    files: Mapping[str, InputFile]
    repo: str | None = None
    broken: Mapping[str, str] = field(default_factory=dict)

    def own(self, *endings: str) -> dict[str, InputFile]:
        """The files with one of ``endings``, in any case, that are in no subfolder."""
        return {name: file for name, file in self.files.items() if "/" not in name and name.lower().endswith(endings)}

    def find(self, name: str) -> InputFile | InputFolder | None:
        """The file or subfolder ``name``, which may omit the ending of a weights file."""
        file = self.files.get(name) or self.files.get(name + WEIGHTS)
        prefix = name.strip("/") + "/"
        inside = {other[len(prefix) :]: file for other, file in self.files.items() if other.startswith(prefix)}
        broken = {other[len(prefix) :]: why for other, why in self.broken.items() if other.startswith(prefix)}
        return file or (InputFolder(f"{self.label}/{name}", inside, self.repo, broken) if inside else None)


class Access:
    """Reads inputs from disk or hub, each header once. Asks the hub only for inputs that are on it."""

    def __init__(self, reporter: Reporter, hub: Hub | None = None) -> None:
        self._reporter = reporter
        self._hub = hub
        self._listed: dict[tuple[str, str | None], Mapping[str, RepoFile]] = {}
        self._headers: dict[Path, tensorfile.TensorFile] = {}

    @property
    def hub(self) -> Hub:
        """The hub client, made at first use: it imports huggingface_hub."""
        self._hub = self._hub or Hub(reporter=self._reporter)
        return self._hub

    def listed(self, repo: str, revision: str | None = None) -> Mapping[str, RepoFile]:
        """A repo's files at a revision; asks the hub once."""
        key = (repo, revision)
        if key not in self._listed:
            self._listed[key] = self.hub.files(repo, revision)
        return self._listed[key]

    def header(self, file: InputFile) -> tensorfile.TensorFile:
        """The header of a safetensors file. Raises FormatError, or SourceError, also for half a download."""
        if file.path not in self._headers:
            if file.repo is None:
                refuse_unfinished(file.member)
                self._headers[file.path] = tensorfile.read_tensorfile(file.path)
            else:
                head = self.hub.header(file.repo)
                self._headers[file.path] = tensorfile.parse_header(head, file.size, file.label)
        return self._headers[file.path]

    def refuse_changed(self) -> None:
        """Raises SourceError for a local file that has changed since its header was read."""
        for path, header in self._headers.items():
            if header.stamp is not None and header.stamp != tensorfile.read_tensorfile(path).stamp:
                advice = "wait until nothing writes it, then run the same command again"
                raise SourceError("has changed while it was read", file=path, next=advice)

    def json(self, file: InputFile) -> Any:
        """A JSON file written by another library, with numbers of any size. Raises SourceError or FormatError."""
        return tensorfile.read_json(self._small(file, MAX_CONFIG_BYTES), MAX_CONFIG_BYTES, any_number=True)

    def index(self, file: InputFile) -> Mapping[str, str]:
        """A shard index: tensor name → file name. Raises SourceError or FormatError."""
        return tensorfile.read_index(self._small(file, tensorfile.MAX_INDEX_BYTES))

    def fetch(self, file: InputFile) -> None:
        """Fetch the file to its ``path``. Raises SourceError if it is not the file of the plan."""
        if file.repo is None:
            return
        path = self.hub.fetch(file.repo)
        size = path.stat().st_size
        if size != file.size:
            raise SourceError("arrived with another size", file=file.label, expected=file.size, found=size)
        planned = self._headers.get(file.path)
        if planned is not None:
            arrived = tensorfile.read_tensorfile(path)
            if (arrived.tensors, arrived.metadata) != (planned.tensors, planned.metadata):
                raise SourceError("arrived with another header than the hub sent before", file=file.label)

    def _small(self, file: InputFile, max_bytes: int) -> Path:
        """The path of a small file, after fetching it. Refuses a file that is too large without fetching it."""
        if file.size > max_bytes:
            most, found = f"at most {max_bytes} bytes", f"{file.size} bytes"
            raise FormatError("is too large", file=file.label, expected=most, found=found)
        self.fetch(file)
        return file.path


def find_input(
    typed: str, access: Access, *, revision: str | None = None, within: InputFolder | None = None
) -> InputFile | InputFolder:
    """The file or folder that ``typed`` names: on this machine, ``within`` SOURCE, or on the hub."""
    path = at_home(typed)
    if os.path.exists(path):  # noqa: PTH110 (a Path raises for what it may not look at, or is too long)
        if revision is not None:
            raise UsageError("--revision is for a hub repo", found=f"{typed}, which is on this machine")
        return local_folder(path) if path.is_dir() else local_file(path)
    inside = within.find(typed) if within else None
    if inside is not None:
        return inside
    reference = hub_reference(typed)
    if reference is None:
        where = f", a name within {within.label}" if within else ""
        expected = f"a file or folder{where}, or a hub repo as OWNER/NAME"
        raise SourceError(
            denied(path) or "does not exist", file=typed, expected=expected,
            items=similar_paths(path) or similar_names(typed, within.files if within else ()),
        )  # fmt: skip
    if revision is not None and reference.revision:
        raise UsageError("the revision is given twice", found=f"{typed} and --revision {revision}")
    folder = hub_folder(reference.repo, revision or reference.revision, access, path)
    if reference.file is None:
        return folder
    found = folder.find(reference.file)
    if found is None:
        close = similar_names(reference.file, folder.files)
        raise SourceError("is not in the repo", file=typed, expected=f"a file of {folder.label}", items=close)
    return found


def local_file(path: Path) -> InputFile:
    """A file on this machine; for a symlink, the real file is read and linked. Raises SourceError."""
    try:
        real = path.resolve(strict=True)
        size = real.stat().st_size
    except (OSError, RuntimeError) as error:
        raise SourceError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=path) from None
    # In an overlay the ending is in lower case, and the manifest is UTF-8, which a name may not be.
    name = one_line(path.name)
    name = name[: -len(WEIGHTS)] + WEIGHTS if name.lower().endswith(WEIGHTS) else name
    return InputFile(name, size, cached_sha256(path), real, None, str(path))


def local_folder(folder: Path) -> InputFolder:
    """The files that may enter an overlay, in ``folder`` and in its subfolders with a config.json."""
    endings = (WEIGHTS, *TEXT_ENDINGS, *OTHER_WEIGHTS)
    try:
        inner = (path for path in entries(folder) if os.path.isfile(path / "config.json"))  # noqa: PTH113 (a Path raises)
        folders = [folder, *inner]
        there = {path.relative_to(folder).as_posix(): path for place in folders for path in entries(place)}
        found = {name: path for name, path in sorted(there.items()) if name.lower().endswith(endings)}
        files = {name: local_file(path) for name, path in found.items() if path.is_file()}
        links = {name: path for name, path in found.items() if path.is_symlink() and name not in files}
        broken = {name: f"a link to {path.readlink()}, which is not there" for name, path in links.items()}
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=folder) from None
    halves = {name: finished for name in there if (finished := finished_name(name)) and finished not in files}
    broken |= {name: "a download that did not finish" for name, end in halves.items() if end.lower().endswith(WEIGHTS)}
    return InputFolder(str(folder), files, broken=broken)


def hub_folder(repo: str, revision: str | None, access: Access, typed: Path | None = None) -> InputFolder:
    """A repo on the hub. ``typed``: the local path that the user may have meant, named if there is no such repo."""
    try:
        listed = access.listed(repo, revision)
    except SourceError as error:
        if typed is None or not os.path.isdir(typed.parent):  # noqa: PTH112 (a Path raises where it may not look)
            raise
        raise SourceError(
            f"{error.problem}; nor is there such a file or folder here", file=str(typed), expected=error.expected,
            found=error.found, items=error.items or similar_paths(typed), next=error.next,
        ) from None  # fmt: skip
    files = {
        name: InputFile(PurePosixPath(name).name, file.size, file.sha256, access.hub.path(file), file, name)
        for name, file in listed.items()
        if name.endswith((WEIGHTS, *TEXT_ENDINGS, *OTHER_WEIGHTS))
        and not is_foreign(name)
        and all(tensorfile.plain_file_name(part) for part in name.split("/"))
    }
    return InputFolder(repo if revision is None else f"{repo}@{revision}", files, repo)


def folder_of(file: InputFile, access: Access) -> InputFolder:
    """The folder of a local file, or the repo of one on the hub."""
    if file.repo is None:
        return local_folder(Path(file.member).parent)
    return hub_folder(file.repo.repo, file.repo.revision, access)


def hub_reference(typed: str) -> Reference | None:
    """``typed`` as a place on the hub; None if it can only be a path. Raises UsageError for other web addresses."""
    if typed.startswith((".", "/", "~")):
        return None
    try:
        reference = parse_reference(typed)
    except UsageError:
        if typed.startswith(("http:", "https:")):
            raise
        return None
    return None if reference.file is None and typed.endswith(WEIGHTS) else reference
