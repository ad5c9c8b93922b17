"""Files of a model hub: lists a repository, reads one safetensors header, or fetches a file into the hub cache.

Endpoint, token, cache folder and offline mode come from huggingface_hub and its environment variables (HF_ENDPOINT,
HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE). The cache has the layout that huggingface_hub documents: a repository's folder
holds ``refs/REVISION`` (a commit), ``snapshots/COMMIT/NAME`` (links) and ``blobs/HASH`` (the bytes, named by sha256 for
large files, by git's hash for small ones). This module checks every statement of a hub, and the content of every file
against the hash under which it is stored. Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from ltxpack import __version__
from ltxpack.errors import LtxpackError, SourceError, UsageError
from ltxpack.files.environment import endpoint_fault, network_fault
from ltxpack.files.publish import atomic_write
from ltxpack.files.tensorfile import header_length
from ltxpack.files.units import human_bytes
from ltxpack.manifest import safe_relative_path
from ltxpack.materialize.hub import errors as hub_errors
from ltxpack.materialize.hub.errors import HubUnreachable, Reference, tell
from ltxpack.materialize.hub.transfer import (
    Address,
    BrokenError,
    RangesIgnoredError,
    RemoteFile,
    download,
    refuse_other_content,
)
from ltxpack.reporter import Reporter, SilentReporter

REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
REFERENCE = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<file>.+))?")
REVISION_FORBIDDEN = re.compile(r"[\s~^:?*\[\\]|\.\.|@\{|^-|\.lock$")
# The path of a page: /ORG/NAME, then the part of the repository that it shows.
PAGE = re.compile(r"/(?P<repo>[^/]+/[^/]+)(?:/(?:blob|resolve|tree|raw)/(?P<revision>[^/]+)(?P<file>/.*)?)?/?")
SCHEME = "hf://"
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")
# First parts of the paths of other things than models.
NO_MODELS = ("datasets", "spaces", "collections", "docs", "blog", "papers", "models", "settings")
MAIN = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
# Spaces but the usual one, and characters that only format: macOS puts such spaces into the names of screenshots.
_UNSEEN = re.compile(r"[\u00a0\u00ad\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]")
SHA256 = re.compile(r"[0-9a-f]{64}")
LONGEST_NAME = 1024
LONGEST_PART = 255
LARGEST_FILE = 2**63 - 1
RETRY_WAITS = (1.0, 2.0, 4.0)
LONG_WAIT = 10.0
LOCK_PATIENCE = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository at one commit: ``size`` in bytes; ``sha256`` as the hub states it, for large files only.

    ``revision``: the requested branch or tag, None for main.
    """

    repo: str
    commit: str
    name: str
    size: int
    sha256: str | None
    revision: str | None = None

    @property
    def place(self) -> Reference:
        return Reference(self.repo, self.commit, self.name)


def parse_reference(text: str) -> Reference:
    """Parse ``ORG/NAME[@REV][/FILE]``, also with ``hf://`` before it, or the address of a page of the hub.

    A revision is a branch, a tag, a commit or ``refs/pr/N``; ``%2F`` stands for a slash in it. Raises UsageError.
    """
    text = _page(text) or (text[len(SCHEME) :].removesuffix("/") if text.startswith(SCHEME) else text)
    match = REFERENCE.fullmatch(text)
    if match is None:
        raise UsageError(
            "is not a reference to a repository of the hub", file=text,
            expected="ORG/NAME, ORG/NAME@REVISION or ORG/NAME/FILE", next="write it like Lightricks/LTX-2.3",
        )  # fmt: skip
    revision = None if match["revision"] is None else unquote(match["revision"])
    check_request(match["repo"], revision)
    if match["file"] is not None and not is_safe_name(match["file"]):
        raise UsageError("is not the name of a file in a repository", file=match["file"], next=f"correct {text}")
    return Reference(match["repo"], revision, match["file"])


