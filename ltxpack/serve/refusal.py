"""What a client is told when it gets no result: one shape of JSON, which OpenAI's clients read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ltxpack.errors import LtxpackError, clipped, printable

INVALID, SERVER = "invalid_request_error", "server_error"
FLAG = re.compile(r"--([a-z][a-z0-9-]*)")
# Advice that a client can follow; other advice is for who runs the server.
CHOOSE = "choose "
# Settings that a client may have stated by another field.
INSTEAD = {"height": "size", "width": "size", "num_frames": "seconds"}


class Refusal(Exception):
    """An answer with an HTTP ``status`` of 400 or more. ``param`` names the field at fault, ``code`` the kind."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, printable(clipped(message)), param, code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The answer."""
        kind = SERVER if self.status >= 500 else INVALID
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def told(error: LtxpackError) -> str:
    """``error`` for a client, in a line: settings by their names, and no path of this machine."""
    stated = (("expected", error.expected), ("found", error.found))
    facts = [f"{word} {fact}" for word, fact in stated if fact not in (None, "")]
    facts += [str(item) for item in error.items[: error.max_listed]] if error.file is None else []
    facts += [error.next] if error.next.startswith(CHOOSE) else []
    line = ": ".join([error.problem, ", ".join(facts)] if facts else [error.problem])
    return FLAG.sub(lambda flag: flag[1].replace("-", "_"), line)


def field_at_fault(error: LtxpackError, said: Collection[str]) -> str | None:
    """The field of the request that ``error`` names as a flag; ``said`` has the fields that the client sent."""
    advice = error.next if error.next.startswith(CHOOSE) else ""
    flag = FLAG.search(f"{error.problem} {advice}")
    if flag is None:
        return None
    name = flag[1].replace("-", "_")
    instead = INSTEAD.get(name, name)
    return instead if instead in said else name
