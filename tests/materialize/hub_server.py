"""A small model hub on 127.0.0.1, speaking the protocol as huggingface_hub 1.33 uses it.

    with HubServer({"org/model": {"config.json": b"{}", "model.safetensors": path}}, gated={"org/model"}) as server:
        server.use(monkeypatch, tmp_path / "cache")          # for Hub() in this process
        subprocess.run(..., env=server.environment(cache))   # for another process

Large files (``.safetensors``, and all over 64 KiB) are stored as on the real hub: named by sha256, and answered with a
redirect to a storage host (the same port by another name, ``localhost``) whose signed links expire. Files given as
paths are served in ranges, so sparse ones of any size will do; above 256 MiB their sha256 is made up, not computed:
their headers can be read, while a whole download ends in the error about another content. ``requests`` logs all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

Content = bytes | Path

LARGE = 64 << 10
HASHED = 256 << 20
CHUNK = 64 << 10
TIMEOUT = 600  # seconds: a machine that is slow to answer is not a hub that does not answer
MEMBER = "hf_member"  # a token whose account has accepted every licence
STRANGER = "hf_stranger"  # a token whose account has accepted none
HOUSEKEEPING = "/api/agent-harnesses"  # asked by huggingface_hub itself once a process: neither logged nor made to fail


@dataclass(frozen=True)
class StoredFile:
    """A file as the hub states it: ``etag`` is a sha256 for large files, git's hash for small ones."""

    content: Content
    size: int
    etag: str
    large: bool

    @staticmethod
    def of(name: str, content: Content) -> StoredFile:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        large = name.endswith(".safetensors") or size > LARGE
        if size > HASHED:
            etag = hashlib.sha256(f"{name} {size}".encode()).hexdigest()
        else:
            data = content if isinstance(content, bytes) else content.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % size + data).hexdigest()
            etag = hashlib.sha256(data).hexdigest() if large else git
        return StoredFile(content, size, etag, large)

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        if isinstance(self.content, bytes):
            yield from (self.content[at : min(at + CHUNK, stop)] for at in range(start, stop, CHUNK))
            return
        with self.content.open("rb") as stream:
            stream.seek(start)
            for at in range(start, stop, CHUNK):
                yield stream.read(min(CHUNK, stop - at))


@dataclass
class Request:
    """One request as it came in; ``sent`` counts the bytes of the body that went out."""

    method: str
    path: str
    host: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


@dataclass
class Commit:
    """A repository at one commit."""

    sha: str
    files: dict[str, StoredFile]

    @staticmethod
    def of(files: Mapping[str, Content]) -> Commit:
        stored = {name: StoredFile.of(name, content) for name, content in files.items()}
        listing = "\n".join(f"{file.etag} {name}" for name, file in sorted(stored.items()))
        return Commit(hashlib.sha1(listing.encode()).hexdigest(), stored)


@dataclass
class Faults:
    """What goes wrong, changed by a test while the server runs."""

    drops: list[int] = field(default_factory=list)  # the n-th answer with content breaks off after that many bytes
    statuses: list[int] = field(default_factory=list)  # the next requests are answered with these
    always: int | None = None  # every request is answered with this status
    ranges: bool = True
    # headers of answers made by ``statuses`` and ``always``; an empty one is left out
    after: dict[str, str] = field(default_factory=dict)
    listing: Callable[[dict[str, Any]], Any] = lambda listing: listing
    metadata: dict[str, str] = field(default_factory=dict)  # headers put in place of those of a file
    body: Callable[[bytes], bytes] = lambda data: data