def _page(text: str) -> str | None:
    """The address of a hub page of a repository, folder or file as a reference; None for a text that is no address."""
    if not text.lower().startswith(("http://", "https://")):
        return None
    try:
        address = urlsplit(text)
    except ValueError:
        address = urlsplit("")
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname
    page = PAGE.fullmatch(address.path)
    if address.hostname not in (*HOSTS, endpoint) or page is None or page["repo"].split("/")[0] in NO_MODELS:
        raise UsageError(
            "is no page of a model on the hub", file=text, expected="https://huggingface.co/ORG/NAME/blob/main/FILE",
            next=f"write {page['repo']}" if page and page["revision"] else "fetch the file and give its path",
        )  # fmt: skip
    revision = page["revision"] if page["revision"] not in (None, MAIN) else None
    file = unquote(page["file"] or "").strip("/")
    return page["repo"] + (f"@{revision}" if revision else "") + (f"/{file}" if file else "")


def check_request(repo: str, revision: str | None) -> None:
    """Raises UsageError unless both are safe in an address and in a folder of the cache."""
    parts = repo.split("/")
    plain = len(parts) == 2 and all(REPO_PART.fullmatch(part) for part in parts)
    if not plain or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise UsageError(
            "is not the name of a repository of the hub", file=repo,
            expected="ORG/NAME of letters, digits, '-', '_' and '.'", next="write it like Lightricks/LTX-2.3",
        )  # fmt: skip
    if revision is not None and (not is_safe_name(revision) or REVISION_FORBIDDEN.search(revision)):
        raise UsageError(
            "is not a revision", file=revision, expected="a branch, tag or commit", next=f"correct the one of {repo}"
        )


def is_safe_name(name: object) -> bool:
    """Whether ``name`` is a relative path of plain parts: it cannot leave its folder or upset a terminal."""
    return isinstance(name, str) and len(name) <= LONGEST_NAME and safe_relative_path(name)


