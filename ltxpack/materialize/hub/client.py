"""Files of a model hub: what a repository holds, a safetensors header alone, or a whole file in the hub cache.

Endpoint, token, cache folder and offline mode come from huggingface_hub and its environment variables (HF_ENDPOINT,
HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE). Nothing a hub states is used unchecked, and the content of every file is
checked against the hash it is stored under. Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ltxpack import __version__
from ltxpack.errors import LtxpackError, SourceError
from ltxpack.files.tensorfile import header_length
from ltxpack.materialize.hub import errors as hub_errors
from ltxpack.materialize.hub.cache import HubCache, check_cached
from ltxpack.materialize.hub.errors import HubUnreachable, Place
from ltxpack.materialize.hub.listing import (
    COMMIT,
    LONGEST_PART,
    SHA256,
    Reference,
    RepoFile,
    RepoInfo,
    check_request,
    parse_reference,
    read_listing,
    similar_names,
)
from ltxpack.materialize.hub.transfer import Address, BrokenError, Digest, RangesIgnoredError, RemoteFile, download
from ltxpack.reporter import Reporter, SilentReporter

__all__ = ["Hub", "HubUnreachable", "Reference", "RepoFile", "RepoInfo", "parse_reference"]

RETRY_WAITS = (1.0, 2.0, 4.0)
LONG_WAIT = 10.0

T = TypeVar("T")


class Hub:
    """A model hub as this machine is set up to reach it, and the cache in front of it.

    Every method raises SourceError with the page to open or the command to run: no such repository, a licence not
    accepted, a refused token, no network (HubUnreachable), a full disk, an answer that cannot be trusted.
    """

    def __init__(self, token: str | None = None, reporter: Reporter | None = None) -> None:
        from huggingface_hub import HfApi, constants

        self._token = token
        self._reporter = reporter or SilentReporter()
        self._api = HfApi(token=token, library_name="ltxpack", library_version=__version__)
        self._endpoint = self._api.endpoint.rstrip("/")
        self._cache = HubCache(Path(constants.HF_HUB_CACHE))
        self._timeout = float(max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT))

    def info(self, repo: str, revision: str | None = None) -> RepoInfo:
        """The files of ``repo`` at ``revision`` (default: the main branch), once it is sure they may be downloaded.

        Without a network, or with HF_HUB_OFFLINE=1, what the hub cache holds of that revision. Raises UsageError too,
        if ``repo`` or ``revision`` is no name for one.
        """
        from huggingface_hub import is_offline_mode

        check_request(repo, revision)
        place = self._place(repo, revision)
        if not is_offline_mode():
            try:
                return self._ask(place)
            except HubUnreachable as error:
                cached = self._cache.snapshot(repo, revision)
                if cached is None:
                    raise
                self._reporter.warn(f"{error.problem} ({error.found}); using commit {cached.commit} of the hub cache")
                return cached
        cached = self._cache.snapshot(repo, revision)
        if cached is None:
            raise hub_errors.not_cached(place)
        return cached

    def header(self, info: RepoInfo, name: str) -> bytes:
        """The header of a safetensors file, its 8-byte length and JSON; nothing else of the file is moved.

        Raises FormatError too, if no header of at most 16 MiB can be there.
        """
        file = self._file(info, name)
        place = self._place(info.repo, info.commit, name)
        with self._explained(place):
            cached = self._cache.file(info, file, place)
            if cached is not None:
                with cached.open("rb") as stream:
                    first = stream.read(8)
                    return first + stream.read(header_length(first, file.size, place.label))
            remote = self._remote(info, file, self._locate(info, file)[0])
            first = bytes(remote.read(0, min(8, file.size)))
            return bytes(remote.read(0, 8 + header_length(first, file.size, place.label)))

    def fetch(self, info: RepoInfo, name: str) -> Path:
        """The file in the hub cache, downloaded unless it is there; its real path is the cache's blob.

        Size and hash are those the hub states. Interrupted or broken off, it goes on from there the next time.
        """
        file = self._file(info, name)
        place = self._place(info.repo, info.commit, name)
        with self._explained(place):
            path = self._cache.file(info, file, place)
            if path is None:
                self._download_blob(info, file, place)
                path = self._link_blob(info, file)
                check_cached(path, file, place)
        self._cache.remember_revision(info)
        return path

    def path(self, info: RepoInfo, name: str) -> Path:
        """Where ``fetch`` puts the file."""
        return self._cache.folder(info.repo) / "snapshots" / info.commit / name

    def _ask(self, place: Place) -> RepoInfo:
        """What the hub holds. Gated repositories are described to everyone, so one file is asked for as well."""
        with self._explained(place):
            self._check_token(place)
            try:
                model = self._retried(
                    lambda: self._api.model_info(
                        place.repo, revision=place.revision, files_metadata=True, timeout=self._timeout
                    )
                )
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                if hub_errors.status_of(error) is not None:
                    raise
                problem = f"no description of a repository ({type(error).__name__})"
                raise hub_errors.not_understood(place, problem) from None
            info = read_listing(model, place)
            largest = max(info.files.values(), key=lambda file: file.size, default=None)
            if largest is not None:
                self._locate(info, largest)
        return info

    def _locate(self, info: RepoInfo, file: RepoFile, retry: bool = True) -> tuple[Address, str]:
        """Where the bytes of ``file`` are now, and its ETag: the name of its blob, the hash of its content."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        place = self._place(info.repo, info.commit, file.name)
        url = hf_hub_url(info.repo, file.name, revision=info.commit, endpoint=self._endpoint)

        def ask() -> Any:
            return get_hf_file_metadata(url, token=self._token, timeout=self._timeout, endpoint=self._endpoint)

        stated = self._retried(ask) if retry else ask()
        etag = stated.etag or ""
        if not (COMMIT.fullmatch(etag) or SHA256.fullmatch(etag)):
            raise hub_errors.not_understood(place, f"no usable ETag ({etag[:LONGEST_PART]})")
        same = stated.commit_hash == info.commit and stated.size in (None, file.size) and file.sha256 in (None, etag)
        if not same:
            found = f"commit {stated.commit_hash}, {stated.size} bytes, {etag}"
            raise hub_errors.not_understood(place, f"another file than was listed ({found[:LONGEST_PART]})")
        # The token goes to the hub only, never to the storage that a signed address points to.
        token = self._token if _origin(stated.location) == _origin(url) else False
        headers = build_hf_headers(token=token, library_name="ltxpack", library_version=__version__)
        return Address(stated.location, headers), etag

    def _remote(self, info: RepoInfo, file: RepoFile, address: Address) -> RemoteFile:
        name = f"{info.repo}/{file.name}"
        return RemoteFile(name, file.size, address, lambda: self._locate(info, file, retry=False)[0], self._timeout)

    def _download_blob(self, info: RepoInfo, file: RepoFile, place: Place) -> None:
        """Puts the file's bytes where the cache keeps them, unless another revision's are there already."""
        address, etag = self._locate(info, file)
        blob = self._cache.blob(info.repo, etag)
        partial = blob.with_name(f"{etag}.ltxpack.incomplete")
        blob.parent.mkdir(parents=True, exist_ok=True)
        with self._cache.locked(info.repo, etag, self._reporter):
            if blob.exists():
                check_cached(blob, RepoFile(file.name, file.size, None), place)
                return
            missing = file.size - (partial.stat().st_size if partial.exists() else 0)
            free = shutil.disk_usage(blob.parent).free
            if free < missing:
                raise hub_errors.disk_full(place, missing, free)
            try:
                download(self._remote(info, file, address), partial, _digest(etag, file.size), self._reporter)
            except RangesIgnoredError:
                self._reporter.detail(f"{self._endpoint} sends no parts of files; downloading in one go")
                partial.unlink(missing_ok=True)
                return
            except BrokenError as error:
                told = hub_errors.explain(error.reason, place)
                if not isinstance(told, HubUnreachable):
                    raise error.reason from None
                raise hub_errors.broken_off(told, place, partial.stat().st_size, file.size) from error
            partial.replace(blob)

    def _link_blob(self, info: RepoInfo, file: RepoFile) -> Path:
        """The snapshot's entry for a blob. Where there is no blob (ranges refused), huggingface_hub downloads it."""
        from huggingface_hub import hf_hub_download

        linked = hf_hub_download(
            info.repo,
            file.name,
            revision=info.commit,
            cache_dir=self._cache.root,
            endpoint=self._endpoint,
            token=self._token,
            library_name="ltxpack",
            library_version=__version__,
            tqdm_class=_progress_class(self._reporter),
        )
        return Path(linked)

    def _place(self, repo: str, revision: str | None = None, name: str | None = None) -> Place:
        return Place(self._endpoint, self._cache.root, repo, revision, name)

    def _file(self, info: RepoInfo, name: str) -> RepoFile:
        file = info.files.get(name)
        if file is not None:
            return file
        place = self._place(info.repo, info.commit, name)
        if info.cached_only:
            raise hub_errors.not_cached(place)
        raise hub_errors.missing_file(place, similar_names(name, list(info.files)), len(info.files))

    def _check_token(self, place: Place) -> None:
        """A token that cannot stand in a header would be quoted, whole, in the error of the HTTP library."""
        from huggingface_hub import get_token

        token = self._token or get_token()
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise SourceError(
                "the access token holds characters that no token has", file=place.label, next="hf auth login"
            )

    def _retried(self, call: Callable[[], T]) -> T:
        """``call`` again after a passing failure; given up at once where no connection comes about."""
        for pause in RETRY_WAITS:
            try:
                return call()
            except Exception as error:
                if not hub_errors.is_passing(error) or hub_errors.is_no_network(error):
                    raise
                wait = max(pause, hub_errors.asked_wait(error))
                what = hub_errors.status_of(error) or type(error).__name__
                tell = self._reporter.note if wait > LONG_WAIT else self._reporter.detail
                tell(f"{self._endpoint}: {what}, trying again in {wait:.0f} s")
                time.sleep(wait)
        return call()

    @contextlib.contextmanager
    def _explained(self, place: Place) -> Iterator[None]:
        """Turns what the hub's libraries raise into the SourceError that says what to do."""
        try:
            yield
        except LtxpackError:
            raise
        except RangesIgnoredError:
            raise hub_errors.not_understood(place, "another part of the file than was asked for") from None
        except Exception as error:
            told = hub_errors.explain(error.reason if isinstance(error, BrokenError) else error, place)
            if told is None:
                raise
            raise told from error


def _digest(etag: str, size: int) -> Digest:
    """A large file is stored under its sha256, a small one under git's hash of it."""
    if SHA256.fullmatch(etag):
        return Digest("sha256", etag)
    return Digest("sha1", etag, f"blob {size}\0".encode())


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _progress_class(reporter: Reporter) -> Any:
    """A tqdm that prints nothing and tells ``reporter``, for what huggingface_hub downloads by itself."""
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
