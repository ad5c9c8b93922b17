"""What stands around the routes: every fault in one shape of JSON, bodies that end at their limit, files, counts."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ltxpack.serve.jobs import Jobs
from ltxpack.serve.metrics import Metrics
from ltxpack.serve.refusal import Refusal

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


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return answer_of(Refusal(500, "the server failed unexpectedly; its log says more"))


ANSWERS: dict[type[Exception], Callable[[Request, Exception], JSONResponse]] = {
    Refusal: _refused,
    HTTPException: _http_fault,
    RequestValidationError: _bad_query,
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
    """Counts answers by method, route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in METHODS else "other"
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.count("http_requests", method=method, route=route, status=str(message["status"]))
            await send(message)

        await self.app(scope, receive, counted)
