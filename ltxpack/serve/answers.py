"""What stands around the routes: every fault in one shape of JSON, bodies that end at their limit, files, counts, and
the names that the server goes by.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ltxpack.errors import UsageError
from ltxpack.serve.jobs import Jobs
from ltxpack.serve.metrics import Metrics
from ltxpack.serve.refusal import Refusal

ANY = "*"
LOCALHOST = "localhost"
NAME = re.compile(r"\*|[^\s/:@*\[\]]+|\[[0-9A-Fa-f:.]+\]")
METHODS = ("GET", "HEAD", "POST", "DELETE")


def answer_of(refusal: Refusal) -> JSONResponse:
    """A refusal as the answer to a request."""
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return answer_of(error)


def _http_fault(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return answer_of(Refusal(error.status_code, str(error.detail), headers=error.headers))


def _bad_query(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return answer_of(Refusal(400, f"{param}: {first['msg']}", param=param, code="invalid_value"))


def _no_database(request: Request, error: Exception) -> JSONResponse:
    return answer_of(Refusal(503, "the jobs cannot be read or written now", headers={"Retry-After": "10"}))


def _left(request: Request, error: Exception) -> JSONResponse:
    return answer_of(Refusal(499, "the client has left", code="cancelled"))


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return answer_of(Refusal(500, "the server failed unexpectedly; its log says more"))


ANSWERS: dict[type[Exception], Callable[[Request, Exception], JSONResponse]] = {
    Refusal: _refused,
    HTTPException: _http_fault,
    RequestValidationError: _bad_query,
    ClientDisconnect: _left,
    sqlite3.Error: _no_database,
    OSError: _no_database,
    Exception: _unexpected,
}


class BodyLimit:
    """Ends the reading of a body at ``most`` bytes, whatever it said of its length."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise Refusal(413, f"a request may have {self.most} bytes", code="request_too_large")
            return message

        await self.app(scope, bounded, send)


class VideoAnswer(FileResponse):
    """The video of a job, which stays while it is sent; ``once``: the job is forgotten afterwards, sent or not."""

    def __init__(self, jobs: Jobs, job_id: str, *, once: bool) -> None:
        path = jobs.video(job_id)
        headers, name = ({"X-Video-Id": job_id}, None) if once else ({}, path.name)
        super().__init__(path, media_type="video/mp4", filename=name, headers=headers)
        self._jobs, self._job_id, self._once = jobs, job_id, once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._jobs.fetching(self._job_id) as path:
                if path is None:
                    await answer_of(Refusal(404, "the video was removed", code="not_found"))(scope, receive, send)
                else:
                    await super().__call__(scope, receive, send)
        finally:
            if self._once:
                await run_in_threadpool(self._jobs.delete, self._job_id)


class Counting:
    """Counts answers by method, route and status; a request that the end of the server interrupts gets one too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in METHODS else "other"
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.count("http_requests", method=method, route=route, status=str(message["status"]))
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except asyncio.CancelledError:
            if begun or scope["type"] != "http":
                raise
            await answer_of(Refusal(503, "the server ends"))(scope, receive, counted)


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
    """Refuses requests whose Host is none of ``names``. Addresses are answered: no page can be at this one's.

    A page in a browser can give a name of its own this machine's address and then read what the server answers (DNS
    rebinding); the browser still sends that name as the request's Host.
    """

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