class Hub:
    """A model hub with this machine's settings, and its cache.

    Every method raises SourceError with the page to open or the command to run: no such repository, a licence not
    accepted, a refused token, no network (HubUnreachable), a full disk, an unsound answer.
    """

    def __init__(self, token: str | None = None, reporter: Reporter | None = None) -> None:
        from huggingface_hub import HfApi, constants

        self._token = token
        self._reporter = reporter or SilentReporter()
        self._api = HfApi(token=token, library_name="ltxpack", library_version=__version__)
        self._endpoint = self._api.endpoint.rstrip("/")
        self._cache = Path(constants.HF_HUB_CACHE)
        self._timeout = float(max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT))

    def files(self, repo: str, revision: str | None = None) -> Mapping[str, RepoFile]:
        """The files of ``repo`` at ``revision`` (default: main) by name, after a check that they may be downloaded.

        Without a network, or with HF_HUB_OFFLINE=1, the hub cache's files. Raises UsageError too, for invalid names.
        """
        from huggingface_hub import is_offline_mode

        check_request(repo, revision)
        place = Reference(repo, revision)
        lost = tell(hub_errors.NOT_CACHED, place)
        if not is_offline_mode():
            try:
                return self._ask(place)
            except HubUnreachable as error:
                lost = error
        with self._explained(place):
            cached = self._snapshot(repo, revision)
        if cached is None:
            raise lost
        if isinstance(lost, HubUnreachable):
            commit = next(iter(cached.values())).commit
            self._reporter.warn(f"{lost.problem} ({lost.found}); using commit {commit} of the hub cache")
        return cached

    def header(self, file: RepoFile) -> bytes:
        """The header of a safetensors file, its 8-byte length and JSON; fetches nothing else of the file.

        Raises FormatError too, if there can be no header of at most 16 MiB.
        """
        with self._explained(file.place):
            cached = self._cached(file)
            if cached is not None:
                with cached.open("rb") as stream:
                    first = stream.read(8)
                    return first + stream.read(header_length(first, file.size, file.place.label))
            remote = self._remote(file, self._locate(file)[0])
            first = bytes(remote.read(0, min(8, file.size)))
            return bytes(remote.read(0, 8 + header_length(first, file.size, file.place.label)))

    def fetch(self, file: RepoFile) -> Path:
        """The file in the hub cache, downloaded if it is not there; its real path is the cache's blob.

        Size and hash must be those that the hub states. After an interruption, the next call goes on from there.
        """
        with self._explained(file.place):
            path = self._cached(file)
            if path is None:
                unchecked = self._download_blob(file)
                path = self._link_blob(file)
                check_cached(path, file)
                if unchecked is not None:
                    with path.open("rb") as stream:
                        hasher = hashlib.file_digest(stream, lambda: _hasher(unchecked, file.size))
                    refuse_other_content(path.resolve(), f"{file.repo}/{file.name}", hasher, unchecked)
        self._remember_revision(file)
        return path

    def path(self, file: RepoFile) -> Path:
        """The path that ``fetch`` gives the file."""
        return self._folder(file.repo) / "snapshots" / file.commit / file.name

    # What the hub states

    def _ask(self, place: Reference) -> Mapping[str, RepoFile]:
        """The listing of the hub. The hub describes gated repositories to everyone, so this asks for one file too."""
        with self._explained(place):
            self._check_settings(place)
            try:
                ask, repo, revision = self._api.model_info, place.repo, place.revision
                model = self._retried(lambda: ask(repo, revision=revision, files_metadata=True, timeout=self._timeout))
            except (TypeError, KeyError, AttributeError, RecursionError) as error:
                raise _unsound(place, f"no description of a repository ({type(error).__name__})") from None
            files = _read_listing(model, place)
            if files:
                self._locate(max(files.values(), key=lambda file: file.size))
        return files

    def _locate(self, file: RepoFile, retry: bool = True) -> tuple[Address, str]:
        """The present address of ``file``'s bytes, and its ETag: the name of its blob, the hash of its content."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(file.repo, file.name, revision=file.commit, endpoint=self._endpoint)
        options: dict[str, Any] = {"token": self._token, "timeout": self._timeout, "endpoint": self._endpoint}
        ask = functools.partial(get_hf_file_metadata, url, **options)
        stated = self._retried(ask) if retry else ask()
        etag = stated.etag or ""
        if not (COMMIT.fullmatch(etag) or SHA256.fullmatch(etag)):
            raise _unsound(file.place, f"no usable ETag ({etag[:LONGEST_PART]})")
        if stated.commit_hash != file.commit or stated.size not in (None, file.size) or file.sha256 not in (None, etag):
            found = f"commit {stated.commit_hash}, {stated.size} bytes, {etag}"
            raise _unsound(file.place, f"another file than was listed ({found[:LONGEST_PART]})")
        # The token goes to the hub only, never to the storage behind a signed address.
        token = self._token if _origin(stated.location) == _origin(url) else False
        headers = build_hf_headers(token=token, library_name="ltxpack", library_version=__version__)
        return Address(stated.location, headers), etag

    def _check_settings(self, place: Reference) -> None:
        """Refuses a variable with which the HTTP library would fail, and a token that no header can hold.

        The library would quote that token, whole, in its error.
        """
        from huggingface_hub import constants, get_token

        if fault := endpoint_fault(self._endpoint) or network_fault(self._reporter.warn):
            facts = {"variable": fault.variable, "value": fault.value, "why": fault.reason, "instead": fault.next}
            raise tell(hub_errors.BAD_VARIABLE, place, facts)
        try:
            token = self._token or get_token()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "is no text"
            raise tell(hub_errors.UNREAD_TOKEN, place, {"path": constants.HF_TOKEN_PATH, "reason": why}) from None
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise tell(hub_errors.BAD_TOKEN, place)

    def _retried(self, call: Callable[[], T]) -> T:
        """Repeat ``call`` after a passing failure, but not if no connection comes about."""
        for pause in RETRY_WAITS:
            try:
                return call()
            except Exception as error:
                if not hub_errors.is_passing(error) or hub_errors.is_no_network(error):
                    raise
                wait = max(pause, hub_errors.asked_wait(error))
                what = hub_errors.status_of(error) or type(error).__name__
                note = self._reporter.note if wait > LONG_WAIT else self._reporter.detail
                note(f"{hub_errors.shown(self._endpoint)}: {what}, trying again in {wait:.0f} s")
                time.sleep(wait)
        return call()

    @contextlib.contextmanager
    def _explained(self, place: Reference) -> Iterator[None]:
        """Turns errors of the hub's libraries into the SourceError that says what to do."""
        try:
            yield
        except LtxpackError:
            raise
        except RangesIgnoredError:
            raise _unsound(place, "another part of the file than was asked for") from None
        except Exception as error:
            cause = error.reason if isinstance(error, BrokenError) else error
            if isinstance(cause, LtxpackError):
                raise cause from None
            told = hub_errors.explain(cause, place)
            if told is None and isinstance(cause, ValueError):
                told = _unsound(place, f"it cannot be read ({type(cause).__name__})")
            if told is None:
                raise
            raise told from error

    # Downloads

    def _remote(self, file: RepoFile, address: Address) -> RemoteFile:
        name = f"{file.repo}/{file.name}"
        return RemoteFile(name, file.size, address, lambda: self._locate(file, retry=False)[0], self._timeout)

    def _download_blob(self, file: RepoFile) -> str | None:
        """Downloads the file to its blob, unless another revision's is there already.

        If the server ignores ranges, returns the hash of the file that huggingface_hub has to download, unchecked.
        """
        from huggingface_hub.file_download import are_symlinks_supported

        address, etag = self._locate(file)
        blob = self._folder(file.repo) / "blobs" / etag
        partial = blob.with_name(f"{etag}.ltxpack.incomplete")
        blob.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(file.repo, etag):
            for there in filter(Path.exists, (blob, self.path(file))):
                check_cached(there, replace(file, sha256=None))
                return None
            missing = file.size - (partial.stat().st_size if partial.exists() else 0)
            free = shutil.disk_usage(blob.parent).free
            if free < missing:
                expected = f"{human_bytes(missing)} free in {self._cache}"
                raise tell(hub_errors.NO_ROOM, file.place, expected=expected, found=human_bytes(free))
            try:
                download(self._remote(file, address), partial, _hasher(etag, file.size), etag, self._reporter)
            except RangesIgnoredError:
                self._reporter.detail("the hub sends no parts of files; downloading in one go")
                partial.unlink(missing_ok=True)
                return etag
            except BrokenError as error:
                told = hub_errors.explain(error.reason, file.place)
                if not isinstance(told, HubUnreachable):
                    raise error.reason from None
                found = f"{partial.stat().st_size} bytes, which are kept ({told.found})"
                raise tell(hub_errors.BROKE_OFF, file.place, expected=f"{file.size} bytes", found=found) from error
            # Without links huggingface_hub would copy the blob, and the cache would hold the file twice.
            place = blob if are_symlinks_supported(self._folder(file.repo)) else self.path(file)
            place.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(place)
        return None

    def _link_blob(self, file: RepoFile) -> Path:
        """The snapshot's entry for a blob. If there is no blob (ranges refused), huggingface_hub downloads it."""
        from huggingface_hub import hf_hub_download

        linked = hf_hub_download(
            file.repo, file.name, revision=file.commit, cache_dir=self._cache, endpoint=self._endpoint,
            token=self._token, library_name="ltxpack", library_version=__version__,
            tqdm_class=_progress_class(self._reporter),
        )  # fmt: skip
        return Path(linked)

    # The cache

    def _folder(self, repo: str) -> Path:
        return self._cache / f"models--{repo.replace('/', '--')}"

    def _snapshot(self, repo: str, revision: str | None) -> Mapping[str, RepoFile] | None:
        """The cached files of ``repo`` at ``revision`` (a branch, tag or whole commit), or None."""
        folder = self._folder(repo)
        commit = revision or MAIN
        if not COMMIT.fullmatch(commit):
            try:
                commit = (folder / "refs" / commit).read_text(encoding="ascii").strip()
            except (OSError, ValueError):
                return None
        snapshot = folder / "snapshots" / commit
        if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
            return None
        files = {}
        for path in sorted(snapshot.rglob("*")):
            name = path.relative_to(snapshot).as_posix()
            if path.is_file() and is_safe_name(name):
                files[name] = RepoFile(repo, commit, name, path.stat().st_size, cached_sha256(path), revision)
        return files or None

    def _cached(self, file: RepoFile) -> Path | None:
        """The file in the snapshot, or None. Raises SourceError if it is another file than the hub states."""
        path = self.path(file)
        if not path.is_file():
            return None
        check_cached(path, file)
        return path

    def _remember_revision(self, file: RepoFile) -> None:
        """Stores the commit of the requested revision, so that later calls find it without a network."""
        revision = file.revision or MAIN
        if revision == file.commit:
            return
        ref, commit = self._folder(file.repo) / "refs" / revision, file.commit.encode()
        # A shared cache that is not writable still serves its files.
        with contextlib.suppress(OSError):
            if not ref.is_file() or ref.read_bytes() != commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(ref, commit)

    @contextlib.contextmanager
    def _locked(self, repo: str, etag: str) -> Iterator[None]:
        """Holds the lock that huggingface_hub takes for the same blob."""
        from filelock import Timeout
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        path = self._cache / ".locks" / self._folder(repo).name / f"{etag}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(path, timeout=LOCK_PATIENCE))
            except Timeout:
                self._reporter.note(f"another process is downloading the same file of {repo}; waiting for it")
                stack.enter_context(WeakFileLock(path))
            yield