class HubServer:
    """Serves ``repos`` (name → file name → content). Use as a context manager.

    ``gated``: described to all, downloaded by MEMBER only. ``private``: for MEMBER only. ``tokens``: those that are
    valid. ``revisions``: repo → branch or tag → files, beside ``main``.
    """

    def __init__(
        self,
        repos: Mapping[str, Mapping[str, Content]],
        *,
        gated: Collection[str] = (),
        private: Collection[str] = (),
        tokens: Collection[str] = (MEMBER, STRANGER),
        revisions: Mapping[str, Mapping[str, Mapping[str, Content]]] | None = None,
    ) -> None:
        named = revisions or {}
        self.commits = {
            repo: {rev: Commit.of(kept) for rev, kept in {"main": files, **named.get(repo, {})}.items()}
            for repo, files in repos.items()
        }
        self.gated, self.private, self.tokens = set(gated), set(private), set(tokens)
        self.faults = Faults()
        self.requests: list[Request] = []
        self.signature = 1  # the storage refuses links that were given out with another one
        self._lock = threading.Lock()
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._httpd.daemon_threads = True
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._httpd.server_port}"

    def commit(self, repo: str, revision: str = "main") -> str:
        return self.commits[repo][revision].sha

    def content_requests(self) -> list[Request]:
        """The requests that asked for bytes of files."""
        return [r for r in self.requests if r.method == "GET" and ("/resolve/" in r.path or "/storage/" in r.path)]

    def sent(self, since: int = 0) -> int:
        """Bytes of files that went out, of all requests or of those after the first ``since``."""
        return sum(request.sent for request in self.content_requests()[since:])

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """The environment for another process that is to use this hub and ``cache``, and no account of this machine."""
        kept = {key: os.environ[key] for key in os.environ if not key.startswith("HF_") and "proxy" not in key.lower()}
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache.parent / "hf-home"),
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_HUB_ETAG_TIMEOUT": str(TIMEOUT),
            "HF_HUB_DOWNLOAD_TIMEOUT": str(TIMEOUT),
        }
        return {**kept, **settings, **more}

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Points huggingface_hub in this process here: endpoint, cache, no token, no proxy, no offline mode."""
        use_endpoint(monkeypatch, self.endpoint, cache)

    def take(self, queued: list[int]) -> int | None:
        """The next of the faults that are queued, if there is one; several threads answer."""
        with self._lock:
            return queued.pop(0) if queued else None


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """Sets what huggingface_hub reads from the environment at import, for a hub at ``endpoint``."""
    import huggingface_hub
    from huggingface_hub import constants

    proxies = [key for key in os.environ if "proxy" in key.lower()]
    # For certificates that are named, every listing makes a client, to see whether they can be read: 60 ms.
    for name in (*proxies, "SSL_CERT_FILE", "SSL_CERT_DIR", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if proxies:  # the client made before would keep them; making another one is slow
        huggingface_hub.close_session()
    settings = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(cache / "no-token"),
        "AGENT_HARNESSES_PATH": str(cache / "no-harnesses"),
        "HF_HUB_ETAG_TIMEOUT": TIMEOUT,
        "HF_HUB_DOWNLOAD_TIMEOUT": TIMEOUT,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value, raising=name != "AGENT_HARNESSES_PATH")


API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
STORAGE = re.compile(r"/storage/(?P<etag>[0-9a-f]{64})")


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            authorization = self.headers.get("Authorization", "")
            self.token = authorization.removeprefix("Bearer ") or None
            host, asked = self.headers.get("Host", ""), self.headers.get("Range")
            self.request_ = Request(self.command, self.path, host, asked, self.token)
            if self.path == HOUSEKEEPING:
                self._error(404, None, "not found")
                return
            server.requests.append(self.request_)
            # A client that has what it wants, or was told to stop, goes away in the middle of an answer.
            with contextlib.suppress(ConnectionError):
                self._route()

        do_HEAD = do_GET

        def _route(self) -> None:
            path = urlsplit(self.path).path
            if (status := server.take(server.faults.statuses) or server.faults.always) is not None:
                self._error(status, None, "made to fail", server.faults.after)
            elif match := API.fullmatch(path):
                self._describe(unquote(match["repo"]), unquote(match["revision"] or "main"))
            elif match := RESOLVE.fullmatch(path):
                self._resolve(unquote(match["repo"]), unquote(match["revision"]), unquote(match["name"]))
            elif match := STORAGE.fullmatch(path):
                self._store(match["etag"])
            else:
                self._error(404, None, "not found")

        def _describe(self, repo: str, revision: str) -> None:
            commit = self._commit(repo, revision)
            if commit is None:
                return
            gated = "manual" if repo in server.gated else False
            listing = {"_id": "0" * 24, "id": repo, "modelId": repo, "sha": commit.sha, "gated": gated, "tags": []}
            listing |= {"private": repo in server.private, "siblings": [_sibling(*one) for one in commit.files.items()]}
            self._answer(200, json.dumps(server.faults.listing(listing)).encode(), {"Content-Type": "application/json"})

        def _resolve(self, repo: str, revision: str, name: str) -> None:
            commit = self._commit(repo, revision)
            if commit is None:
                return
            file = commit.files.get(name)
            if repo in server.gated and self.token != MEMBER:
                self._error(403 if self.token else 401, "GatedRepo", f"Access to model {repo} is restricted.")
            elif file is None:
                self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
            elif file.large:
                storage = server.endpoint.replace("127.0.0.1", "localhost") + "/storage"
                headers = {
                    "Location": f"{storage}/{file.etag}?signature={server.signature}",
                    "X-Linked-Etag": f'"{file.etag}"',
                    "X-Linked-Size": str(file.size),
                    "X-Repo-Commit": commit.sha,
                    "ETag": '"of the redirect"',
                }
                self._answer(302, b"", headers | server.faults.metadata)
            else:
                self._content(file, {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.sha} | server.faults.metadata)

        def _store(self, etag: str) -> None:
            signature = parse_qs(urlsplit(self.path).query).get("signature", [""])[0]
            kept = (f for revs in server.commits.values() for c in revs.values() for f in c.files.values())
            file = next((f for f in kept if f.large and f.etag == etag), None)
            if file is None or signature != str(server.signature):
                self._error(403, None, "Request has expired")
            else:
                self._content(file, {})

        def _commit(self, repo: str, revision: str) -> Commit | None:
            """The commit, or None when the refusal has been sent."""
            if self.token is not None and self.token not in server.tokens:
                self._error(401, None, "Invalid credentials in Authorization header")
                return None
            revisions = server.commits.get(repo)
            if revisions is None or (repo in server.private and self.token != MEMBER):
                # Nobody learns whether a private repository exists.
                message = "Repository not found" if self.token else "Invalid username or password."
                self._error(404 if self.token else 401, "RepoNotFound", message)
                return None
            commit = revisions.get(revision) or next((c for c in revisions.values() if c.sha == revision), None)
            if commit is None:
                self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return commit

        def _content(self, file: StoredFile, headers: dict[str, str]) -> None:
            start, stop, status = 0, file.size, 200
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_.range or "")
            if asked and server.faults.ranges:
                start = int(asked[1])
                stop = min(int(asked[2]) + 1, file.size) if asked[2] else file.size
                if start >= file.size:
                    self._error(416, None, "Range Not Satisfiable", {"Content-Range": f"bytes */{file.size}"})
                    return
                status = 206
                headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}
            self._head(status, stop - start, {**headers, "Accept-Ranges": "bytes"})
            if self.command == "HEAD":
                return
            drop = server.take(server.faults.drops)
            for chunk in file.read(start, stop if drop is None else min(stop, start + drop)):
                body = server.faults.body(chunk)
                self.request_.sent += len(chunk)  # before the client can have it and a test can ask
                self.wfile.write(body)
            if drop is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        def _error(self, status: int, code: str | None, message: str, more: Mapping[str, str] | None = None) -> None:
            headers = {"X-Error-Message": message, "Content-Type": "application/json", **(more or {})}
            headers |= {"X-Error-Code": code} if code else {}
            self._answer(status, json.dumps({"error": message}).encode(), headers)

        def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self._head(status, len(body), headers)
            if self.command != "HEAD":
                self.wfile.write(body)

        def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
            self.request_.status = status
            self.send_response(status)
            for name, value in {"Content-Length": str(length), **headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()

    return Handler


def _sibling(name: str, file: StoredFile) -> dict[str, Any]:
    stated: dict[str, Any] = {"rfilename": name, "size": file.size, "blobId": file.etag[:40]}
    if file.large:
        stated["lfs"] = {"sha256": file.etag, "size": file.size, "pointerSize": 134}
    return stated
