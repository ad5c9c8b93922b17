"""Rank 0: hands out the work to the other ranks, and ends the run when one of them ends.

It starts the others as processes, or torchrun has started all.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ltxpack.errors import DeviceError, UsageError
from ltxpack.reporter import Reporter
from ltxpack.runtime.codecs.tiles import Tiles, auto_tiling
from ltxpack.runtime.codecs.video import DecodeTiles, decode_tiles
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.parallel.contract import Opening, Worker
from ltxpack.runtime.parallel.devices import Launched
from ltxpack.runtime.parallel.exchange import Exchange, meeting_place, store_in
from ltxpack.runtime.parallel.process import LEFT, ProcessWorker
from ltxpack.runtime.parallel.ranks import Member, Numerics
from ltxpack.runtime.parallel.schemes import AUTO, Counted
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.text.prompt_cache import Contexts
from ltxpack.runtime.weights.plan import Work

WORKER = "ltxpack.runtime.parallel.worker"
# What a rank says when it can join, and what it is told: to join rank 0 now; to decode its share of the video that it
# made the latents of.
READY, JOIN, DECODE = "ready", "join", "decode"
# Seconds that a failed exchange waits for a rank that ended to explain it, and that a run waits for such a rank before
# it ends. With the seconds of process.HEARD, a run whose rank dies is over within ten.
EXPLAINED, GIVEN_UP = 6.0, 7.0


@dataclass(frozen=True)
class Joining:
    """What a rank begins with that is a process: ``place`` is the folder where all meet."""

    rank: Opening
    parallel: str
    place: Path


class Leader(Member, ABC):
    """Rank 0, whoever started the others. ``devices``: of this machine, its own first; ``config``: of transformers."""

    def __init__(
        self,
        settings: SessionSettings,
        devices: Sequence[str],
        size: int,
        device: torch.device,
        config: DiTConfig,
        reporter: Reporter,
    ) -> None:
        super().__init__(settings.parallel, size, config, getattr(torch, settings.dtype))
        self._devices, self._device, self._reporter = devices, device, reporter
        self._joined, self._noted = False, ""

    def share(self, work: Work) -> Work:
        """Raises DeviceError as :meth:`together`."""
        if self._device.type == "cuda":
            # Before the plan, the ways to share are measured, and exchanges have taken their part of the card.
            with self._at_work():
                pass
        return super().share(work)

    @contextlib.contextmanager
    def together(self, work: Work, numerics: Callable[[], Numerics], *arguments: Any) -> Iterator[None]:
        """Raises DeviceError where another rank has ended or cannot begin."""
        with self._at_work():
            self._note(self.choose(work))
            self._tell((numerics(), *arguments))
            yield
            self.exchange.finish()

    @contextlib.contextmanager
    def decoding(self, latents: Tensor) -> Iterator[DecodeTiles]:
        """Raises DeviceError as :meth:`together`. Where workers are new, or there is one tile, this rank decodes."""
        height, width = latents.shape[3:]
        if not self._joined or Tiles.of(latents.shape[2:], auto_tiling(height, width)).count == 1:
            yield decode_tiles
            return
        with self._at_work():
            self._tell(DECODE)
            self.exchange.broadcast(latents.contiguous(), 0)
            yield self.tiles
            self.exchange.finish()

    def contexts(self, make: Callable[[], Contexts]) -> Contexts:
        made = make()
        self._tell([context.map(lambda tensor: tensor.cpu()) for context in made])
        return made

    @abstractmethod
    def _tell(self, message: Any) -> None:
        """Hand ``message`` to every other rank."""

    @abstractmethod
    def _at_work(self) -> contextlib.AbstractContextManager[None]:
        """A block in which all ranks are at work."""

    def _note(self, found: Counted) -> None:
        """One line of what was chosen and what it gains, where it is not what the last line says."""
        stages = ", ".join(f"{stage_label(number)} {split}" for number, split in enumerate(found.splits))
        noted = f"parallel {found.scheme}: {stages}; expected: at most {found.gain:.2f} times as fast as one device"
        if self.rates.link < math.inf:
            near = all(torch.cuda.can_device_access_peer(*pair) for pair in permutations(self._devices, 2))
            through = "" if near and len(self._devices) == self._size else " through the host"
            noted += f"; cards reach each other{through}, {self.rates.link / 1e9:.1f} GB/s in an all-to-all"
        if noted != self._noted:
            self._reporter.note(noted)
        self._noted = noted


class Team(Leader):
    """Rank 0, which starts the others at once, and waits for them when there is something to make.

    Raises UsageError for a second team: a process can be in one group of ``torch.distributed`` at a time.
    """

    _only: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        root: Path,
        settings: SessionSettings,
        devices: Sequence[str],
        device: torch.device,
        config: DiTConfig,
        reporter: Reporter,
    ) -> None:
        super().__init__(settings, devices, len(devices), device, config, reporter)
        self._root, self._settings, self._working, self._closed = root, settings, False, False
        self._place: Path | None = None
        if not self._only.acquire(blocking=False):
            problem = "another pipeline of this process has several devices"
            raise UsageError(problem, next="close the other pipeline first")
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """If the block fails, ends the others; new ones start for the next block."""
        self._working = True
        try:
            self._begin()
            yield
        except BaseException:
            self._end(0.0)
            raise
        finally:
            self._working = False

    def _tell(self, message: Any) -> None:
        for worker in self._workers:
            worker.tell(message)

    def close(self) -> None:
        self._end(LEFT)
        if not self._closed:
            self._closed = True
            self._only.release()

    def _start(self) -> None:
        self._gone: Worker | None = None
        self._over = threading.Event()
        self._workers: list[ProcessWorker] = []
        self._place = meeting_place()
        for rank, device in enumerate(self._devices[1:], 1):
            own = replace(self._settings, device=device, devices=None, parallel=AUTO)
            name, threads = f"rank {rank} on {device}", torch.get_num_threads()
            opening = Opening(rank, name, self._root, own, self._size, threads=threads)
            joining = Joining(opening, self._parallel, self._place)
            self._workers.append(ProcessWorker(WORKER, joining, lambda message: None, self._ended))

    def _begin(self) -> None:
        """Have all workers ready and joined."""
        if not self._workers:
            self._start()
        if not self._joined:
            while not all(worker.ready.wait(0.05) for worker in self._workers):
                self._check()
            self._tell(JOIN)
            assert self._place is not None
            self.exchange = Exchange(store_in(self._place, self._size), 0, self._size, self._device, self._check)
            self._joined = True
            self.joined(self.exchange, self._device)
        self._check()

    def _end(self, seconds: float) -> None:
        """End all workers. An idle one gets ``seconds``, unless another is gone, for which it would wait."""
        workers, self._workers = self._workers, []
        self._over.set()
        for worker in workers:
            worker.dismiss(idle=seconds > 0 and self._gone is None and worker.ready.is_set())
        for worker in workers:
            worker.end(0.0 if self._gone else seconds)
        if self._joined:
            self.exchange.leave()
            self._joined = False
        self._remove_place()

    def _remove_place(self) -> None:
        if self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)

    def _ended(self, worker: Worker) -> None:
        """Called from the worker's thread. The main thread may wait for the worker in a library, for ever."""
        if worker not in self._workers or self._gone is not None:
            return
        self._gone = worker
        if self._joined:
            self.exchange.abandon()
        if not self._over.wait(GIVEN_UP) and self._working:
            self._reporter.end()
            self._reporter.warn(self._fault(worker).render())
            for other in self._workers:
                other.process.kill()
            self._remove_place()
            os._exit(1)

    def _check(self, failed: bool = False) -> None:
        """Raises DeviceError where a worker has ended. ``failed``: an exchange failed, so one is about to be seen."""
        end = time.monotonic() + (EXPLAINED if failed else 0.0)
        while self._gone is None and time.monotonic() < end:
            time.sleep(0.02)
        if self._gone is not None:
            self._over.set()  # the main thread waits for nobody
            raise self._fault(self._gone)

    def _fault(self, worker: Worker) -> DeviceError:
        problem = f"{worker.opening.rank.name} ended: {worker.fault}"
        return DeviceError(problem, next="the same command without --devices")


class TorchrunTeam(Leader):
    """Rank 0 of ranks that torchrun started and ends: it tells them by a broadcast.

    After a failure in the middle of a video the others wait in it for ever: it makes no more.
    """

    def __init__(
        self, launch: Launched, settings: SessionSettings, device: torch.device, config: DiTConfig, reporter: Reporter
    ) -> None:
        here = [f"{device.type}:{number}" for number in range(launch.here)]
        super().__init__(settings, here, launch.size, device, config, reporter)
        self._lost = False

    def close(self) -> None:
        if not self._lost:
            self._begin()
            self._tell(None)
            self.exchange.leave()
            self._lost = True

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Raises DeviceError after a failure."""
        if self._lost:
            problem = "the other ranks were lost with a video that failed"
            raise DeviceError(problem, next="run the same command again; it skips the videos that are done")
        try:
            self._begin()
            yield
        except BaseException:
            self._lost = True
            raise

    def _begin(self) -> None:
        """Join the others, which wait for that."""
        if not self._joined:
            self.joined(Exchange(None, 0, self._size, self._device, lambda failed: None), self._device)
            self._joined = True

    def _tell(self, message: Any) -> None:
        self.exchange.say(message)