def check_cached(path: Path, file: RepoFile) -> None:
    """Raises SourceError if the cached file at ``path`` differs from the hub's statement."""
    size, stored_as = path.stat().st_size, _blob_name(path)
    wrong_hash = file.sha256 is not None and stored_as is not None and stored_as != file.sha256
    if size == file.size and not wrong_hash:
        return
    raise SourceError(
        "the file in the hub cache is not the one the hub states", file=file.place.label,
        expected=f"{file.size} bytes" + (f" of sha256 {file.sha256}" if wrong_hash else ""),
        found=f"{size} bytes" + (f" stored as {stored_as}" if wrong_hash else ""),
        next=f"delete {path.resolve()} and run the same command again",
    )  # fmt: skip


def _blob_name(path: Path) -> str | None:
    """The hash in the blob's name of a snapshot's file, or of a blob itself; None if the cache could not link.

    It follows only the first link: a blob may itself be a link into a store whose names are other hashes.
    """
    target = path.readlink() if path.is_symlink() else path
    return target.name if target.parent.name == "blobs" else None


def cached_sha256(path: Path) -> str | None:
    """The sha256 under which a hub cache stores ``path``; None for other files."""
    name = _blob_name(path)
    return name if name is not None and SHA256.fullmatch(name) else None


def _unsound(place: Reference, reason: str) -> SourceError:
    """The error for an answer that breaks the hub's protocol."""
    return tell(hub_errors.NOT_UNDERSTOOD, place, {"reason": reason})


