"""Workers as actors of a Ray cluster, one a GPU, on any of its machines.

Jobs and videos stay with the server: pictures go to the actor with the task, and the mp4 comes back, so that the
machines share nothing but the overlay. Ray Serve starts its workers itself (:mod:`replicas`): their links have the same
base class.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ltxpack.errors import LtxpackError, UsageError
from ltxpack.files.publish import Temporary, output_errors
from ltxpack.runtime.parallel import cluster
from ltxpack.runtime.parallel.actors import ActorWorker
from ltxpack.runtime.parallel.cluster import SharedDisk
from ltxpack.runtime.parallel.contract import Opening
from ltxpack.runtime.settings import SessionSettings
from ltxpack.serve.jobs import Job
from ltxpack.serve.links import WORKER, Message, StartedLink, WorkerLink, Workplace, openings_of
from ltxpack.serve.refusal import told

# The key of a worker's last message of a video that it made, and the keys of what goes along: the bytes of the video,
# and in a task those of its pictures.
DONE, VIDEO, FILES = "done", "video", "files"


def ray_place(
    ray: Any, root: Path, session: SessionSettings, devices: str | None = None, workers: int | None = None
) -> Workplace:
    """Actors on the cluster that ``ray`` is connected to: one for each GPU, so many ``workers``, or ``devices``: cpu:N.

    Raises UsageError for what does not go with a cluster, DeviceError for one without GPUs.
    """
    count, on_cpus = counted(ray, session, devices, workers)
    start = partial(ActorWorker, ray, SharedDisk.of(root), on_cpus, WORKER)
    return Workplace(remote_openings("actor", count, on_cpus, root, session), partial(ActorLink, start))


def counted(ray: Any, session: SessionSettings, devices: str | None, workers: int | None) -> tuple[int, bool]:
    """How many workers there are, and whether on CPUs. Raises as :func:`ray_place`."""
    on_cpus = cluster.cpu_workers(session.device, devices)
    if on_cpus and workers is not None:
        raise UsageError("--devices and --workers are two answers to one question", next="leave --workers out")
    return on_cpus or workers or cluster.gpus(ray), on_cpus > 0


def remote_openings(name: str, count: int, on_cpus: bool, root: Path, session: SessionSettings) -> list[Opening]:
    """What so many workers of a cluster begin with; Ray chooses the cards."""
    device = "cpu" if on_cpus else "cuda"
    return openings_of([(f"{name} {number}", device) for number in range(count)], root, session)


class RemoteLink(WorkerLink):
    """The server's end of a worker elsewhere: the files of a job go with its task and come with its end."""

    _output = Path()

    def _sent(self, job: Job, output: Path, pictures: Path) -> Message:
        """What the worker needs to make ``output``: the task, and its pictures."""
        self._output = output
        files = {name: (pictures / name).read_bytes() for name, *_ in job.task.images}
        return {**vars(job.task), "id": job.id, FILES: files}

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


class ActorLink(StartedLink, RemoteLink):
    """An actor that was asked for: it starts when the cluster has room for it."""

    _is_patient = True

    def make(self, job: Job, output: Path, pictures: Path) -> None:
        self._worker.tell(self._sent(job, output, pictures))

    def messages(self) -> Iterator[Message]:
        return map(self._kept, super().messages())
