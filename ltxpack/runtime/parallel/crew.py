"""A crew of workers elsewhere, each of which makes whole videos with a session of its own: processes on this machine,
one a device, or Ray actors on any number of machines, one a GPU.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ltxpack.errors import UsageError
from ltxpack.files.publish import Temporary, output_errors
from ltxpack.reporter import Reporter
from ltxpack.runtime.lines import Make, Task
from ltxpack.runtime.model.weights import read_dit_config
from ltxpack.runtime.overlay import BASE, Overlay, chosen, transformer_part
from ltxpack.runtime.parallel import cluster
from ltxpack.runtime.parallel.actors import ActorWorker
from ltxpack.runtime.parallel.cluster import NOT_STARTED, SharedDisk
from ltxpack.runtime.parallel.contract import Opening, Start, Worker
from ltxpack.runtime.parallel.devices import RAY_HERE
from ltxpack.runtime.parallel.planned import OF_STAGES, plan_schemes
from ltxpack.runtime.parallel.process import ProcessWorker
from ltxpack.runtime.parallel.schemes import AUTO, DATA, NONE, STAGES
from ltxpack.runtime.parallel.share import Carried, Crew, Event, Gone, Left, Ready, Told
from ltxpack.runtime.prompts_file import PromptsLine
from ltxpack.runtime.request import Request
from ltxpack.runtime.settings import RESIDENT, SessionSettings
from ltxpack.runtime.weights.device import resolve_device
from ltxpack.runtime.weights.machine import this_machine
from ltxpack.runtime.weights.plan import FILE
from ltxpack.runtime.weights.sizes import model_sizes

LINE_WORKER = "ltxpack.runtime.parallel.line_worker"


class Elsewhere(Crew):
    """One worker for each of ``openings``. All end when this process ends, in whatever way.

    ``start`` starts one; ``ends`` come after all have ended. With ``patience`` the user is told after so many seconds
    that no worker could start yet. ``by_stages``: the first of two encodes prompts and makes first stages, the second
    makes the rest.
    """

    def __init__(
        self,
        openings: Sequence[Opening],
        start: Start,
        ends: contextlib.ExitStack | None = None,
        patience: float | None = None,
        by_stages: bool = False,
    ) -> None:
        self.names: list[str] = [opening.name for opening in openings]
        self.by_stages = by_stages
        self._openings, self._start, self._ends = openings, start, ends or contextlib.ExitStack()
        self._patience = self._left = patience
        self._said: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._workers: dict[int, Worker] = {}
        self._idle: set[int] = set()
        try:
            for opening in openings:
                self._open(opening)
        except BaseException:
            self.close()
            raise

    def begin(self, worker: int, task: Task, following: Request | None) -> None:
        self._idle.discard(worker)
        self._workers[worker].tell((task, following))

    def next(self) -> Event:
        while True:
            try:
                event = self._said.get(timeout=self._left)
            except queue.Empty:
                self._left = None
                if not any(worker.ready.is_set() for worker in self._workers.values()):
                    return Told(0, "warn", NOT_STARTED)
                continue
            if isinstance(event, Ready) and event.where:
                self.names[event.worker] = f"actor {event.worker} on {event.where}"
            if isinstance(event, Ready | Carried):
                self._idle.add(event.worker)
            elif isinstance(event, Gone):
                self._idle.discard(event.worker)
            return event

    def takes(self, worker: int, task: Task) -> bool:
        return not self.by_stages or isinstance(task, Make) == (worker == 1)

    def replace(self, worker: int) -> None:
        self._workers[worker].end(0.0)
        self._open(self._openings[worker])
        self._left = self._patience

    def close(self) -> list[str]:
        with self._ends:
            for number, worker in self._workers.items():
                worker.dismiss(idle=number in self._idle)
            for worker in self._workers.values():
                worker.end()
        said = [self._said.get() for _ in range(self._said.qsize())]
        peaks = {event.worker: event.peak for event in said if isinstance(event, Left)}
        silent = "did not answer at its end"
        return [f"{self.names[number]}: {peaks.get(number, silent)}" for number in sorted({*self._idle, *peaks})]

    def _open(self, opening: Opening) -> None:
        number = opening.number
        self._workers[number] = self._start(
            opening, self._said.put, lambda worker: self._said.put(Gone(number, str(worker.fault)))
        )


def processes(root: Path, settings: SessionSettings, devices: Sequence[str], by_stages: bool = False) -> Elsewhere:
    """A process on each of ``devices``. Raises DeviceError for a device that is not there."""
    for device in dict.fromkeys(devices):
        resolve_device(device, "--devices")
    threads = torch.get_num_threads()
    openings = [
        Opening(
            number,
            f"worker {number} on {device}",
            root,
            replace(settings, device=device, devices=None, parallel=AUTO),
            len(devices),
            OF_STAGES[number] if by_stages else frozenset[str](),
            threads,
        )
        for number, device in enumerate(devices)
    ]
    return Elsewhere(openings, partial(ProcessWorker, LINE_WORKER), by_stages=by_stages)


def actors(
    address: str, root: Path, settings: SessionSettings, lines: Sequence[PromptsLine], reporter: Reporter
) -> Elsewhere:
    """An actor for each GPU of the cluster at ``address``, or as many on CPUs as ``settings.devices`` says.

    No more than there are ``lines``. All machines see the overlay and the videos' folders under one path. Raises
    UsageError for what does not go with a cluster or without Ray, DeviceError for a cluster that cannot be reached or
    has no GPU, UnwrittenError for a folder of videos that cannot be written.
    """
    workers = _cpu_workers(settings)
    reporter.note("starting Ray on this machine" if address == RAY_HERE else f"connecting to Ray ({address})")
    with contextlib.ExitStack() as ends:
        ray = ends.enter_context(cluster.connected(address, workers))
        count = min(workers or cluster.gpus(ray), len(lines))
        marks = tuple(_mark(folder, ends) for folder in dict.fromkeys(line.output.parent for line in lines))
        start = partial(ActorWorker, ray, SharedDisk.of(root, marks), workers > 0, LINE_WORKER)
        own = replace(settings, device="cpu" if workers else "cuda", devices=None, parallel=AUTO)
        openings = [Opening(number, f"actor {number}", root, own, count) for number in range(count)]
        return Elsewhere(openings, start, ends.pop_all(), cluster.PATIENCE)


def _cpu_workers(settings: SessionSettings) -> int:
    """The number of workers on CPUs; 0 for one on each GPU. Raises UsageError for settings that Ray decides."""
    if settings.parallel not in (AUTO, DATA, NONE):
        problem = f"--parallel {settings.parallel} does not go with --ray: each actor makes whole videos"
        raise UsageError(problem, next=f"choose --parallel {DATA}")
    if settings.save_activations is not None:
        raise UsageError("--save-activations goes with one device", next="leave --ray out")
    return cluster.cpu_workers(settings.device, settings.devices)


def _mark(folder: Path, ends: contextlib.ExitStack) -> Path:
    """A file in ``folder``, until ``ends``, that proves who sees the folder. Raises UnwrittenError."""
    with output_errors(folder):
        mark = Temporary(folder / "ltxpack-ray")
    ends.callback(mark.discard)
    return mark.path


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
