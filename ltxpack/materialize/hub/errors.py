"""Failures of a model hub: a table of sentences, each with what to do next.

Knows the exceptions of huggingface_hub and httpx, which it imports only after a failure; no files, no caches.
"""

from __future__ import annotations

import errno
import os
import re
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ltxpack.errors import SourceError, printable
from ltxpack.files.publish import lacks_inodes

# 408 request timeout, 429 rate limit, 5xx trouble on the hub's side: worth another try.
PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
LONGEST_WAIT = 300.0
LONGEST_QUOTE = 300
COMMIT_LENGTH = 40
COMMIT_SHOWN = 12
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class HubUnreachable(SourceError):
    """No usable answer: no network, a proxy in the way, the hub down. The cache may still help."""


class RevisionGoneError(SourceError):
    """The repository has no such revision, or no longer: the history of a repository can be rewritten."""


class OtherAnswerError(Exception):
    """An answer that is not the file, as the login page of a network: a later try may succeed."""


class Reference(NamedTuple):
    """``REPO[@REV][/FILE]``, a place on the hub, as the user types it and as messages name it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @property
    def label(self) -> str:
        """With a shortened commit."""
        revision = self.revision or ""
        shown = revision[:COMMIT_SHOWN] if len(revision) == COMMIT_LENGTH else revision
        return self.repo + (f"@{shown}" if shown else "") + (f"/{self.file}" if self.file else "")


class Row(NamedTuple):
    """The text for one failure. ``{…}`` are the place on the hub and the facts of ``explain``.

    ``away``: the hub gives no usable answer, so that the cache may help.
    """

    problem: str
    next: str
    found: str | None = None
    away: bool = False


_LOGIN = "hf auth login"
_ACCEPT = "open {page} and accept the licence there, then: " + _LOGIN
_CHECK = "check HF_ENDPOINT, if you have set it, and open {page}"
_ROOM = "free some space, or set HF_HUB_CACHE to a folder on a larger disk; then run the same command again"
_NO_HUB = "the answer is not from a model hub"
_BETWEEN = "check HF_ENDPOINT, and whether a proxy or a login page of the network answers instead"

NOT_CACHED = Row(
    "is not in the hub cache, and ltxpack does not ask the hub (offline mode, or no network)",
    "unset HF_HUB_OFFLINE, connect and run the same command again, or set HF_HUB_CACHE to a cache that has it",
    "cache {cache}",
)
NO_REVISION = Row(
    "no such revision (branch, tag or commit)", "see {page}/commits/main, or leave the revision out for the newest"
)
NO_FILE = Row("no such file in the repository", "see {page}/tree/{branch} for what it holds")
NOT_UNDERSTOOD = Row("the hub's answer cannot be used: {reason}", _CHECK)
NO_ROOM = Row("the disk of the hub cache is full", _ROOM)
BAD_TOKEN = Row("the access token holds characters that no token has", _LOGIN)
UNREAD_TOKEN = Row(
    "the stored access token cannot be read",
    "correct that file, set HF_TOKEN, or set HF_TOKEN_PATH to a file of your own",
    "{path}: {reason}",
)
BAD_VARIABLE = Row("{variable} cannot be used: {why}", "{instead}", "{variable}={value}", away=True)
BROKE_OFF = Row(
    "the download broke off, after several tries", "run the same command again; it goes on from there", away=True
)
_GATED_ANONYMOUS = Row(
    "the repository is gated: its licence must be accepted by an account, and none is logged in", _ACCEPT
)
_FULL = Row(
    "the disk of the hub cache is full", _ROOM + ", it goes on where it stopped", "no {lacking} left in {cache}"
)
_TROUBLE = Row(
    "the hub has trouble answering, after several tries",
    "run the same command again later; with the files in the cache already: HF_HUB_OFFLINE=1",
    "HTTP {status} from {host}",
    away=True,
)
_STORAGE_REFUSES = Row(
    "the storage to which the hub sends for this file refuses the request",
    "check the clock of this machine, and whether a proxy or firewall bars {host}; then run the same command again",
    "HTTP {status} from {host}{quote}",
)
_REFUSED = Row("the hub refuses the request", _CHECK, "HTTP {status} from {host}{quote}")

# Class of an exception, or of one of its parents -> its row; the first that fits counts. In huggingface_hub a gated
# repository is one that is not found. For a plain refusal the status decides.
BY_TYPE: tuple[tuple[str, Row], ...] = (
    ("OfflineModeIsEnabled", NOT_CACHED),
    ("LocalEntryNotFoundError", NOT_CACHED),
    ("GatedRepoError", Row(
        "the repository is gated: this account or token has no access",
        _ACCEPT + " (the token needs read access to gated repositories)", "{said}")),
    ("RepositoryNotFoundError", Row(
        "no such repository, or a private one", "check the name at {page}; if it is private: " + _LOGIN)),
    ("DisabledRepoError", Row("the hub has disabled this repository", "open {page} for the reason", "{said}")),
    ("RevisionNotFoundError", NO_REVISION),
    ("EntryNotFoundError", NO_FILE),
    ("HfHubHTTPError", _REFUSED),
    ("FileMetadataError", Row(_NO_HUB, _BETWEEN, "an answer without a commit or an ETag from {endpoint}", away=True)),
    ("DecodingError", Row(_NO_HUB, _BETWEEN, "an answer that cannot be decoded from {host}", away=True)),
    ("OtherAnswerError", Row(_NO_HUB, _BETWEEN, "an answer of another size or kind from {endpoint}", away=True)),
    ("TooManyRedirects", Row(_NO_HUB, _BETWEEN, "redirects without end from {host}", away=True)),
    ("InvalidURL", Row(_NO_HUB, _BETWEEN, "an invalid address from {endpoint}", away=True)),
    ("TransportError", Row(
        "the hub cannot be reached",
        "check the network and proxy (HTTPS_PROXY), then run the same command again;"
        " with the files in the cache already: HF_HUB_OFFLINE=1", "{host}: {reason}", away=True)),
    ("OSError", Row(
        "the hub cache cannot be used", "check that the folder can be written, or set HF_HUB_CACHE to one that can",
        "{path}: {reason}")),
)  # fmt: skip
BY_STATUS: Mapping[int, Row] = {
    401: Row("the hub refuses the access token",
             _LOGIN + " (or correct HF_TOKEN, which comes before the stored token)", "{token}: {why}"),
    403: Row("the access token may not read this repository",
             "allow it at {endpoint}/settings/tokens, then: " + _LOGIN, "{said}"),
    429: Row("the hub's rate limit is reached",
             "wait and run the same command again; a login raises the limit: " + _LOGIN, "HTTP 429{wait}", away=True),
}  # fmt: skip


def shown(address: str) -> str:
    """``address`` without the name and password that may stand before the host."""
    return re.sub(r"//[^/]*@", "//", address)


def tell(row: Row, place: Reference, facts: Mapping[str, object] | None = None, **more: Any) -> SourceError:
    """The error of ``row``: ``facts`` fill its fields; ``more`` are further arguments (expected, found, items)."""
    from huggingface_hub import constants

    endpoint = shown(constants.ENDPOINT.rstrip("/"))
    here = {"endpoint": endpoint, "page": f"{endpoint}/{place.repo}", "branch": place.revision or "main"}
    values = {**here, "cache": constants.HF_HUB_CACHE, "path": constants.HF_HUB_CACHE, **(facts or {})}
    problem, next_step, found = (text and text.format_map(values) for text in (row.problem, row.next, row.found))
    kind = HubUnreachable if row.away else RevisionGoneError if row is NO_REVISION else SourceError
    return kind(str(problem), file=place.label, next=next_step, **{"found": found or None, **more})


def explain(error: Exception, place: Reference) -> SourceError | None:
    """The SourceError to raise in place of ``error``; None if ``error`` is not the hub's, but a bug."""
    from huggingface_hub import constants

    if _is(error, "LocalEntryNotFoundError") and isinstance(error.__cause__, Exception):
        error = error.__cause__
    row = _row(error)
    if row is None:
        return None
    said = " ".join(printable(getattr(error, "server_message", None) or "").split())[:LONGEST_QUOTE]
    wait = asked_wait(error) if row is BY_STATUS[429] else 0
    facts = {
        "host": _host(error),
        "status": status_of(error),
        "said": said,
        "quote": f": {said}" if said else "",
        "why": said or "not valid",
        "token": "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token",
        "lacking": "inodes" if row is _FULL and lacks_inodes(Path(constants.HF_HUB_CACHE)) else "space",
        "wait": f", wait {wait:.0f} s" if wait else "",
        "reason": _reason(error),
    }
    filename = getattr(error, "filename", None)
    return tell(row, place, facts | ({"path": filename} if filename else {}))


