"""The interface over HTTP: routes, keys, limits, and one shape of error. Knows neither devices nor weights."""

from __future__ import annotations

import asyncio
import hmac
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from ltxpack import __version__
from ltxpack.serve.answers import ANSWERS, ANY, BodyLimit, Counting, KnownHosts, VideoAnswer
from ltxpack.serve.intake import Intake
from ltxpack.serve.jobs import COMPLETED, ENDED, FAILED, Job, Jobs
from ltxpack.serve.limits import MAX_FIELD, MAX_FIELDS
from ltxpack.serve.metrics import Labels, Metrics
from ltxpack.serve.refusal import Refusal
from ltxpack.serve.schema import REFERENCE, RequestReader
from ltxpack.serve.workers import BUSY, IDLE, Workers

# Seconds between looks: whether the video of a synchronous request is there, and its client too; and what has expired.
LOOK, EXPIRY = 0.1, 5.0
JSON, FORM = "application/json", "multipart/form-data"
RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))")
VIDEO = {
    "type": "object",
    "required": ["id", "object", "model", "status", "progress", "created_at", "size", "seconds"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "video"},
        "model": {"type": "string"},
        "status": {"enum": ["queued", "in_progress", "completed", "failed"]},
        "progress": {"type": "integer", "minimum": 0, "maximum": 100},
        "created_at": {"type": "integer", "description": "Seconds since 1970."},
        "completed_at": {"type": ["integer", "null"]},
        "expires_at": {"type": ["integer", "null"], "description": "When the server removes a job that has ended."},
        "prompt": {"type": "string"},
        "size": {"type": "string", "description": "WIDTHxHEIGHT."},
        "seconds": {"type": "string"},
        "error": {"type": ["object", "null"], "description": "code and message of a job that failed."},
        "warnings": {"type": "array", "items": {"type": "string"}},
    },
}


@dataclass(frozen=True)
class Service:
    """What the routes need. Without an ``api_key`` everybody who reaches the server by one of ``names`` may use it."""

    jobs: Jobs
    intake: Intake
    workers: Workers
    metrics: Metrics
    schema: Mapping[str, Any]
    api_key: str | None = None
    names: Collection[str] = (ANY,)


