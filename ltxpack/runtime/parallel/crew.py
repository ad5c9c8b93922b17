"""A crew of processes on this machine, one a device, each of which makes whole videos with a session of its own."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ltxpack.runtime.lines import Task
from ltxpack.runtime.parallel.share import Crew, Event, Gone
from ltxpack.runtime.parallel.team import LEFT, Worker
from ltxpack.runtime.request import Request
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.weights.device import resolve_device

LINE_WORKER = "ltxpack.runtime.parallel.line_worker"


class Processes(Crew):
    """One for each of ``devices``. Nothing of it is left when this process ends, in whatever way.

    Raises DeviceError for a device that is not there.
    """

    def __init__(self, root: Path, settings: SessionSettings, devices: Sequence[str]) -> None:
        for device in dict.fromkeys(devices):
            resolve_device(device, "--devices")
        self.names = [f"worker {number} on {device}" for number, device in enumerate(devices)]
        self._root, self._settings, self._devices = root, settings, devices
        # What the workers say, in the order in which it comes: events, and at its end each a line for the summary.
        self._said: queue.SimpleQueue[Event | str] = queue.SimpleQueue()
        self._workers: dict[int, Worker] = {}
        for number in range(len(devices)):
            self._start(number)

    def begin(self, worker: int, task: Task, following: Request | None) -> None:
        self._workers[worker].tell((task, following))

    def next(self) -> Event:
        event = self._said.get()
        assert not isinstance(event, str), "a worker says its last before it is told to end"
        return event

    def replace(self, worker: int) -> None:
        self._workers[worker].end(0.0)
        self._start(worker)

    def _start(self, worker: int) -> None:
        started = Worker(worker, self._devices[worker], self._ended, LINE_WORKER, self._said.put)
        self._workers[worker] = started
        own = replace(self._settings, device=started.device, devices=None)
        started.tell((self._root, own, worker, len(self._devices), torch.get_num_threads()))

    def close(self) -> list[str]:
        for worker in self._workers.values():
            worker.dismiss()
        for worker in self._workers.values():
            worker.end(LEFT)
        said: list[Any] = []
        while not self._said.empty():
            said.append(self._said.get())
        return sorted(line for line in said if isinstance(line, str))

    def _ended(self, worker: Worker) -> None:
        self._said.put(Gone(worker.rank, worker.fault))
