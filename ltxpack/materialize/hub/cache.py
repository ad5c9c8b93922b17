"""The hub cache on disk, in the layout huggingface_hub documents; asks nothing of the network.

A repository's folder holds ``refs/REVISION`` (a commit), ``snapshots/COMMIT/NAME`` (links) and ``blobs/HASH`` (the
bytes, named by sha256 for large files, by git's hash for small ones).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

from ltxpack.errors import SourceError
from ltxpack.materialize.hub.errors import Place
from ltxpack.materialize.hub.listing import COMMIT, SHA256, RepoFile, RepoInfo, is_safe_name
from ltxpack.reporter import Reporter

LOCK_PATIENCE = 1.0


class HubCache:
    """The cache below the folder ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, repo: str) -> Path:
        """Everything the cache has of ``repo``."""
        from huggingface_hub.file_download import repo_folder_name

        return self.root / repo_folder_name(repo_id=repo, repo_type="model")

    def blob(self, repo: str, etag: str) -> Path:
        """Where the bytes stored under ``etag`` belong."""
        return self.folder(repo) / "blobs" / etag

    def snapshot(self, repo: str, revision: str | None) -> RepoInfo | None:
        """What the cache has of ``repo`` at ``revision`` (a branch, tag or whole commit), None for nothing."""
        folder = self.folder(repo)
        commit = revision or "main"
        if not COMMIT.fullmatch(commit):
            try:
                commit = (folder / "refs" / commit).read_text(encoding="ascii").strip()
            except (OSError, ValueError):
                return None
        snapshot = folder / "snapshots" / commit
        if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
            return None
        names = {path: path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*"))}
        files = {
            name: RepoFile(name, path.stat().st_size, _stated_sha256(path))
            for path, name in names.items()
            if path.is_file() and is_safe_name(name)
        }
        return RepoInfo(repo, commit, MappingProxyType(files), revision, cached_only=True) if files else None

    def file(self, info: RepoInfo, file: RepoFile, place: Place) -> Path | None:
        """The file in the snapshot, None if it is not there. Raises SourceError if it is another one."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(info.repo, file.name, cache_dir=self.root, revision=info.commit)
        if not isinstance(found, str):
            return None
        path = Path(found)
        check_cached(path, file, place)
        return path

    def remember_revision(self, info: RepoInfo) -> None:
        """Notes which commit the revision asked for is, so that it is found without a network."""
        revision = info.revision or "main"
        if revision == info.commit:
            return
        ref = self.folder(info.repo) / "refs" / revision
        draft = ref.with_name(f"{ref.name}.{secrets.token_hex(4)}.tmp")
        # A cache that cannot be written, shared by many, still serves its files.
        with contextlib.suppress(OSError):
            if ref.is_file() and ref.read_text(encoding="ascii") == info.commit:
                return
            ref.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(info.commit, encoding="ascii")
            draft.replace(ref)

    @contextlib.contextmanager
    def locked(self, repo: str, etag: str, reporter: Reporter) -> Iterator[None]:
        """Holds the lock that huggingface_hub takes for the same blob."""
        from filelock import Timeout
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        path = self.root / ".locks" / self.folder(repo).name / f"{etag}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(path, timeout=LOCK_PATIENCE))
            except Timeout:
                reporter.note(f"another process is downloading the same file of {repo}; waiting for it")
                stack.enter_context(WeakFileLock(path))
            yield


def check_cached(path: Path, file: RepoFile, place: Place) -> None:
    """Raises SourceError if what is cached at ``path`` is not what the hub states."""
    size, stored_as = path.stat().st_size, blob_name(path)
    wrong_hash = file.sha256 is not None and stored_as is not None and stored_as != file.sha256
    if size == file.size and not wrong_hash:
        return
    raise SourceError(
        "the file in the hub cache is not the one the hub states",
        file=place.label,
        expected=f"{file.size} bytes" + (f" of sha256 {file.sha256}" if wrong_hash else ""),
        found=f"{size} bytes" + (f" stored as {stored_as}" if wrong_hash else ""),
        next=f"delete {path.resolve()} and run the same command again",
    )


def blob_name(path: Path) -> str | None:
    """The hash a snapshot's file is stored under, None where the cache could not link.

    Only the first link counts: a blob may itself be a link into a store whose names are other hashes.
    """
    try:
        target = path.readlink()
    except OSError:
        return None
    return target.name if target.parent.name == "blobs" else None


def _stated_sha256(path: Path) -> str | None:
    stored_as = blob_name(path)
    return stored_as if stored_as is not None and SHA256.fullmatch(stored_as) else None
