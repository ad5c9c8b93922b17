"""Workers as replicas of a deployment of Ray Serve, which starts them, one a GPU, and again where one has died.

:class:`VideoWorker` is what runs there. The server has a link for each replica; for each task Ray Serve chooses one of
the replicas that are free.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import RayServeException

from ltxpack.runtime.parallel.cluster import SharedDisk, why_ended
from ltxpack.serve.jobs import Job
from ltxpack.serve.links import Died, Message, Opening
from ltxpack.serve.ray_workers import RemoteLink, RemoteWorker

# Seconds: between looks whether the server is alive, until it is told that no replica is free, and for which a replica
# that cannot work gets no task.
LOOK, PATIENCE, UNFIT = 1.0, 3.0, 30.0
# What is to be made, and its pictures.
Task = tuple[Mapping[str, Any], Mapping[str, bytes]]


class VideoWorker(RemoteWorker):
    """A replica, which has one request at a time; the answer is what it says."""

    _work: asyncio.Future[None] | None = None
    _heard: asyncio.Queue[Message | None]
    _loop: asyncio.AbstractEventLoop

    async def work(
        self, server: Any, disk: SharedDisk, opening: Opening, task: Task | None = None
    ) -> AsyncIterator[Message]:
        """That it is ready or why it cannot be, then what comes of ``task``.

        The work ends at its next step when the request is cancelled or the actor ``server`` has died. A replica that
        cannot work ends, so that Ray Serve starts another one.
        """
        if self._work is not None:  # of a request that was cancelled
            await asyncio.wait([self._work])
        self._loop, heard = asyncio.get_running_loop(), asyncio.Queue[Message | None]()
        cancelled, job_id = set[str](), "" if task is None else task[0]["id"]
        self._heard, self._cancelled = heard, cancelled
        self._work = self._loop.run_in_executor(None, self._carry_out, disk, opening, task)
        self._work.add_done_callback(lambda _: heard.put_nowait(None))
        death = asyncio.create_task(_death(server))
        death.add_done_callback(lambda _: cancelled.add(job_id))
        is_fit = True
        try:
            while (message := await heard.get()) is not None:
                is_fit &= not {"fault", "ends"} & message.keys()
                yield message
            await (self._work if is_fit else asyncio.sleep(UNFIT))
        finally:
            death.cancel()
            if not is_fit:
                os._exit(1)

    def _carry_out(self, disk: SharedDisk, opening: Opening, task: Task | None) -> None:
        if self._session is None:
            self.open(disk, opening.settings, opening.sharers)
        else:
            self._say(self._ready())
        if self._session is not None and task is not None:
            self.make(*task)

    def _say(self, message: Message) -> None:
        self._loop.call_soon_threadsafe(self._heard.put_nowait, message)


async def _death(server: Any) -> None:
    """Returns once this actor has died."""
    while True:
        try:
            await server.__ray_ready__.remote()
        except ActorDiedError:
            return
        except RayError:  # it may be reached again
            pass
        await asyncio.sleep(LOOK)


@dataclass
class Replicas:
    """All replicas, which the actor ``server`` reaches by a streaming ``handle``.

    One of its threads at a time has the ``turn``: it waits for a free replica, and then for a task to give it. So no
    job leaves the queue before a replica is there for it.
    """

    handle: Any
    server: Any
    disk: SharedDisk
    turn: threading.Lock = field(default_factory=threading.Lock)
    waiting_since: float | None = None


class ReplicaLink(RemoteLink):
    """What the server has in place of a worker of its own: one request at a time, to a replica that is free."""

    def __init__(self, replicas: Replicas, opening: Opening) -> None:
        self._replicas, self._opening = replicas, opening
        self._answer: Any = None
        self._makes = self._unwanted = self._ended = False

    def make(self, job: Job, output: Path, pictures: Path) -> None:
        self._makes, self._unwanted = True, False
        self._ask(self._sent(job, output, pictures))

    def cancel(self, job_id: str) -> None:
        self._unwanted = True
        self._cancel()

    def messages(self) -> Iterator[Message]:
        if not self._makes:
            self._ask()
        try:
            for message in self._answer:
                if "fault" in message:
                    self._answer = None  # not to be cancelled: such a replica stays away from tasks
                    if self._makes:
                        raise Died(message["fault"])
                yield self._kept(message)
        except (RayError, RayServeException) as error:
            if not self._unwanted:
                raise Died(why_ended(error)) from None
            yield {"cancelled": True}
        raise Died("the replica says no more")

    @contextlib.contextmanager
    def free(self) -> Iterator[None]:
        with self._replicas.turn:
            self._replicas.waiting_since, self._makes = time.monotonic(), False
            try:
                said = next(one for one in self.messages() if "ready" in one or "fault" in one)
            finally:
                self._replicas.waiting_since = None
            if "fault" in said:
                raise Died(said["fault"])
            yield

    @property
    def is_missing(self) -> bool:
        since = self._replicas.waiting_since
        return since is not None and time.monotonic() - since > PATIENCE

    def check(self) -> None:
        """Ray Serve looks after the replicas."""

    def end(self) -> None:
        self._ended = True
        self._cancel()

    def _ask(self, task: Task | None = None) -> None:
        replicas = self._replicas
        self._answer = replicas.handle.work.remote(replicas.server, replicas.disk, self._opening, task)
        if self._ended:
            self._cancel()

    def _cancel(self) -> None:
        if self._answer is not None:
            with contextlib.suppress(RayError, RayServeException):
                self._answer.cancel()
