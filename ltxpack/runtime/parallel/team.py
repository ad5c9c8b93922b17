"""Rank 0: starts a process for every other device, hands out the work, and ends the run when one of them ends.

A worker is told by its standard input, which nobody else can write to; when that is closed, because this process ended
in whatever way, the worker ends at once.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from ltxpack.runtime.numerics import Numerics
from ltxpack.runtime.parallel.exchange import Exchange, meeting_place, store_in
from ltxpack.runtime.parallel.ranks import Contexts, Member
from ltxpack.runtime.parallel.schemes import AUTO, Counted
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.weights.plan import Work

WORKER = "ltxpack.runtime.parallel.worker"
# What a worker writes when it is ready to join, and before it says why it ends.
READY, FAULT = "ltxpack-ready", "ltxpack-fault: "
# What a worker is told: that rank 0 joins now; and to decode its share of the video it made the latents of.
JOIN, DECODE = "join", "decode"
# Seconds: until what a worker said that ended is read; until a failed exchange is explained by such a one; until a run
# ends that waits for one; and what a worker gets to end by itself. A run whose rank dies is over within ten seconds.
HEARD, EXPLAINED, GIVEN_UP, LEFT = 2.0, 6.0, 7.0, 5.0


class Worker:
    """The process of one other rank, which runs ``module``, and what it said last.

    ``ended`` is called when it ended, ``received`` with each message that it writes; both from threads.
    """

    def __init__(
        self,
        rank: int,
        device: str,
        ended: Callable[[Worker], None],
        module: str = WORKER,
        received: Callable[[Any], None] | None = None,
    ) -> None:
        self.rank, self.device = rank, device
        self.ready = threading.Event()
        self._said = ""
        out = subprocess.DEVNULL if received is None else subprocess.PIPE
        command = [sys.executable, "-m", "ltxpack.imports", module]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.PIPE)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._receiving = threading.Thread(target=self._receive, args=(received,), daemon=True)
        self._thread = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        for thread in (self._listening, self._receiving, self._thread):
            thread.start()

    def tell(self, message: Any) -> None:
        """Hand it ``message``. That it is gone is noted elsewhere."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def dismiss(self, *, idle: bool = False) -> None:
        """Tell it to end: in order if it is ``idle``, else at once."""
        assert self.process.stdin is not None
        if idle and not self.process.stdin.closed:
            self.tell(None)
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def end(self, seconds: float) -> None:
        """It gets ``seconds`` to end by itself."""
        self.dismiss()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._thread.join()

    @property
    def fault(self) -> str:
        """Why it ended, in words."""
        code = self.process.wait()
        return self._said or (f"its process was ended by signal {-code}" if code < 0 else f"exit status {code}")

    def _watch(self, ended: Callable[[Worker], None]) -> None:
        self.process.wait()
        self._receiving.join()
        # Processes that it started, such as a compiler's, may hold this end of it for longer.
        self._listening.join(HEARD)
        ended(self)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                if text == READY:
                    self.ready.set()
                elif text.startswith(FAULT):
                    self._said = text.removeprefix(FAULT)

    def _receive(self, received: Callable[[Any], None] | None) -> None:
        if received is None:
            return
        assert self.process.stdout is not None
        with self.process.stdout as messages, contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                received(pickle.load(messages))


class Leader(Member, ABC):
    """Rank 0 of several, whoever started the others. ``devices``: those of this machine, rank 0's first; ``config``: of
    the transformers.
    """

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
            # The ways to share are measured, and what exchanges take of the card is gone from it, before it is planned.
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
        links = ""
        if self.rates.link < math.inf:
            near = all(torch.cuda.can_device_access_peer(*pair) for pair in permutations(self._devices, 2))
            near = near and len(self._devices) == self._size
            reach = "cards reach each other" if near else "cards reach each other through the host"
            links = f"; {reach}, {self.rates.link / 1e9:.1f} GB/s in an all-to-all"
        stages = ", ".join(f"{stage_label(number)} {split}" for number, split in enumerate(found.splits))
        noted = (
            f"parallel {found.scheme}: {stages}; expected: at most {found.gain:.2f} times as fast as one device{links}"
        )
        if noted != self._noted:
            self._reporter.note(noted)
        self._noted = noted


class Team(Leader):
    """Rank 0, and the processes of the others, which it starts.

    Workers start at once; they are waited for when there is something to make.
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
        """If the block fails, the others are ended; after that new ones start."""
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
        self._workers: list[Worker] = []
        self._place = meeting_place()
        for rank, name in enumerate(self._devices[1:], 1):
            worker = Worker(rank, name, self._ended)
            self._workers.append(worker)
            own = replace(self._settings, device=worker.device, devices=None, parallel=AUTO)
            ranks = worker.rank, self._size, self._parallel
            worker.tell((self._root, own, *ranks, self._place, torch.get_num_threads()))

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
        """End all workers; each that is idle gets ``seconds``, unless one is gone, which the others would wait for."""
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
        """Raises DeviceError where a worker has ended. ``failed``: an exchange says so, and its end is to be seen."""
        end = time.monotonic() + (EXPLAINED if failed else 0.0)
        while self._gone is None and time.monotonic() < end:
            time.sleep(0.02)
        if self._gone is not None:
            self._over.set()  # the main thread waits for nobody
            raise self._fault(self._gone)

    def _fault(self, worker: Worker) -> DeviceError:
        problem = f"rank {worker.rank} on {worker.device} ended: {worker.fault}"
        return DeviceError(problem, next="the same command without --devices")
