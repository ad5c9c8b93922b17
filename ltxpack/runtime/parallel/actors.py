"""A crew of Ray actors on any number of machines, one a GPU, each of which makes whole videos with its own session.

Ray places the actors and notices when one ends; all machines see the overlay and the videos' folders under one path.
:class:`LineActor` is what runs there, everything else runs in the process of ``ltxpack run``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ltxpack
from ltxpack.errors import DeviceError, LtxpackError, OverlayError, UsageError, one_line
from ltxpack.files.publish import Temporary, output_errors
from ltxpack.files.reader import hash_file
from ltxpack.manifest import MANIFEST_NAME
from ltxpack.reporter import Reporter
from ltxpack.runtime.lines import LineMaker, Task
from ltxpack.runtime.parallel.devices import RAY_HERE
from ltxpack.runtime.parallel.schemes import DATA, NONE
from ltxpack.runtime.parallel.share import Carried, Crew, Event, Gone, Ready, Told, Voice
from ltxpack.runtime.prompts_file import PromptsLine
from ltxpack.runtime.request import Request
from ltxpack.runtime.run import peak_memory
from ltxpack.runtime.session import Session, devices_of
from ltxpack.runtime.settings import AUTO, SessionSettings

# Seconds: until it is told that no actor could start yet, and what an actor gets to end by itself.
PATIENCE, LEFT = 60.0, 10.0
ANSWER_SECONDS = 10.0
# Ray's variables, unless they are set: nothing is sent to its makers. A cluster of this machine alone listens on no
# other address, ends no actor because memory is nearly used up, which the planner means it to be, and gives actors the
# processor like any other process.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}
OF_HERE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class SharedDisk:
    """What every machine must see as this one does: the overlay ``root``, whose manifest has this hash, and ``marks``,
    files in the folders of the videos; and the ``version`` of ltxpack there.
    """

    root: Path
    manifest: str
    marks: tuple[Path, ...]
    version: str

    def check(self) -> None:
        """Raises LtxpackError where something is another here."""
        if ltxpack.__version__ != self.version:
            raise UsageError("another ltxpack is installed there", expected=self.version, found=ltxpack.__version__)
        if hash_file(self.root / MANIFEST_NAME) != self.manifest:
            raise OverlayError("another overlay is at this path there", file=self.root)
        for mark in self.marks:
            if not mark.exists():
                raise UsageError("another folder is at this path there: videos would be lost", file=mark.parent)


class LineActor:
    """A process of the cluster. One of its two threads carries out tasks, the other says what comes of it."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._said: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def next(self) -> Event:
        """The next event, once there is one."""
        return self._said.get()

    def open(self, disk: SharedDisk, settings: SessionSettings, actors: int) -> str:
        """Ready for tasks; where this is, in words. ``actors``: how many of the run there are at most on a machine."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        resources: Mapping[str, float] = next((each["Resources"] for each in ray.nodes() if each["NodeID"] == node), {})
        with self._or_gone():
            disk.check()
            session = Session(disk.root, settings, Voice(self._number, self._said.put))
            session.process_ends = True
            session.residency.processes = min(actors, int(resources.get("GPU", 0)) or actors)
            self._maker = LineMaker(session)
            self._said.put(Ready(self._number))
        return f"{ray.util.get_node_ip_address()}, process {os.getpid()}"

    def carry_out(self, task: Task, following: Request | None) -> None:
        """As :meth:`.LineMaker.carry_out`; the result is an event."""
        with self._or_gone():
            self._said.put(Carried(self._number, self._maker.carry_out(task, following)))

    def close(self) -> str:
        """No more tasks; the memory that the process held, in words."""
        session = self._maker.session
        session.close()
        return peak_memory(session.device)

    @contextlib.contextmanager
    def _or_gone(self) -> Iterator[None]:
        """What goes wrong in the block is the last event: whoever waits for the next one is told."""
        try:
            yield
        except LtxpackError as error:
            self._said.put(Gone(self._number, error.render().replace("\n", ";")))
        except Exception as error:
            self._said.put(Gone(self._number, f"{type(error).__name__}: {one_line(str(error))}"))


class Actors(Crew):
    """One actor for each GPU of the cluster at ``address``, or as many on CPUs as ``settings.devices`` says.

    No more than there are ``lines``. Raises UsageError for what does not go with a cluster or without Ray, DeviceError
    for a cluster that cannot be reached or has no GPU.
    """

    def __init__(
        self, address: str, root: Path, settings: SessionSettings, lines: Sequence[PromptsLine], reporter: Reporter
    ) -> None:
        workers = _cpu_workers(settings)
        reporter.note("starting Ray on this machine" if address == RAY_HERE else f"connecting to Ray ({address})")
        # The actor's next event, and what opening it gives, as references to results to come.
        self._asked: dict[Any, int] = {}
        self._opened: dict[int, Any] = {}
        self._actors: dict[int, Any] = {}
        self._at_work: set[int] = set()
        self._patient = True
        with contextlib.ExitStack() as ends:
            self._ray = ends.enter_context(_connected(address, workers))
            count = workers or int(self._ray.cluster_resources().get("GPU", 0))
            if count == 0:
                advice = "the same command with --devices cpu:2 (two workers on CPUs, for tests)"
                raise DeviceError("the Ray cluster has no GPU", next=advice)
            self._count = min(count, len(lines))
            marks = [_mark(folder, ends) for folder in dict.fromkeys(line.output.parent for line in lines)]
            self._disk = SharedDisk(root, hash_file(root / MANIFEST_NAME), tuple(marks), ltxpack.__version__)
            self._settings = replace(settings, device="cpu" if workers else "cuda", devices=None, parallel=AUTO)
            needs = {"num_cpus": 1} if workers else {"num_cpus": 0, "num_gpus": 1}
            self._actor = self._ray.remote(**needs, max_concurrency=2, max_restarts=0)(LineActor)
            self.names: list[str] = [f"actor {number}" for number in range(self._count)]
            for number in range(self._count):
                self.replace(number)
            self._ends = ends.pop_all()

    def begin(self, worker: int, task: Task, following: Request | None) -> None:
        self._at_work.add(worker)
        self._actors[worker].carry_out.remote(task, following)

    def next(self) -> Event:
        while True:
            found, _ = self._ray.wait([*self._asked], num_returns=1, timeout=PATIENCE if self._patient else None)
            if found:
                return self._event(self._asked.pop(found[0]), found[0])
            self._patient = False
            if len(self._asked) == len(self._opened):
                return Told(0, "warn", "no actor has started yet: the cluster may have no GPU or CPU free for one")

    def replace(self, worker: int) -> None:
        actor = self._actors[worker] = self._actor.remote(worker)
        self._opened[worker] = actor.open.remote(self._disk, self._settings, self._count)
        self._asked[actor.next.remote()] = worker
        self._patient = True

    def close(self) -> list[str]:
        with self._ends:
            idle = [worker for worker in self._actors if worker not in {*self._at_work, *self._opened}]
            closed = {worker: self._actors[worker].close.remote() for worker in idle}
            said = [f"{self.names[worker]}: {self._peak(reference)}" for worker, reference in closed.items()]
            for actor in self._actors.values():
                self._ray.kill(actor)
            if self._asked:  # each ends with its actor
                self._ray.wait([*self._asked], num_returns=len(self._asked), timeout=LEFT)
        return said

    def _event(self, worker: int, reference: Any) -> Event:
        try:
            event: Event = self._ray.get(reference)
            if isinstance(event, Ready):
                self.names[worker] = f"actor {worker} on {self._ray.get(self._opened.pop(worker))}"
        except self._ray.exceptions.RayError as error:
            event = Gone(worker, _why(error))
        if isinstance(event, Gone | Carried):
            self._at_work.discard(worker)
        if isinstance(event, Gone):
            self._opened.pop(worker, None)
            self._ray.kill(self._actors.pop(worker))
        else:
            self._asked[self._actors[worker].next.remote()] = worker
        return event

    def _peak(self, reference: Any) -> str:
        with contextlib.suppress(self._ray.exceptions.RayError):
            return str(self._ray.get(reference, timeout=LEFT))
        return "did not answer at its end"


def _cpu_workers(settings: SessionSettings) -> int:
    """How many workers on CPUs are asked for; 0 for one on each GPU. Raises UsageError for what Ray decides."""
    if settings.device != AUTO:
        raise UsageError("--device does not go with --ray, which has an actor on each GPU", next="leave --device out")
    if settings.parallel not in (AUTO, DATA, NONE):
        problem = f"--parallel {settings.parallel} does not go with --ray: each actor makes whole videos"
        raise UsageError(problem, next=f"choose --parallel {DATA}")
    if settings.save_activations is not None:
        raise UsageError("--save-activations goes with one device", next="leave --ray out")
    devices = () if settings.devices is None else devices_of(settings)
    if set(devices) - {"cpu"}:
        problem, wanted = "--devices with --ray counts workers on CPUs alone", "cpu:N, or nothing for one on each GPU"
        raise UsageError(problem, expected=wanted, found=settings.devices, next="leave --devices out")
    return len(devices)


@contextlib.contextmanager
def _connected(address: str, workers: int) -> Iterator[Any]:
    """Ray, connected in the block; a program that has Ray running already keeps it as it is."""
    for name, value in (ENVIRONMENT | (OF_HERE if address == RAY_HERE else {})).items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed", next="pip install 'ltxpack[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    if address not in (RAY_HERE, AUTO):
        _check_answers(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    more: dict[str, Any] = {"include_dashboard": False} if address == RAY_HERE else {}
    if address == RAY_HERE and workers:
        more["num_cpus"] = workers
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, **more)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _unreachable(address, error) from None
    # Ray would print what it knows of actors that ended on standard output, where results go; there is no switch.
    ray._private.worker._worker_logs_enabled = False
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises UsageError for what is no address, DeviceError where nobody answers: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        advice = "the same command on a machine of the cluster, with --ray auto"
        raise UsageError("--ray takes no such address", expected="HOST:PORT, auto, or none", found=address, next=advice)
    try:
        socket.create_connection((host.strip("[]"), int(port[:6])), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> DeviceError:
    problem = f"the Ray cluster cannot be reached: {one_line(str(error))}"
    return DeviceError(problem, found=address, next="ray status (on a machine of the cluster)")


def _mark(folder: Path, ends: contextlib.ExitStack) -> Path:
    """A file that whoever sees this ``folder`` sees too, until ``ends``. Raises UnwrittenError."""
    with output_errors(folder):
        mark = Temporary(folder / "ltxpack-ray")
    ends.callback(mark.discard)
    return mark.path


def _why(error: Exception) -> str:
    """Why an actor ended, as Ray knows it, in a line."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line.startswith("The actor is dead because") or "Error: " in line]
    return (told or lines or [type(error).__name__])[-1].partition(" Some common causes")[0]
