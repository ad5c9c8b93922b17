"""``ltxpack serve`` as an application of Ray Serve::

    serve run ltxpack.serve.ray_serve:app overlay=/shared/out output=/srv/videos

Its deployments: ``VideoServer``, one replica with HTTP, the jobs and the videos; ``VideoWorker``, one replica a GPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, Field, field_validator
from ray import serve
from ray.serve import Application

from ltxpack.files.units import parse_duration, parse_size
from ltxpack.reporter import Reporter
from ltxpack.runtime.parallel import cluster
from ltxpack.runtime.parallel.cluster import SharedDisk
from ltxpack.runtime.settings import SessionSettings
from ltxpack.serve.app import make_app
from ltxpack.serve.limits import FIXED, LEAST_KEPT, ServeLimits
from ltxpack.serve.links import Workplace
from ltxpack.serve.ray_workers import counted, remote_openings
from ltxpack.serve.replicas import ReplicaLink, Replicas, VideoWorker
from ltxpack.serve.server import API_KEY, ServeOptions, service_of

# A request for a video in its answer lasts as long as the video: the queue is what bounds them.
REQUESTS = 1000
# Seconds between looks of Ray Serve whether a replica is alive.
HEALTH = 2.0
WORKER = "VideoWorker"
# Jobs and videos are on the disk of one machine: the head of the cluster, unless a configuration says otherwise.
ON_THE_HEAD = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}


class ServeArguments(BaseModel, extra="forbid"):
    """What ``serve run`` and the ``args`` of a configuration can say: the flags of ``ltxpack serve`` by their names.

    ``session`` has the settings of the session. Without ``api_key`` the variable LTXPACK_API_KEY counts.
    """

    overlay: Path
    output: Path
    workers: int | None = Field(None, ge=1)
    devices: str | None = None
    api_key: str | None = Field(default_factory=lambda: os.environ.get(API_KEY), min_length=1)
    allow_hosts: Sequence[str] = ()
    models: Sequence[str] = ()
    queue: int = Field(ServeLimits.queue, ge=1)
    keep_videos: str | None = None
    keep_bytes: str | None = None
    session: Mapping[str, Any] = {}

    @field_validator("allow_hosts", "models", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """``serve run`` has no lists."""
        return [value] if isinstance(value, str) else value

    @field_validator("overlay", "output")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        if not path.is_absolute():
            raise ValueError("say the whole path, from /: the replica has a current folder of its own")
        return path

    @field_validator("session")
    @classmethod
    def _settings(cls, session: Mapping[str, Any]) -> Mapping[str, Any]:
        known = [one.name for one in fields(SessionSettings) if one.name not in FIXED]
        if unknown := sorted(set(session) - set(known)):
            raise ValueError(f"no such setting: {', '.join(unknown)}; there are {', '.join(known)}")
        return session

    def options(self) -> ServeOptions:
        """As the command has them. Raises UsageError."""
        seconds = self.keep_videos and parse_duration(self.keep_videos, "keep_videos", least=LEAST_KEPT)
        size = self.keep_bytes and parse_size(self.keep_bytes, "keep_bytes")
        limits = ServeLimits(queue=self.queue, keep_seconds=seconds or None, keep_bytes=size or None)
        session = SessionSettings(**self.session)
        session.check()
        named = {name: getattr(self, name) for name in ("devices", "api_key", "models", "allow_hosts", "workers")}
        return ServeOptions(self.overlay, self.output, session=session, limits=limits, **named)


class LogReporter(Reporter):
    """Tells what the server says in the log of its replica."""

    def __init__(self) -> None:
        self._log = logging.getLogger("ray.serve")

    def note(self, message: str) -> None:
        self._log.info(message)

    def warn(self, message: str) -> None:
        self._log.warning(message)


def app(args: Mapping[str, Any]) -> Application:
    """The application; raises ValidationError, LtxpackError for what it cannot be."""
    options = ServeArguments(**args).options()
    count, on_cpus = counted(ray, options.session, options.devices, options.workers)

    def build() -> FastAPI:
        return application(options, count, on_cpus)

    worker = serve.deployment(
        VideoWorker,
        name=WORKER,
        num_replicas=count,
        max_ongoing_requests=1,
        health_check_period_s=HEALTH,
        ray_actor_options=cluster.needs(on_cpus),
        logging_config={"enable_access_log": False},
    )
    server = serve.deployment(
        name="VideoServer",
        num_replicas=1,
        max_ongoing_requests=REQUESTS,
        health_check_period_s=HEALTH,
        ray_actor_options=ON_THE_HEAD,
    )
    return server(serve.ingress(build)()).bind(worker.bind())


def application(options: ServeOptions, count: int, on_cpus: bool) -> FastAPI:
    """What the replica of the server answers with. ``count``: of workers, unless a configuration has more of them."""
    name = serve.get_replica_context().app_name
    states = serve.status().applications[name].deployments[WORKER].replica_states
    count = max(count, sum(states.values()))

    def place() -> Workplace:
        handle = serve.get_deployment_handle(WORKER, name).options(stream=True)
        replicas = Replicas(handle, ray.get_runtime_context().current_actor, SharedDisk.of(options.overlay))
        openings = remote_openings("worker", count, on_cpus, options.overlay, options.session)
        return Workplace(openings, partial(ReplicaLink, replicas))

    return make_app(service_of(options, LogReporter(), None, place))
