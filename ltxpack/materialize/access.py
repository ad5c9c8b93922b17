"""Reading the inputs, wherever they are: headers and small files at once, whole files only when all is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ltxpack.errors import FormatError, SourceError
from ltxpack.files.tensorfile import (
    MAX_INDEX_BYTES,
    TensorFile,
    TensorIndex,
    parse_header,
    read_index,
    read_json,
    read_tensorfile,
)
from ltxpack.ltx23.releases import cached_sha256
from ltxpack.materialize.hub.client import RepoInfo

MAX_CONFIG_BYTES = 16 * 1024 * 1024


class HubLike(Protocol):
    """What of hub.Hub is used here."""

    def info(self, repo: str, revision: str | None = None) -> RepoInfo:
        """The repo at a revision."""

    def header(self, info: RepoInfo, name: str) -> bytes:
        """The first bytes of a safetensors file."""

    def fetch(self, info: RepoInfo, name: str) -> Path:
        """The file on this machine."""


@dataclass(frozen=True)
class Located:
    """One input file. ``path``: the real file on this machine, None while it is only on the hub (``repo``).

    ``member``: its name within the repo, or for a local file the path as it was found.
    """

    name: str
    size: int
    sha256: str | None
    path: Path | None
    repo: RepoInfo | None = None
    member: str = ""

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.repo.repo}/{self.member}" if self.repo else self.member


def located(path: Path) -> Located:
    """A file on this machine; behind a symlink the real file is what is read and linked. Raises SourceError."""
    try:
        real = path.resolve(strict=True)
        size = real.stat().st_size
    except (OSError, RuntimeError) as error:
        raise SourceError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=path) from None
    return Located(path.name, size, cached_sha256(path), real, None, str(path))


def read_config(path: Path) -> Any:
    """A JSON file written by another library: tokenizer configs hold any number ("no limit" is 10**30 there).

    Raises SourceError or FormatError.
    """
    return read_json(path, MAX_CONFIG_BYTES, any_number=True)


class Access:
    """Reads inputs. The hub is only touched (and its library imported) when something is on it."""

    def __init__(self, make_hub: Callable[[], HubLike]) -> None:
        self._make_hub = make_hub
        self._hub: HubLike | None = None
        self._infos: dict[tuple[str, str | None], RepoInfo] = {}
        self._headers: dict[tuple[str, int], TensorFile] = {}

    @property
    def hub(self) -> HubLike:
        """The hub client, made at first use."""
        if self._hub is None:
            self._hub = self._make_hub()
        return self._hub

    def info(self, repo: str, revision: str | None = None) -> RepoInfo:
        """A repo's files at a revision, asked for once."""
        key = (repo, revision)
        if key not in self._infos:
            self._infos[key] = self.hub.info(repo, revision)
        return self._infos[key]

    def header(self, file: Located) -> TensorFile:
        """The header of a safetensors file; ``path`` of the answer is only real for a file on this machine."""
        if file.path is not None:
            return read_tensorfile(file.path)
        key = (file.label, file.size)
        if key not in self._headers:
            self._headers[key] = parse_header(self.hub.header(self._repo(file), file.member), file.size, file.label)
        return self._headers[key]

    def json(self, file: Located) -> Any:
        """A library's config file. Raises FormatError."""
        return read_config(self._small(file, MAX_CONFIG_BYTES))

    def index(self, file: Located) -> TensorIndex:
        """A shard index."""
        return read_index(self._small(file, MAX_INDEX_BYTES))

    def fetch(self, file: Located) -> Located:
        """The same file, on this machine. Raises SourceError."""
        if file.path is not None:
            return file
        path = self.hub.fetch(self._repo(file), file.member)
        fetched = located(path)
        if fetched.size != file.size:
            raise SourceError("arrived with another size", file=file.label, expected=file.size, found=fetched.size)
        return dataclasses.replace(file, path=fetched.path, sha256=file.sha256 or fetched.sha256)

    def _small(self, file: Located, max_bytes: int) -> Path:
        if file.size > max_bytes:  # told before it is fetched
            raise FormatError(
                "is too large", file=file.label, expected=f"at most {max_bytes} bytes", found=f"{file.size} bytes"
            )
        path = self.fetch(file).path
        assert path is not None
        return path

    @staticmethod
    def _repo(file: Located) -> RepoInfo:
        assert file.repo is not None
        return file.repo