def make_app(service: Service) -> FastAPI:
    """The application; its workers start and stop with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.workers.start()
        expiring = asyncio.create_task(expire_for_ever(service.jobs, service.metrics))
        yield
        expiring.cancel()
        await run_in_threadpool(service.workers.stop)
        service.jobs.close()

    app = FastAPI(
        title="ltxpack", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.include_router(VideoRoutes(service).router())
    app.include_router(_about(service))
    app.add_middleware(BodyLimit, most=service.intake.limits.body)
    app.add_middleware(KnownHosts, names=(ANY,) if service.api_key is not None else service.names)
    app.add_middleware(Counting, metrics=service.metrics)
    for kind, answer in ANSWERS.items():
        app.add_exception_handler(kind, answer)
    return app


class VideoRoutes:
    """The routes of videos and models."""

    def __init__(self, service: Service) -> None:
        self.service, self.jobs = service, service.jobs
        self.reader = RequestReader(service.schema)

    def router(self) -> APIRouter:
        """Them, behind the key."""
        schema = self.service.schema
        file = {"type": "string", "format": "binary", "description": "The picture of the first frame."}
        as_form = {**schema, "properties": {**schema["properties"], REFERENCE: file}}
        content = {JSON: {"schema": schema}, FORM: {"schema": as_form}}
        asks = {"requestBody": {"required": True, "content": content}}
        one: dict[int | str, dict[str, Any]] = {200: {"content": {JSON: {"schema": VIDEO}}}}
        mp4: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {}}}}
        router = APIRouter(prefix="/v1", dependencies=[Depends(_authorised(self.service))])
        router.post("/videos", openapi_extra=asks, responses=one)(self.create)
        router.post("/videos/sync", openapi_extra=asks, responses=mp4)(self.create_and_wait)
        router.get("/videos")(self.list_videos)
        router.get("/videos/{video_id}", responses=one)(self.retrieve)
        router.get("/videos/{video_id}/content", responses=mp4)(self.download)
        router.head("/videos/{video_id}/content", include_in_schema=False)(self.download)
        router.delete("/videos/{video_id}")(self.delete)
        router.get("/models")(self.models)
        return router

    async def create(self, request: Request) -> JSONResponse:
        """Accept a video to be made; it waits behind those accepted before."""
        return JSONResponse((await self._accepted(request)).public)

    async def create_and_wait(self, request: Request) -> Response:
        """Make a video, and answer with its bytes when it is there. It is not kept; nor made if the client leaves."""
        job = await self._accepted(request)
        try:
            ended = await self._ended(job, request)
        except asyncio.CancelledError:  # so some servers tell that a client has left
            self._forget(job.id)
            raise
        if ended.status == FAILED:
            error = ended.error or {}
            status = 400 if error.get("code") == "invalid_request" else 500
            await run_in_threadpool(self.jobs.delete, job.id)
            raise Refusal(status, error.get("message", ""), code=error.get("code"))
        _without_range(request)
        return VideoAnswer(self.jobs, job.id, once=True)

    def list_videos(
        self,
        after: str | None = None,
        limit: int = Query(20, ge=1, le=100),
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """The jobs, the newest first; ``after`` is the id of the last one that was seen."""
        behind = None if after is None else self._job(after, "after")
        found = self.jobs.listed(behind, limit + 1, order == "desc")
        data = [job.public for job in found[:limit]]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(found) > limit}

    def retrieve(self, video_id: str) -> dict[str, Any]:
        """A job as it is now."""
        return self._job(video_id).public

    def download(self, request: Request, video_id: str, variant: str = "video") -> Response:
        """The mp4 of a completed job."""
        job = self._job(video_id)
        if variant != "video":
            raise Refusal(400, "only the video itself is kept", param="variant", code="invalid_value")
        if job.status != COMPLETED:
            raise Refusal(409, f"the video is not there: its job is {job.status}", code="video_not_ready")
        with self.jobs.fetching(job.id) as path:
            if path is not None:
                _check_range(request, path.stat().st_size)
        return VideoAnswer(self.jobs, job.id, once=False)

    def delete(self, video_id: str) -> dict[str, Any]:
        """Forget a job and its video; one in progress ends at its next step."""
        job = self._job(video_id)
        self._forget(job.id)
        return {"id": job.id, "object": "video.deleted", "deleted": True}

    def models(self) -> dict[str, Any]:
        """The models: each name picks a recipe and bakes."""
        names = self.service.intake.models
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "ltxpack"} for name in names]
        return {"object": "list", "data": data}

    async def _accepted(self, request: Request) -> Job:
        said, uploaded = await _read(request, self.reader)
        try:
            job = await run_in_threadpool(self.service.intake.accept, said, uploaded)
        except Refusal as refusal:
            if refusal.status == 429:
                self.service.metrics.count("jobs_refused")
            raise
        self.service.metrics.count("jobs_accepted")
        return job

    async def _ended(self, job: Job, request: Request) -> Job:
        """``job`` once it has ended. Raises Refusal where it was deleted; cancels it if its client leaves."""
        while True:
            now = await run_in_threadpool(self.jobs.get, job.id)
            if now is None:
                raise Refusal(409, "the job was deleted", code="cancelled")
            if now.status in ENDED:
                return now
            if await request.is_disconnected():
                await run_in_threadpool(self._forget, job.id)
                raise Refusal(499, "the client has left", code="cancelled")
            await asyncio.sleep(LOOK)

    def _job(self, job_id: str, param: str = "video_id") -> Job:
        job = self.jobs.get(job_id)
        if job is None:
            raise Refusal(404, f"there is no video {job_id[:60]!r}", param=param, code="not_found")
        return job

    def _forget(self, job_id: str) -> None:
        self.jobs.delete(job_id)
        self.service.workers.cancel(job_id)


def _about(service: Service) -> APIRouter:
    """The routes for whoever runs the server, which ask for no key."""
    router = APIRouter()

    # Load balancers ask with HEAD.
    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    def health() -> JSONResponse:
        """What the workers do; status 503 while none of them is ready."""
        workers = service.workers.states
        ready = any(worker["state"] in (IDLE, BUSY) for worker in workers)
        shown = [{"device": worker["device"], "state": worker["state"]} for worker in workers]
        body = {"status": "ok" if ready else "unavailable", "workers": shown, "jobs": service.jobs.counts()}
        return JSONResponse(body, 200 if ready else 503)

    @router.get("/metrics")
    def metrics() -> PlainTextResponse:
        """Counts for Prometheus."""
        states = [(one["device"], one["state"]) for one in service.workers.states]
        gauges: dict[str, dict[Labels, float]] = {
            "jobs": {(("status", status),): count for status, count in service.jobs.counts().items()},
            "queue_limit": {(): service.intake.limits.queue},
            "kept_bytes": {(): service.jobs.kept_bytes()},
            "workers": {(("device", one), ("state", state)): states.count((one, state)) for one, state in states},
        }
        text = service.metrics.text(gauges)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def expire_for_ever(jobs: Jobs, metrics: Metrics) -> None:
    """Look again and again what has expired, until this is cancelled; nothing does where nothing bounds it."""
    while jobs.keep_seconds is not None or jobs.keep_bytes is not None:
        try:
            removed = await run_in_threadpool(jobs.expire)
        except (sqlite3.Error, OSError):  # as in a request: the next look may do better
            metrics.count("expiry_faults")
        else:
            for reason, count in removed.items():
                metrics.count("jobs_expired", count, reason=reason)
        await asyncio.sleep(EXPIRY)


def _authorised(service: Service) -> Callable[[Request], None]:
    """Refuses requests without the key; where there is none, those that a page makes a browser send."""
    wanted = None if service.api_key is None else f"Bearer {service.api_key}".encode()

    def check(request: Request) -> None:
        if wanted is not None:
            given = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, wanted):
                headers = {"WWW-Authenticate": "Bearer"}
                raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key", headers=headers)
        elif "origin" in request.headers:
            raise Refusal(403, "without an API key no page in a browser is answered", code="forbidden")

    return check


async def _read(request: Request, reader: RequestReader) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a request, and the picture that was uploaded with it. Raises Refusal."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == JSON:
        return reader.from_json(await request.body()), None
    if kind != FORM:
        raise Refusal(415, f"the body is neither {JSON} nor {FORM}")
    uploaded: bytes | None = None
    texts: list[tuple[str, str]] = []
    async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                texts.append((name, value))
            elif name == REFERENCE:
                uploaded = await value.read()
            else:
                raise Refusal(400, f"only {REFERENCE} can be a file", param=name[:60])
    return reader.from_form(texts), uploaded


def _check_range(request: Request, size: int) -> None:
    """Ignore a Range that is none, as HTTP has it; refuse one beyond the file in our shape of error."""
    header = request.headers.get("range")
    found = RANGE.fullmatch(header) if header is not None else None
    first, last = (found[1], found[2]) if found else (None, None)
    if found is None or (first is not None and last and int(last) < int(first)):
        _without_range(request)
    elif (first is not None and int(first) >= size) or found[3] == "0":
        raise Refusal(416, f"the video has {size} bytes", headers={"Content-Range": f"bytes */{size}"})


def _without_range(request: Request) -> None:
    request.scope["headers"] = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
