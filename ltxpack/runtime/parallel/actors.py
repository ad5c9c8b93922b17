"""A worker as an actor of a Ray cluster: :class:`WorkerActor` runs there, :class:`ActorWorker` is its other end.

Ray places the actors and notices when one ends. Needs no torch.
"""

from __future__ import annotations

import importlib
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ltxpack.imports import claim_process, uncollected
from ltxpack.runtime.parallel.cluster import SharedDisk, needs, sharers_here, where, why_ended
from ltxpack.runtime.parallel.contract import Opening, Worker, WorkerFault, fault_of

# Seconds that an actor gets to end by itself, and that Ray gets to tell of its end; and between looks whether anybody
# listens to it.
LEFT, LOOK = 10.0, 1.0
LOGS = "look at Ray's logs of this process"


def begun_here(module: str, disk: SharedDisk, opening: Opening) -> tuple[Any, Opening]:
    """In a process of the cluster: the ``module`` of a worker, and its opening on this machine. Raises LtxpackError."""
    disk.check()
    claim_process()
    with uncollected():
        worker = importlib.import_module(module)
    return worker, replace(opening, sharers=sharers_here(opening.sharers), where=where())


class WorkerActor:
    """A process of the cluster. Its three threads work, take what it is told, and hand out what it says."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, module: str, disk: SharedDisk, opening: Opening) -> None:
        """Run the function ``work`` of ``module``; whatever goes wrong, nobody waits for ever."""
        try:
            worker, opening = begun_here(module, disk, opening)
            worker.work(opening, self._told.get, self._said.put)
        except Exception as error:
            self._said.put(fault_of(error, LOGS))
        self._said.put(None)

    def tell(self, message: Any) -> None:
        """``message`` is for the work."""
        self._told.put(message)

    def next(self) -> Any:
        """Wait for what it says next; None once it has ended."""
        return self._said.get()


class ActorWorker(Worker):
    """An actor that runs ``module``: it starts when the cluster has room for it, where ``disk`` is the same."""

    def __init__(
        self,
        ray: Any,
        disk: SharedDisk,
        on_cpus: bool,
        module: str,
        opening: Opening,
        received: Callable[[Any], object],
        ended: Callable[[Worker], object],
    ) -> None:
        super().__init__(opening, received, ended)
        self._ray, self._why = ray, ""
        self._is_idle = self._is_left = False
        self._actor = ray.remote(**needs(on_cpus), max_concurrency=3, max_restarts=0)(WorkerActor).remote()
        self._actor.run.remote(module, disk, opening)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def tell(self, message: Any) -> None:
        self._actor.tell.remote(message)

    def dismiss(self, *, idle: bool = False) -> None:
        self._is_idle = idle
        if idle:
            self.tell(None)
        else:
            self._ray.kill(self._actor)

    def end(self, seconds: float | None = None) -> None:
        if self._is_idle:
            self._listening.join(LEFT if seconds is None else seconds)
        self._ray.kill(self._actor)
        self._listening.join(LEFT)
        self._is_left = True  # nobody may ask Ray once there is no connection
        self._listening.join()

    @property
    def fault(self) -> WorkerFault:
        return self.said or WorkerFault(self._why)

    def _next(self) -> Any:
        """What the actor says next, once it does; None once it has ended, or nobody listens any more."""
        said = self._actor.next.remote()
        while not self._ray.wait([said], timeout=LOOK)[0]:
            if self._is_left:
                return None
        return self._ray.get(said)

    def _listen(self) -> None:
        try:
            while (message := self._next()) is not None:
                self._hear(message)
            self._why = "it has ended its work"
            self._ray.kill(self._actor)
        except self._ray.exceptions.RayError as error:
            self._why = why_ended(error)
        self.has_ended = True
        self._ended(self)
