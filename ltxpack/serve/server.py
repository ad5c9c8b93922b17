"""A server put together: the overlay's models, the jobs in their folder, a worker for each device, and HTTP."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvicorn

from ltxpack.errors import LtxpackError, UsageError
from ltxpack.files.tensorfile import read_json
from ltxpack.files.units import human_bytes, human_seconds
from ltxpack.manifest import is_overlay
from ltxpack.reporter import Reporter
from ltxpack.runtime.overlay import BASE, Overlay, transformer_part
from ltxpack.runtime.parallel.cluster import connected, cpu_workers
from ltxpack.runtime.parallel.devices import RAY_HERE, named_devices
from ltxpack.runtime.parallel.process import ProcessWorker
from ltxpack.runtime.settings import AUTO, SessionSettings
from ltxpack.serve.answers import known_names
from ltxpack.serve.app import Service, make_app
from ltxpack.serve.intake import Intake
from ltxpack.serve.jobs import Jobs
from ltxpack.serve.limits import ServeLimits
from ltxpack.serve.links import WORKER, StartedLink, Workplace, openings_of
from ltxpack.serve.metrics import Metrics
from ltxpack.serve.models import served_models
from ltxpack.serve.ray_workers import ray_place
from ltxpack.serve.schema import request_schema
from ltxpack.serve.workers import OnFault, Workers

# The variable with the key, which no worker sees.
API_KEY = "LTXPACK_API_KEY"
LOCAL = ("127.0.0.1", "::1", "localhost")
# Seconds that open connections have to end once the server stops.
GRACE = 5


@dataclass(frozen=True)
class ServeOptions:
    """What ``ltxpack serve`` is given: ``devices`` as ``0,1``, one worker each; ``models`` further names.

    ``allow_hosts`` are names of the server itself, which are checked where there is no ``api_key``. With an address of
    a ``ray`` cluster there are so many ``workers``, or one for each of its GPUs.
    """

    overlay: Path
    output: Path = Path("videos")
    host: str = "127.0.0.1"
    port: int = 8000
    devices: str | None = None
    api_key: str | None = None
    models: Sequence[str] = ()
    allow_hosts: Sequence[str] = ()
    ray: str | None = None
    workers: int | None = None
    session: SessionSettings = field(default_factory=SessionSettings)
    limits: ServeLimits = field(default_factory=ServeLimits)


def serve(options: ServeOptions, reporter: Reporter, on_open: Callable[[str], None], worker: str = WORKER) -> None:
    """Answer requests until a signal comes; ``on_open(address)`` when the server can be reached.

    ``worker``: the module of its workers.

    Raises UsageError, OverlayError before that, and LtxpackError where a worker cannot begin.
    """
    options.session.check()
    faults: list[LtxpackError] = []

    def on_fault(error: LtxpackError) -> None:
        faults.append(error)
        server.should_exit = True

    with _listening(options.host, options.port) as listening, contextlib.ExitStack() as ends:
        place = partial(_place, options, reporter, ends, worker)
        service = service_of(options, reporter, on_fault, place)
        config = uvicorn.Config(
            make_app(service), log_level="error", access_log=False, timeout_graceful_shutdown=GRACE, lifespan="on"
        )
        server = uvicorn.Server(config)
        host, port = listening.getsockname()[:2]
        if options.api_key is None and options.host not in LOCAL:
            reporter.warn(f"everybody who reaches {host} can make videos: there is no --api-key")
        reporter.note(f"models: {', '.join(service.intake.models)}")
        reporter.note(_kept(options.limits))
        on_open(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        try:
            server.run(sockets=[listening])
        finally:
            service.workers.stop()
            service.jobs.close()
    if faults:
        raise faults[0]


def service_of(options: ServeOptions, reporter: Reporter, on_fault: OnFault, place: Callable[[], Workplace]) -> Service:
    """The parts of a server, whose workers run in ``place``; none is started yet.

    Raises UsageError, OverlayError, FormatError, SourceError, and what ``place`` raises.
    """
    names = known_names(options.host, options.allow_hosts)
    overlay = Overlay.open(options.overlay, options.session.text_encoder)
    models = served_models(overlay, options.session.format, options.models)
    blocks = read_json(overlay.folder(transformer_part(BASE)) / "config.json")["num_layers"]
    inside = next((one for one in options.output.absolute().resolve().parents if is_overlay(one)), None)
    if inside is not None or is_overlay(options.output):
        problem = "lies in the overlay, which holds nothing but its own files"
        raise UsageError(problem, file=options.output, next="choose another folder with -o")
    found = place()
    limits = options.limits
    jobs, metrics = Jobs(options.output, limits.queue, limits.keep_seconds, limits.keep_bytes), Metrics()
    return Service(
        jobs,
        Intake(jobs, models, limits, len(found.openings)),
        Workers(found, jobs, metrics, reporter, on_fault),
        metrics,
        request_schema([*models], limits, blocks),
        options.api_key,
        names,
    )


def _kept(limits: ServeLimits) -> str:
    """How long videos stay, in words."""
    bounds = [] if limits.keep_seconds is None else [f"{human_seconds(limits.keep_seconds)} after their end"]
    bounds += [] if limits.keep_bytes is None else [f"the oldest beyond {human_bytes(limits.keep_bytes)}"]
    if not bounds:
        return "videos stay until they are deleted; --keep-videos 24h or --keep-bytes 50GB bounds them"
    return f"videos are removed: {', '.join(bounds)}"


def _place(options: ServeOptions, reporter: Reporter, ends: contextlib.ExitStack, worker: str) -> Workplace:
    """Processes of this machine that run the module ``worker``, or actors of a Ray cluster, to which there is a
    connection until ``ends``. Raises UsageError, DeviceError.
    """
    os.environ.pop(API_KEY, None)  # every worker has the environment of this process
    if options.ray is None:
        return process_place(options, worker)
    on_cpus = cpu_workers(options.session.device, options.devices)
    reporter.note("starting Ray on this machine" if options.ray == RAY_HERE else f"connecting to Ray ({options.ray})")
    ray = ends.enter_context(connected(options.ray, on_cpus))
    return ray_place(ray, options.overlay.absolute(), options.session, options.devices, options.workers)


def process_place(options: ServeOptions, worker: str = WORKER) -> Workplace:
    """A process for each device. Raises UsageError for devices that do not go together."""
    if options.workers is not None:
        raise UsageError("--workers goes with --ray", next="leave --workers out, or add --ray ADDRESS")
    if options.devices is not None and options.session.device != AUTO:
        raise UsageError("--device and --devices are two answers to one question", next="leave --device out")
    devices = (options.session.device,) if options.devices is None else named_devices(options.devices)
    openings = openings_of([(device, device) for device in devices], options.overlay.absolute(), options.session)
    # The signals of a terminal are for the server, which stops its workers.
    start = partial(ProcessWorker, worker, start_new_session=True)
    return Workplace(openings, partial(StartedLink, start))


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        found = getattr(error, "strerror", None) or str(error)
        advice = "choose another --host or --port"
        raise UsageError(f"{host}:{port} cannot be listened on", found=found, next=advice) from None
