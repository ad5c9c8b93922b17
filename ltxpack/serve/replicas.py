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
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import RayServeException

from ltxpack.runtime.parallel.actors import LOGS, begun_here
from ltxpack.runtime.parallel.cluster import SharedDisk, why_ended
from ltxpack.runtime.parallel.contract import Opening, Tell, WorkerFault, fault_of
from ltxpack.serve.jobs import Job
from ltxpack.serve.links import WORKER, Died, Message
from ltxpack.serve.ray_workers import RemoteLink

# Seconds: between looks whether the server is alive, until it is told that no replica is free, and for which a replica
# that cannot work gets no task.
LOOK, PATIENCE, UNFIT = 1.0, 3.0, 30.0


class VideoWorker:
    """A replica, which has one request at a time; the answer is what it says."""

    # The module of its work, its session and where it is, once they are there: both need torch.
    _opened: tuple[Any, Any, str] | None = None
    _work: asyncio.Future[None] | None = None

    async def work(
        self, server: Any, disk: SharedDisk, opening: Opening, task: Message | None = None
    ) -> AsyncIterator[Message | WorkerFault]:
        """That it is ready or why it cannot be, then what comes of ``task``.

        The work ends at its next step when the request is cancelled or the actor ``server`` has died. A replica that
        cannot work ends, so that Ray Serve starts another one.
        """
        if self._work is not None:  # of a request that was cancelled
            await asyncio.wait([self._work])
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Message | WorkerFault | None]()
        cancelled, job_id = set[str](), "" if task is None else task["id"]

        def say(message: Message | WorkerFault) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, message)

        self._work = loop.run_in_executor(None, self._carry_out, disk, opening, task, cancelled, say)
        self._work.add_done_callback(lambda _: heard.put_nowait(None))
        death = asyncio.create_task(_death(server))
        death.add_done_callback(lambda _: cancelled.add(job_id))
        is_fit = True
        try:
            while (message := await heard.get()) is not None:
                is_fit &= not isinstance(message, WorkerFault) and "ends" not in message
                yield message
            await (self._work if is_fit else asyncio.sleep(UNFIT))
        finally:
            death.cancel()
            if not is_fit:
                os._exit(1)

    def _carry_out(
        self, disk: SharedDisk, opening: Opening, task: Message | None, cancelled: set[str], say: Tell
    ) -> None:
        try:
            if self._opened is None:
                worker, own = begun_here(WORKER, disk, opening)
                self._opened = worker, own.session(worker.WorkerNotes(say)), own.where
        except Exception as error:  # whatever goes wrong, nobody waits for ever
            say(fault_of(error, LOGS))
            return
        worker, session, where = self._opened
        say(worker.ready(session, where))
        if task is not None:
            worker.make_apart(session, task, cancelled, say)


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
                if isinstance(message, WorkerFault):
                    self._answer = None  # not to be cancelled: such a replica stays away from tasks
                    raise Died(message.why, message)
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
                next(one for one in self.messages() if "ready" in one)
            finally:
                self._replicas.waiting_since = None
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

    def _ask(self, task: Message | None = None) -> None:
        replicas = self._replicas
        self._answer = replicas.handle.work.remote(replicas.server, replicas.disk, self._opening, task)
        if self._ended:
            self._cancel()

    def _cancel(self) -> None:
        if self._answer is not None:
            with contextlib.suppress(RayError, RayServeException):
                self._answer.cancel()
