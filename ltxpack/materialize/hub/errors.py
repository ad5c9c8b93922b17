"""What can go wrong between us and a model hub, each told in one sentence that ends in what to do next.

Knows huggingface_hub's and httpx's exceptions, and nothing of files or caches. Both libraries are imported only when
something has failed.
"""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ltxpack.errors import SourceError, printable
from ltxpack.files.units import human_bytes

# 408 request timeout, 429 rate limit, 5xx trouble on the hub's side: worth another try.
PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
LONGEST_WAIT = 300.0
LONGEST_QUOTE = 300
COMMIT_LENGTH = 40
COMMIT_SHOWN = 12
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class HubUnreachable(SourceError):
    """No answer, or none of use: no network, a proxy in the way, the hub down. The cache may still help."""


@dataclass(frozen=True)
class Place:
    """What was asked for, so that a message can name it."""

    endpoint: str
    cache: Path
    repo: str
    revision: str | None = None
    name: str | None = None

    @property
    def page(self) -> str:
        """The repository's page, for a browser."""
        return f"{self.endpoint}/{self.repo}"

    @property
    def label(self) -> str:
        """``REPO[@REV][/FILE]``, as the user would type it, with a commit shortened."""
        revision = self.revision or ""
        shown = revision[:COMMIT_SHOWN] if len(revision) == COMMIT_LENGTH else revision
        return self.repo + (f"@{shown}" if shown else "") + (f"/{self.name}" if self.name else "")


def status_of(error: BaseException) -> int | None:
    """The HTTP status an exception of either library stands for."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment: a broken connection, a slow, busy or failing server."""
    import httpx

    if status_of(error) is not None:
        return status_of(error) in PASSING_STATUSES
    return isinstance(error, httpx.TransportError) and not isinstance(
        error, (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
    )


def is_no_network(error: BaseException) -> bool:
    """Whether no connection came about at all, so that trying at once again is of no use."""
    import httpx

    return isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError))


def asked_wait(error: BaseException) -> float:
    """Seconds the server asks us to wait, capped; 0 where it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = getattr(getattr(error, "response", None), "headers", None)
    if headers is None:
        return 0.0
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return min(float(limit.reset_in_seconds) + 1, LONGEST_WAIT)
    after = headers.get("Retry-After", "")
    return min(float(after), LONGEST_WAIT) if after.isascii() and after.isdigit() else 0.0


def explain(error: Exception, place: Place) -> SourceError | None:
    """The SourceError to raise in place of ``error``; None if it is none of the hub's (a bug, then)."""
    import httpx
    from huggingface_hub import errors as hub

    if isinstance(error, hub.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Callable[[Any, Place], SourceError]], ...] = (
        ((hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError), lambda _, place: not_cached(place)),
        (hub.HfHubHTTPError, _http_error),
        (hub.FileMetadataError, lambda _, place: _not_a_hub(place, "an answer without a commit or an ETag")),
        (httpx.TooManyRedirects, lambda _, place: _not_a_hub(place, "redirects without end")),
        (httpx.TransportError, _no_network),
        (httpx.InvalidURL, lambda _, place: _not_a_hub(place, "an address that is none")),
        (OSError, _disk_error),
    )
    return next((tell(error, place) for kind, tell in kinds if isinstance(error, kind)), None)


def not_cached(place: Place) -> SourceError:
    """The hub is not asked, for HF_HUB_OFFLINE is set or it did not answer, and the cache does not have it."""
    return SourceError(
        "is not in the hub cache, and the hub is not asked (offline mode, or no network)",
        file=place.label,
        found=f"cache {place.cache}",
        next="unset HF_HUB_OFFLINE, connect and run the same command again, or set HF_HUB_CACHE to a cache that has it",
    )


def missing_file(place: Place, similar: Sequence[str] = (), known: int | None = None) -> SourceError:
    """The repository has no such file; ``similar`` names are listed."""
    return SourceError(
        "no such file in the repository" + ("; similar names:" if similar else ""),
        file=place.label,
        found=f"{known} other files" if known is not None and not similar else None,
        items=similar,
        next=f"see {place.page}/tree/{place.revision or 'main'} for what it holds",
    )


def disk_full(place: Place, needed: int, free: int) -> SourceError:
    """``needed`` bytes do not fit into ``free``."""
    return SourceError(
        "the disk of the hub cache is full",
        file=place.label,
        expected=f"{human_bytes(needed)} free in {place.cache}",
        found=human_bytes(free),
        next="free some space, or set HF_HUB_CACHE to a folder on a larger disk; then run the same command again",
    )


def broken_off(reason: SourceError, place: Place, present: int, size: int) -> SourceError:
    """A download that no retry could finish; ``present`` of ``size`` bytes are kept."""
    return HubUnreachable(
        "the download broke off, after several tries",
        file=place.label,
        expected=f"{size} bytes",
        found=f"{present} bytes, which are kept ({reason.found})",
        next="run the same command again; it goes on from there",
    )


def _http_error(error: Any, place: Place) -> SourceError:
    from huggingface_hub import errors as hub

    status, said = status_of(error), _quote(error.server_message)
    for name, tell in ERRORS_BY_TYPE:
        if isinstance(error, getattr(hub, name)):
            return tell(place, status, said)
    if status == 429:
        return _rate_limit(place, asked_wait(error))
    if status is not None and (status >= 500 or status in PASSING_STATUSES):
        return _hub_trouble(place, status)
    return ERRORS_BY_STATUS.get(status, _refused)(place, status, said)


