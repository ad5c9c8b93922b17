"""Which names the server goes by. A page in a browser can give a name of its own this machine's address and then read
what the server answers (DNS rebinding); the browser still sends that name as the request's Host.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ltxpack.errors import UsageError
from ltxpack.serve.answers import answer_of
from ltxpack.serve.refusal import Refusal

ANY = "*"
LOCALHOST = "localhost"
NAME = re.compile(r"\*|[^\s/:@*\[\]]+|\[[0-9A-Fa-f:.]+\]")


def name_of(authority: str) -> str:
    """``LOCALHOST:8000`` -> ``localhost``; ``[::1]:8000`` -> ``::1``."""
    name = authority[1:].partition("]")[0] if authority.startswith("[") else authority.partition(":")[0]
    return name.lower().removesuffix(".")


def known_names(bound: str, allowed: Iterable[str]) -> frozenset[str]:
    """The names of a server that listens on ``bound``, with those of ``--allow-host``. Raises UsageError."""
    for name in allowed:
        if not NAME.fullmatch(name):
            problem, wanted = "--allow-host takes a name alone", "gpu1.example.com, or * for any"
            raise UsageError(problem, expected=wanted, found=name, next="leave scheme, port and path out")
    return frozenset({LOCALHOST, bound.lower(), *map(name_of, allowed)})


class KnownHosts:
    """Refuses requests whose Host is none of ``names``. Addresses are answered: no page can be at this one's."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and ANY not in self.names:
            name = name_of(Headers(scope=scope).get("host", ""))
            if name not in self.names and not _is_address(name):
                advice = "whoever runs it can add the name with --allow-host, or ask for a key with --api-key"
                app = answer_of(Refusal(421, f"this server has no name {name[:100]!r}: {advice}", code="unknown_host"))
        await app(scope, receive, send)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
