"""A crew of processes on this machine, one a device, each of which makes whole videos with a session of its own."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ltxpack.errors import UsageError
from ltxpack.runtime.lines import Make, Task
from ltxpack.runtime.model.model import read_dit_config
from ltxpack.runtime.overlay import BASE, Overlay, chosen, transformer_part
from ltxpack.runtime.parallel.planned import OF_STAGES, plan_schemes
from ltxpack.runtime.parallel.process import LEFT, Worker
from ltxpack.runtime.parallel.schemes import AUTO, DATA, STAGES
from ltxpack.runtime.parallel.share import Carried, Crew, Event, Gone, Ready
from ltxpack.runtime.request import Request
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.weights.device import resolve_device
from ltxpack.runtime.weights.machine import this_machine
from ltxpack.runtime.weights.plan import FILE, RESIDENT
from ltxpack.runtime.weights.sizes import model_sizes

LINE_WORKER = "ltxpack.runtime.parallel.line_worker"


class Processes(Crew):
    """One worker for each of ``devices``. All end when this process ends, in whatever way.

    ``by_stages``: the first of two devices encodes prompts and makes first stages, the second makes the rest. Raises
    DeviceError for a device that is not there.
    """

    def __init__(self, root: Path, settings: SessionSettings, devices: Sequence[str], by_stages: bool = False) -> None:
        for device in dict.fromkeys(devices):
            resolve_device(device, "--devices")
        self.names = [f"worker {number} on {device}" for number, device in enumerate(devices)]
        self.by_stages = by_stages
        self._root, self._settings, self._devices = root, settings, devices
        # What the workers say, in order: events, and at its end each a line for the summary.
        self._said: queue.SimpleQueue[Event | str] = queue.SimpleQueue()
        self._workers: dict[int, Worker] = {}
        self._idle: set[int] = set()
        try:
            for number in range(len(devices)):
                self._start(number)
        except BaseException:
            self.close()
            raise

    def begin(self, worker: int, task: Task, following: Request | None) -> None:
        self._idle.discard(worker)
        self._workers[worker].tell((task, following))

    def next(self) -> Event:
        event = self._said.get()
        assert not isinstance(event, str), "a worker says its last when it is told to end"
        if isinstance(event, Ready | Carried):
            self._idle.add(event.worker)
        elif isinstance(event, Gone):
            self._idle.discard(event.worker)
        return event

    def takes(self, worker: int, task: Task) -> bool:
        return not self.by_stages or isinstance(task, Make) == (worker == 1)

    def replace(self, worker: int) -> None:
        self._workers[worker].end(0.0)
        self._start(worker)

    def _start(self, worker: int) -> None:
        device = self._devices[worker]
        started = self._workers[worker] = Worker(worker, device, LINE_WORKER, self._ended, self._said.put)
        own = replace(self._settings, device=device, devices=None, parallel=AUTO)
        only = OF_STAGES[worker] if self.by_stages else frozenset[str]()
        started.tell((self._root, own, worker, len(self._devices), only, torch.get_num_threads()))

    def close(self) -> list[str]:
        for number, worker in self._workers.items():
            worker.dismiss(idle=number in self._idle)
        for worker in self._workers.values():
            worker.end(LEFT)
        said = [self._said.get() for _ in range(self._said.qsize())]
        return sorted(line for line in said if isinstance(line, str))

    def _ended(self, worker: Worker) -> None:
        self._said.put(Gone(worker.rank, worker.fault))


def goes_by_stages(
    overlay: Overlay, settings: SessionSettings, requests: Sequence[Request], devices: Sequence[str]
) -> bool:
    """Whether two devices make a stage each, as ``settings`` say.

    ``auto`` does so if each device then holds all that it needs, while a device that makes whole videos would read its
    transformers from their files again for every video. A video of middle size decides. Raises UsageError where it is
    asked for and cannot be.
    """
    counts = {len(devices), *(len(request.recipe.stages) for request in requests)}
    if settings.parallel == STAGES and counts != {2}:
        problem = f"--parallel {STAGES} goes with two devices, and recipes of two stages"
        found = f"{len(devices)} devices" if len(devices) != 2 else "a recipe of one stage"
        raise UsageError(problem, found=found, next=f"choose --parallel {DATA}")
    if settings.parallel != AUTO or counts != {2}:
        return settings.parallel == STAGES
    works = [request.work(chosen(overlay, settings, request.recipe).stages) for request in requests]
    work = sorted(works, key=lambda work: work.shape.tokens)[len(works) // 2]
    cards = [int(device.partition(":")[2]) for device in devices if device != "cpu"]
    names = dict.fromkeys(stage.transformer for stage in work.stages)
    model = model_sizes(overlay, names, settings.dtype)
    config = read_dit_config(overlay.folder(transformer_part(BASE)))
    planned = plan_schemes(model, config, work, this_machine(cards=cards), len(devices), settings.residency)
    plans = {one.scheme: one.plans for one in planned.schemes}
    again = [plan for plan in plans[DATA] if any(plan.placements[part].home == FILE for part in work.transformer_parts)]
    stay = [plan for plan in plans[STAGES] if plan.mode == RESIDENT]
    return len(stay) == len(devices) and (bool(again) or not plans[DATA])