def _row(error: Exception) -> Row | None:
    status = status_of(error)
    if status == 401 and _is(error, "GatedRepoError"):
        return _GATED_ANONYMOUS
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return _FULL
    row = next((row for name, row in BY_TYPE if _is(error, name)), None)
    if row is not _REFUSED or status is None:
        return row
    if status in (401, 403) and urlsplit(_host(error)).hostname != urlsplit(_host(None)).hostname:
        return _STORAGE_REFUSES
    passing = status >= 500 or status in PASSING_STATUSES
    return BY_STATUS.get(status, _TROUBLE if passing else _REFUSED)


def _host(error: Any) -> str:
    """The address of the host that did not answer as it should: the hub's own, or that of its storage."""
    from huggingface_hub import constants

    try:
        asked = str(getattr(error, "response", error).request.url)
    except (AttributeError, RuntimeError):
        asked = constants.ENDPOINT
    return "/".join(shown(asked).split("/")[:3])


def _is(error: BaseException, name: str) -> bool:
    """Whether ``error`` is of the class ``name``, without importing the library that has it."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _reason(error: Exception) -> str:
    """A short reason without addresses, which may be signed or hold a proxy's password."""
    if _is(error, "TimeoutException"):
        return "no answer in time"
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:  # a re-raised exception is in its own context
        seen.add(id(link))
        if isinstance(link, ssl.SSLError):
            return f"TLS: {link.reason or 'handshake failed'}"
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return "the connection broke" if _is(error, "RemoteProtocolError") else type(error).__name__


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an exception of either library."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment: a broken connection, a slow, busy or failing server."""
    if status_of(error) is not None:
        return status_of(error) in PASSING_STATUSES
    hopeless = _is(error, "UnsupportedProtocol") or _is(error, "LocalProtocolError")
    return isinstance(error, OtherAnswerError) or (_is(error, "TransportError") and not hopeless)


def is_no_network(error: BaseException) -> bool:
    """Whether there was no connection at all, so that an immediate retry is useless."""
    return any(_is(error, name) for name in ("ConnectError", "ConnectTimeout", "ProxyError"))


def asked_wait(error: BaseException) -> float:
    """Seconds that the server asks us to wait, at most LONGEST_WAIT; 0 if it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = getattr(getattr(error, "response", None), "headers", None)
    if headers is None:
        return 0.0
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return min(float(limit.reset_in_seconds) + 1, LONGEST_WAIT)
    after = headers.get("Retry-After", "")
    if after.isascii() and after.isdigit():
        return min(float(after), LONGEST_WAIT)
    try:
        asked = parsedate_to_datetime(after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(asked, 0.0), LONGEST_WAIT)
