"""Workers as actors of a Ray cluster, one a GPU, on any of its machines.

Jobs and videos stay with the server: pictures go to the actor with the task, and the mp4 comes back, so that the
machines share nothing but the overlay. :class:`VideoActor` is what runs there. Ray Serve starts its workers itself
(:mod:`replicas`): they and their links have the same base classes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ltxpack.errors import LtxpackError, UsageError, one_line
from ltxpack.files.publish import Temporary, output_errors
from ltxpack.imports import claim_process, uncollected
from ltxpack.runtime.parallel import cluster
from ltxpack.runtime.parallel.cluster import SharedDisk
from ltxpack.runtime.settings import SessionSettings
from ltxpack.serve.jobs import Job
from ltxpack.serve.links import Died, Message, Opening, WorkerLink, Workplace, fault_of
from ltxpack.serve.refusal import told

# The key of a worker's last message of a video that it made, and the one under which an actor adds its bytes.
DONE, VIDEO = "done", "video"
# How the names of folders of temporary files begin.
FOLDER = "ltxpack-worker-"
# Seconds for which such a folder may be without its lock.
YOUNG = 60.0


def ray_place(
    ray: Any, root: Path, session: SessionSettings, devices: str | None = None, workers: int | None = None
) -> Workplace:
    """Actors on the cluster that ``ray`` is connected to: one for each GPU, so many ``workers``, or ``devices``: cpu:N.

    Raises UsageError for what does not go with a cluster, DeviceError for one without GPUs.
    """
    count, on_cpus = counted(ray, session, devices, workers)
    openings = remote_openings("actor", count, on_cpus, root, session)
    return Workplace(openings, partial(ActorLink, ray, SharedDisk.of(root), on_cpus))


def counted(ray: Any, session: SessionSettings, devices: str | None, workers: int | None) -> tuple[int, bool]:
    """How many workers there are, and whether on CPUs. Raises as :func:`ray_place`."""
    on_cpus = cluster.cpu_workers(session.device, devices)
    if on_cpus and workers is not None:
        raise UsageError("--devices and --workers are two answers to one question", next="leave --workers out")
    return on_cpus or workers or cluster.gpus(ray), on_cpus > 0


def remote_openings(name: str, count: int, on_cpus: bool, root: Path, session: SessionSettings) -> list[Opening]:
    """What so many workers of a cluster begin with; Ray chooses the cards."""
    device = "cpu" if on_cpus else "cuda"
    return [Opening.of(f"{name} {number}", device, root, session, count) for number in range(count)]


class RemoteWorker(ABC):
    """A process of the cluster that makes videos."""

    _cancelled: set[str]
    # A Session, once it is open: its module needs torch.
    _session: Any = None

    @abstractmethod
    def _say(self, message: Message) -> None:
        """Tell the server ``message``, from any thread."""

    def open(self, disk: SharedDisk, settings: Mapping[str, Any], actors: int) -> None:
        """Ready for tasks. ``actors``: how many of the server there are at most on a machine."""
        try:
            disk.check()
            claim_process()
            with uncollected():
                from ltxpack.runtime.libraries import import_libraries
                from ltxpack.runtime.session import Session
                from ltxpack.serve.worker import WorkerNotes

            session = Session(disk.root, SessionSettings(**settings), WorkerNotes(self._say))
            session.process_ends = True
            session.residency.processes = cluster.sharers_here(actors)
            self._session = session
            import_libraries()
            self._say(self._ready())
        except LtxpackError as error:
            self._say(fault_of(error))
        except Exception as error:  # whatever goes wrong, nobody waits for ever
            problem, advice = f"{type(error).__name__}: {one_line(str(error))}", "look at Ray's logs of this process"
            self._say({"fault": problem, "next": advice})

    def make(self, task: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
        """Make the video of ``task``; what becomes of it is said, with its bytes at the end."""
        from ltxpack.serve import worker

        try:
            with _own_folder() as name:
                for picture, data in pictures.items():
                    Path(name, picture).write_bytes(data)
                output = Path(name, "video.mp4")

                def say(message: Message) -> None:
                    self._say({**message, VIDEO: output.read_bytes()} if DONE in message else message)

                worker.make(self._session, {**task, "output": str(output), "pictures": name}, self._cancelled, say)
        except OSError as error:
            problem = "the worker's folder for temporary files cannot be written"
            self._say({"failed": problem, "code": "server_error", "log": f"{problem}: {error}"})

    def _ready(self) -> Message:
        return {"ready": f"{self._session.device}, {cluster.where()}"}


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    """A new folder for temporary files; those of workers that were killed are removed. Raises OSError."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError), _locked(left) as status:
            if time.time() - status.st_mtime > YOUNG:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True) as name, contextlib.ExitStack() as ends:
        with contextlib.suppress(OSError):  # a filesystem without locks: nobody can remove the folder either
            ends.enter_context(_locked(Path(name)))
        yield name


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[os.stat_result]:
    """The lock on a folder of this user, which ends with its process. Raises OSError where another one has it."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(opened)
        if status.st_uid != os.getuid():
            raise PermissionError(folder)
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield status
    finally:
        os.close(opened)


class VideoActor(RemoteWorker):
    """It as an actor, whose three threads make videos, say what comes of them, and take what is cancelled."""

    def __init__(self) -> None:
        self._said: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._cancelled = set()

    def next(self) -> Message:
        """What it says next, once it says something."""
        return self._said.get()

    def cancel(self, job_id: str) -> None:
        """End the work for a job at its next step."""
        self._cancelled.add(job_id)

    def _say(self, message: Message) -> None:
        self._said.put(message)


class RemoteLink(WorkerLink):
    """The server's end of a :class:`RemoteWorker`: the files of a job go with its task and come with its end."""

    _output = Path()

    def _sent(self, job: Job, output: Path, pictures: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What the worker needs to make ``output``: the task, and its pictures."""
        self._output = output
        files = {name: (pictures / name).read_bytes() for name, *_ in job.task.images}
        return {**vars(job.task), "id": job.id}, files

    def _kept(self, message: Message) -> Message:
        """``message``; a video that came with it is in its place."""
        if VIDEO not in message:
            return message
        try:
            with output_errors(self._output), Temporary(self._output) as path:
                path.write_bytes(message[VIDEO])
        except LtxpackError as error:
            return {"failed": told(error), "code": "server_error", "log": error.render()}
        return {name: value for name, value in message.items() if name != VIDEO}


class ActorLink(RemoteLink):
    """An actor that was asked for: it starts when the cluster has room for it."""

    def __init__(self, ray: Any, disk: SharedDisk, on_cpus: bool, opening: Opening) -> None:
        self._ray = ray
        self._actor = ray.remote(**cluster.needs(on_cpus), max_concurrency=3, max_restarts=0)(VideoActor).remote()
        self._actor.open.remote(disk, opening.settings, opening.sharers)
        self._next = self._actor.next.remote()
        self._patient = True

    def make(self, job: Job, output: Path, pictures: Path) -> None:
        self._actor.make.remote(*self._sent(job, output, pictures))

    def cancel(self, job_id: str) -> None:
        self._actor.cancel.remote(job_id)

    def messages(self) -> Iterator[Message]:
        while True:
            if self._patient and not self._ray.wait([self._next], timeout=cluster.PATIENCE)[0]:
                yield {"note": cluster.NOT_STARTED}
            self._patient = False
            message = self._got()
            self._next = self._actor.next.remote()
            yield self._kept(message)

    def check(self) -> None:
        if self._ray.wait([self._next], timeout=0)[0]:
            self._got()

    def end(self) -> None:
        self._ray.kill(self._actor)

    def _got(self) -> Message:
        """What the actor says next. Raises Died."""
        try:
            message: Message = self._ray.get(self._next)
        except self._ray.exceptions.RayError as error:
            raise Died(cluster.why_ended(error)) from None
        return message
