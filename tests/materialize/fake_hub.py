"""A hub that serves folders of this machine and notes what was asked of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ltxpack.errors import SourceError
from ltxpack.materialize.hub.client import Hub, RepoFile

COMMIT = "c0ffee" + "0" * 34


class FakeHub(Hub):
    """``repos``: repo id -> folder, or the SourceError to raise. Large files have a sha256, as on a hub."""

    def __init__(self, repos: dict[str, Path | SourceError]) -> None:
        self.repos = repos
        self.asked: list[tuple[str, ...]] = []

    def files(self, repo: str, revision: str | None = None) -> dict[str, RepoFile]:
        self.asked.append(("files", repo, revision or ""))
        folder = self.repos.get(repo, SourceError("there is no such repository", file=repo))
        if isinstance(folder, SourceError):
            raise folder
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if name.endswith(".safetensors") else None
                files[name] = RepoFile(repo, COMMIT, name, path.stat().st_size, sha256, revision)
        return files

    def header(self, file: RepoFile) -> bytes:
        self.asked.append(("header", file.repo, file.name))
        data = self.path(file).read_bytes()
        return data[: 8 + int.from_bytes(data[:8], "little")]

    def fetch(self, file: RepoFile) -> Path:
        self.asked.append(("fetch", file.repo, file.name))
        return self.path(file)

    def path(self, file: RepoFile) -> Path:
        folder = self.repos[file.repo]
        assert isinstance(folder, Path)
        return folder / file.name

    def fetched(self, ending: str = ".safetensors") -> list[str]:
        """Names of the files, of weights only or of any ``ending``, that were fetched whole."""
        return [name for what, _, name in self.asked if what == "fetch" and name.endswith(ending)]
