"""What a client is told when it gets no result: one shape of JSON, which OpenAI's clients read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ltxpack.errors import LtxpackError, clipped, printable

INVALID, SERVER = "invalid_request_error", "server_error"
FLAG = re.compile(r"--([a-z][a-z0-9-]*)")
# Advice that a client can follow; other advice is for who runs the server.
CHOOSE = "choose "


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
    facts = [f"{word} {fact}" for word, fact in (("expected", error.expected), ("found", error.found)) if fact]
    facts += [str(item) for item in error.items[: error.max_listed]] if error.file is None else []
    facts += [error.next] if error.next.startswith(CHOOSE) else []
    line = ": ".join([error.problem, ", ".join(facts)] if facts else [error.problem])
    return FLAG.sub(lambda flag: flag[1].replace("-", "_"), line)