def _read_listing(model: Any, place: Reference) -> Mapping[str, RepoFile]:
    """The hub's description of a repository (huggingface_hub's ``ModelInfo``). Raises SourceError if it is unsound.

    The repository's owner writes it: names may leave a folder or occur twice, sizes and hashes may be impossible. A
    file with unseen characters in its name, which no input has but pictures beside one do, is left out.
    """
    if not isinstance(model.sha, str) or not COMMIT.fullmatch(model.sha):
        raise _unsound(place, "the repository has no commit")
    if model.siblings is None:
        raise _unsound(place, "no list of files")
    files: dict[str, RepoFile] = {}
    for sibling in model.siblings:
        name, large = sibling.rfilename, sibling.lfs
        if not is_safe_name(name):
            if isinstance(name, str) and is_safe_name(_UNSEEN.sub("_", name)):
                continue
            raise _unsound(place, f"a file named {str(name)[:LONGEST_PART]!r}")
        if name in files:
            raise _unsound(place, f"two files named {name}")
        sizes = [sibling.size, large.size] if large else [sibling.size]
        if any(type(size) is not int or not 0 <= size <= LARGEST_FILE for size in sizes) or len(set(sizes)) > 1:
            raise _unsound(place, f"{name} has the size {str(sizes)[:LONGEST_PART]}")
        if large and not (isinstance(large.sha256, str) and SHA256.fullmatch(large.sha256)):
            raise _unsound(place, f"{name} has the sha256 {str(large.sha256)[:LONGEST_PART]!r}")
        sha256 = large.sha256 if large else None
        files[name] = RepoFile(place.repo, model.sha, name, sibling.size, sha256, place.revision)
    return files


def _hasher(etag: str, size: int) -> hashlib._Hash:
    """The hash for ``etag``: sha256 for a large file, git's hash for a small one."""
    return hashlib.sha256() if SHA256.fullmatch(etag) else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _progress_class(reporter: Reporter) -> Any:
    """A tqdm that prints nothing and moves ``reporter``, for what huggingface_hub downloads by itself."""
    from tqdm import tqdm

    class Progress(tqdm):  # type: ignore[type-arg]
        told = False

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            reporter.begin(str(options.get("desc", "")), int(options.get("total") or 0), "B")

        def update(self, n: float | None = 1) -> bool | None:
            reporter.advance(int(n or 0))
            return None

        def close(self) -> None:
            if not self.told:
                self.told = True
                reporter.end()

    return Progress