def _gated(place: Place, status: int | None, said: str | None) -> SourceError:
    """401: nobody is logged in. 403: somebody is, whose account or token has no access yet."""
    accept = f"open {place.page} and accept the licence there, then: hf auth login"
    if status == 401:
        return SourceError(
            "the repository is gated: its licence must be accepted by an account, and none is logged in",
            file=place.label,
            next=accept,
        )
    return SourceError(
        "the repository is gated: this account or token has no access",
        file=place.label,
        found=said,
        next=f"{accept} (the token needs read access to gated repositories)",
    )


def _no_repository(place: Place, _: int | None, __: str | None) -> SourceError:
    return SourceError(
        "no such repository, or a private one",
        file=place.label,
        next=f"check the name at {place.page}; if it is private: hf auth login",
    )


def _disabled(place: Place, _: int | None, said: str | None) -> SourceError:
    return SourceError(
        "the hub has disabled this repository", file=place.label, found=said, next=f"open {place.page} for the reason"
    )


def _no_revision(place: Place, _: int | None, __: str | None) -> SourceError:
    return SourceError(
        "no such revision (branch, tag or commit)",
        file=place.label,
        next=f"see {place.page}/commits/main, or leave the revision out for the newest",
    )


def _no_entry(place: Place, _: int | None, __: str | None) -> SourceError:
    return missing_file(place)


def _bad_token(place: Place, _: int | None, said: str | None) -> SourceError:
    source = "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token"
    return SourceError(
        "the hub refuses the access token",
        file=place.label,
        found=f"{source}: {said or 'not valid'}",
        next="hf auth login (or correct HF_TOKEN, which comes before the stored token)",
    )


def _forbidden(place: Place, _: int | None, said: str | None) -> SourceError:
    return SourceError(
        "the access token may not read this repository",
        file=place.label,
        found=said,
        next=f"allow it at {place.endpoint}/settings/tokens, then: hf auth login",
    )


def _refused(place: Place, status: int | None, said: str | None) -> SourceError:
    return SourceError(
        "the hub refuses the request",
        file=place.label,
        found=f"HTTP {status} from {place.endpoint}" + (f": {said}" if said else ""),
        next=f"check HF_ENDPOINT, if you have set it, and open {place.page}",
    )


def _rate_limit(place: Place, seconds: float) -> SourceError:
    return HubUnreachable(
        "the hub's rate limit is reached",
        file=place.label,
        found=f"HTTP 429, wait {seconds:.0f} s" if seconds else "HTTP 429",
        next="wait and run the same command again; a login raises the limit: hf auth login",
    )


def _hub_trouble(place: Place, status: int) -> SourceError:
    return HubUnreachable(
        "the hub has trouble answering, after several tries",
        file=place.label,
        found=f"HTTP {status} from {place.endpoint}",
        next="run the same command again later; with the files in the cache already: HF_HUB_OFFLINE=1",
    )


def _no_network(error: Exception, place: Place) -> SourceError:
    return HubUnreachable(
        "the hub cannot be reached",
        file=place.label,
        found=f"{place.endpoint}: {_reason(error)}",
        next="check the network and proxy (HTTPS_PROXY), then run the same command again;"
        " with the files in the cache already: HF_HUB_OFFLINE=1",
    )


def _not_a_hub(place: Place, found: str) -> SourceError:
    return HubUnreachable(
        "what answers is not a model hub",
        file=place.label,
        found=f"{found} from {place.endpoint}",
        next="check HF_ENDPOINT, and whether a proxy or a login page of the network stands in between",
    )


def not_understood(place: Place, problem: str) -> SourceError:
    """The hub's answer is not what its protocol says. Nothing of it is used."""
    return SourceError(
        f"the hub's answer cannot be used: {problem}",
        file=place.label,
        next=f"check HF_ENDPOINT, if you have set it, and open {place.page}",
    )


def _disk_error(error: OSError, place: Place) -> SourceError:
    if error.errno in DISK_FULL:
        return SourceError(
            "the disk of the hub cache is full",
            file=place.label,
            found=f"no space left in {place.cache}",
            next="free some space, or set HF_HUB_CACHE to a folder on a larger disk;"
            " then run the same command again, it goes on where it stopped",
        )
    return SourceError(
        "the hub cache cannot be used",
        file=place.label,
        found=f"{error.filename or place.cache}: {error.strerror or _reason(error)}",
        next="check that the folder can be written, or set HF_HUB_CACHE to one that can",
    )


def _reason(error: Exception) -> str:
    """A short reason without addresses: those are signed, or hold a proxy's password."""
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ssl.SSLError):
            return f"TLS: {link.reason or 'handshake failed'}"
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return {"RemoteProtocolError": "the connection broke"}.get(type(error).__name__, type(error).__name__)


def _quote(message: str | None) -> str | None:
    """What the server said, on one line and not too much of it."""
    text = " ".join(printable(message or "").split())
    return text[:LONGEST_QUOTE] or None


Teller = Callable[[Place, int | None, str | None], SourceError]

# In this order: to huggingface_hub a gated repository is one that is not found.
ERRORS_BY_TYPE: tuple[tuple[str, Teller], ...] = (
    ("GatedRepoError", _gated),
    ("RepositoryNotFoundError", _no_repository),
    ("DisabledRepoError", _disabled),
    ("RevisionNotFoundError", _no_revision),
    ("EntryNotFoundError", _no_entry),
)
ERRORS_BY_STATUS: Mapping[int | None, Teller] = MappingProxyType({401: _bad_token, 403: _forbidden})
