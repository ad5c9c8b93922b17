"""The keeper of an overlay's parts: loads them on demand or ahead, keeps or drops them, as the plan says.

It compares every file with the manifest while it reads it, and refuses a changed one before use.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ltxpack.errors import LtxpackError
from ltxpack.files.direct import DIRECT, DIRECT_KEPT
from ltxpack.files.reader import no_stop
from ltxpack.manifest import BAKES
from ltxpack.reporter import Reporter, SilentReporter
from ltxpack.runtime.codecs.tiles import FAST
from ltxpack.runtime.overlay import BASE, Overlay
from ltxpack.runtime.settings import AUTO, SWAP
from ltxpack.runtime.weights import plan as planner
from ltxpack.runtime.weights import report
from ltxpack.runtime.weights.copies import Copies
from ltxpack.runtime.weights.device import machine_of
from ltxpack.runtime.weights.load import Reader
from ltxpack.runtime.weights.placed import PlacedModule, PlacementReader, SpareMemory
from ltxpack.runtime.weights.plan import CARD, FILE, HOST, Placement, Plan, Work
from ltxpack.runtime.weights.reading import FileReader
from ltxpack.runtime.weights.sizes import BLOCKS, TEXT_ENCODER, TRANSFORMER, ModelSizes, model_sizes
from ltxpack.runtime.weights.slots import MemorySource

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")
Prepare = Callable[[Any, bool], None]
Stop = Callable[[], None]
WEIGHTS = ".safetensors"
# What the kernel reads at one call, whatever it is asked for: its usual read-ahead.
READ_AHEAD = 128 * 1024
# A part that no plan places: loaded whole when it is used, and dropped afterwards.
UNPLANNED = Placement(FILE)
# Device, inode, size and last change of a file; None if it is not there.
Stamp = tuple[int, int, int, int] | None
# Builds a part from its folder, such as ltxpack.runtime.model.load_dit.
Load = Callable[[Path, torch.device, torch.dtype, Reader], M]


class Residency:
    """The parts of ``overlay`` on ``device`` in ``dtype``, for one thread.

    ``mode``: one of ``settings.RESIDENCIES``. ``reads``: one of ``direct.READS``. ``warm_cache``: brings files into the
    page cache for the next process. :meth:`prepare` makes the plan; without one, a part is loaded when it is used
    and dropped afterwards. A caller that computes in another CUDA stream than before begins with nothing loaded.
    """

    def __init__(
        self,
        overlay: Overlay,
        device: torch.device,
        dtype: torch.dtype,
        mode: str = AUTO,
        reporter: Reporter | None = None,
        reads: str = AUTO,
        warm_cache: bool = False,
    ) -> None:
        self.overlay, self.device, self.dtype = overlay, device, dtype
        self.mode, self.reads, self.warm_cache = mode, reads, warm_cache
        self.reporter = reporter or SilentReporter()
        # The number of processes, on devices of their own, that share the host's free memory.
        self.processes = 1
        self.plan: Plan | None = None
        # The plan with the most host memory since the placements were made.
        self._largest: Plan | None = None
        self._sizes: dict[tuple[str, ...], ModelSizes] = {}
        self._warmer: CacheWarmer | None = None
        self._refusal_told = False
        # The two queues of copies beside the stream that computes: for files that are read, and for slots.
        self._queues: tuple[Copies, ...] = ()
        # Readers not in use, whose buffers stay pinned for the next load.
        self._idle: list[FileReader] = []
        self._spare = SpareMemory()
        self._kept: dict[str, PlacedModule[Any]] = {}
        self._ahead: dict[str, Background[PlacedModule[Any]]] = {}
        self._in_use: set[str] = set()
        # Transformers that stay for the next stage.
        self._carried: set[str] = set()
        # The stamps of a transformer's files when they were hashed, and pinned blocks of these that outlive it.
        self._held: dict[str, tuple[list[Stamp], dict[int, MemorySource]]] = {}

    def prepare(self, works: Sequence[Work]) -> Plan | None:
        """The plan for the largest of ``works``, told before anything is loaded. Raises DeviceError if nothing fits.

        Loaded parts stay, unless the card has too little memory or a larger video needs another plan.
        """
        if not works:
            return self.plan

        def size(work: Work) -> tuple[int, int, int]:
            return work.shape.tokens, work.images, sum(stage.evaluations for stage in work.stages)

        plan = self.plan_for(max(works, key=size))
        before = {} if self.plan is None else self.plan.placements
        more = plan.placements.keys() - before.keys()
        if self.plan is None or not before.items() <= plan.placements.items():
            self.close()
            self._begin(plan)
        elif more:
            self.reporter.note(f"{', '.join(sorted(more))}: stays loaded too, beside what is")
        if self._largest is None or plan.placements != before or plan.host > self._largest.host:
            self._largest = plan
        decoding = report.decoding(plan)
        if plan.work.decode == FAST and (self.plan is None or decoding != report.decoding(self.plan)):
            self.reporter.note(decoding)
        self.plan = plan
        return plan

    def use(self, part: str, load: Load[M], work: Callable[[M], R], prepare: Prepare | None = None) -> R:
        """``work(module)``, with the module of ``part`` (``vae``, ``bakes/NAME``) ready on the device.

        The caller gets no module, so no name of its keeps one alive. Calls ``prepare(module, streamed)`` before, once
        for a module that stays. Raises OverlayError for a file that changed.
        """
        self._make_queues()
        self._drop_carried(part)
        placed = self._take(part, load)
        self._in_use.add(part)
        try:
            return _used(placed, prepare, work)
        finally:
            self._in_use.discard(part)
            home = placed.placement.home
            stays = home == CARD or part in self._carried
            if stays or home == HOST:
                self._kept[part] = placed
            else:
                placed.drop()
            del placed
            if not stays:
                torch.cuda.empty_cache()

    def load_ahead(self, part: str, load: Load[M]) -> None:
        """Begin to load the transformer ``part`` while others compute, if the plan has room for it.

        A transformer in use stays for the next stage.
        """
        placement = self._placement(part)
        if part in self._in_use:
            self._carried.add(part)
            return
        # There is room at its home, or else in the one place for the next transformer.
        room = placement.home != FILE or (placement.ahead and not self._ahead)
        if room and part not in self._kept and part not in self._ahead:
            self._make_queues()
            self._ahead[part] = Background(lambda stop: self._load(part, load, stop, to_host=placement.ahead))

    def release(self) -> None:
        """Drop all parts, kept or being loaded."""
        for background in self._ahead.values():
            background.cancel()
        self._ahead.clear()
        for placed in self._kept.values():
            placed.drop()
        self._kept.clear()
        self._carried.clear()
        self._held.clear()
        self._spare.clear()
        torch.cuda.empty_cache()

    def close(self, *, process_ends: bool = False) -> None:
        """Free all memory; a later use loads anew. If ``process_ends``, the kernel frees pinned memory."""
        for copies in self._queues:
            copies.process_ends = process_ends
        self.release()
        for reader in self._idle:
            reader.close()
        self._idle.clear()
        if self._warmer is not None:
            self._warmer.close()
            self._warmer = None

    def advice(self) -> str:
        """The command to try after memory ran out."""
        return report.after_shortage(self.plan.mode if self.plan else SWAP, self.mode)

    def plan_for(self, work: Work) -> Plan:
        """The plan for ``work`` in the memory that is free. Raises DeviceError as :func:`.report.plan_or_refuse`."""
        machine = machine_of(self.device, used=self.plan is not None, processes=self.processes)
        if self._largest is not None:
            # Transformers may be loaded that only the videos of another recipe use.
            placed = [part.rpartition("/")[2] for part in self._largest.placements if part.startswith(f"{BAKES}/")]
            placed += [BASE] if TRANSFORMER in self._largest.placements else []
            same = planner.continued(self._largest, self._sizes_of(work, placed), work, machine)
            if same is not None:
                return same
        return report.plan_or_refuse(self._sizes_of(work), work, machine, self.mode, str(self.device))

    def _sizes_of(self, work: Work, others: Sequence[str] = ()) -> ModelSizes:
        """The sizes of the parts of ``work``, and of the transformers ``others``."""
        names = tuple(dict.fromkeys((*(stage.transformer for stage in work.stages), *others)))
        if names not in self._sizes:
            self._sizes[names] = model_sizes(self.overlay, names, str(self.dtype).removeprefix("torch."))
        return self._sizes[names]

    def _begin(self, plan: Plan) -> None:
        """Tell the new plan, and begin to warm the page cache if that is asked for."""
        machine = machine_of(self.device, processes=self.processes)
        if self.warm_cache:
            self._warmer = CacheWarmer(self._files(plan), planner.cacheable(plan, machine))
        for line in (*report.lines(plan, machine), report.reading(plan, self.reads, machine, warm=self.warm_cache)):
            self.reporter.note(line)
        for line in report.table(plan):
            self.reporter.detail(line)

    def _make_queues(self) -> None:
        """Make the queues of copies for the stream in which the caller computes; drop weights of another stream."""
        if self._queues and self._queues[0].elsewhere():
            self.close()
            self._queues = ()
        self._queues = self._queues or (Copies(self.device), Copies(self.device))

    def _take(self, part: str, load: Load[M]) -> PlacedModule[M]:
        """The part: kept, loaded ahead, or loaded now."""
        begin = time.perf_counter()
        if part in self._kept:
            return self._kept.pop(part)
        if part in self._ahead:
            placed: PlacedModule[M] = self._ahead.pop(part).result()
        else:
            placed = self._load(part, load, no_stop)
        seconds = time.perf_counter() - begin
        size = sum(record.size for record in self.overlay.records(part))
        self.reporter.detail(f"{part}: {size / 1e9:.2f} GB ready after {seconds:.2f} s")
        if placed.refused and not self._refusal_told:
            self._refusal_told = True
            self.reporter.note(f"{part}: files are read through the page cache: {placed.refused}")
        if placed.unpinned:
            self.reporter.warn(f"{part}: the system would not pin {placed.unpinned / 1e9:.1f} GB; copies are slower")
        return placed

    def _load(self, part: str, load: Load[M], stop: Stop, to_host: bool = False) -> PlacedModule[M]:
        """The module of ``part``, hashed as it is read. On any thread.

        With held blocks only the rest is read, which cannot be hashed: if the files are not the very same, all is read.
        """
        placement, records = self._placement(part), self.overlay.records(part)
        weights = [record for record in records if record.path.endswith(WEIGHTS)]
        self.overlay.check(record for record in records if record not in weights)
        digests = {self.overlay.root / record.path: record.blake3 for record in weights}
        stamps, (before, held) = list(map(_stamp, digests)), self._held.pop(part, ([], {}))
        if stamps != before:
            held = {}
        waiting = self._warmer.waiting() if self._warmer else contextlib.nullcontext()
        files, slots = self._queues
        with self._reader(files) as reader:
            read = PlacementReader(
                placement,
                BLOCKS.get(TRANSFORMER if part.startswith(f"{BAKES}/") else part, ""),
                {} if held else digests,
                reader,
                slots,
                to_host=to_host,
                hash_streamed=part == TEXT_ENCODER,
                stop=stop,
                held=held,
                spare=self._spare,
            )
            # As where the module is used: a compiler tells weights that are made otherwise apart.
            with waiting, torch.inference_mode(), slots.computing():
                module = load(self.overlay.folder(part), self.device, self.dtype, read)
        if placement.held:
            self._held[part] = stamps, read.held
        return PlacedModule(module, read)

    def _placement(self, part: str) -> Placement:
        return self.plan.placements.get(part, UNPLANNED) if self.plan else UNPLANNED

    def _drop_carried(self, part: str) -> None:
        """Drop transformers that stayed for the next stage, unless ``part`` is one of them or is used in between."""
        if part in self._carried or part == planner.BETWEEN_STAGES:
            self._carried.discard(part)
            return
        for other in self._carried & set(self._kept):
            if self._kept[other].placement.home == FILE:
                self._kept.pop(other).drop()
        self._carried.clear()

    @contextlib.contextmanager
    def _reader(self, copies: Copies) -> Iterator[FileReader]:
        """A reader for the block alone; for several threads."""
        try:
            reader = self._idle.pop()
        except IndexError:
            warmed = self.warm_cache and self.reads == DIRECT
            reader = FileReader(copies, reads=DIRECT_KEPT if warmed else self.reads)
        try:
            yield reader
        finally:
            self._idle.append(reader)

    def _files(self, plan: Plan) -> list[Path]:
        """The weights of a run, transformers first; those of the text encoder, which a known prompt needs not, last."""
        first = plan.work.transformer_parts
        parts = sorted(plan.placements, key=lambda part: (part == TEXT_ENCODER, part not in first))
        records = [record for part in parts for record in self.overlay.records(part)]
        return [self.overlay.root / record.path for record in records if record.path.endswith(WEIGHTS)]


def _used(placed: PlacedModule[M], prepare: Prepare | None, work: Callable[[M], R]) -> R:
    """``work`` in a frame of its own, after which no name holds the module."""
    with placed.in_use(prepare) as module:
        try:
            found = work(module)
        except LtxpackError:
            # The error may come from bytes that changed.
            placed.verify()
            raise
        placed.verify()
        return found


def _stamp(path: Path) -> Stamp:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime_ns


class Stopped(Exception):
    """Raised in a thread that was cancelled."""


class Background(Generic[R]):
    """``work(stop)`` on a thread for which the process does not wait; ``stop()`` raises when the work is to end."""

    def __init__(self, work: Callable[[Stop], R]) -> None:
        self._stopped = threading.Event()
        self._done: Future[R] = Future()
        self._thread = threading.Thread(target=self._run, args=(work,), name="ltxpack-ahead", daemon=True)
        self._thread.start()

    def result(self) -> R:
        """Wait for the result, or raise the error, of the work. For one call: afterwards nothing here refers to it."""
        self._thread.join()
        done, self._done = self._done, Future()
        try:
            return done.result()
        finally:
            del done  # this frame is in the error's traceback: they would keep each other, and what was loaded

    def cancel(self) -> None:
        """End the work, and wait for that."""
        self._stopped.set()
        self._thread.join()
        self._done = Future()

    def _run(self, work: Callable[[Stop], R]) -> None:
        try:
            self._done.set_result(work(self._check))
        except BaseException as error:
            self._done.set_exception(error)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise Stopped


class CacheWarmer:
    """Asks the system to read ``files`` into its page cache, in their order, at most ``room`` bytes.

    It waits for the first block of :meth:`waiting` to end, and pauses during others. It leaves out a file that cannot
    be read: whoever needs the file will say so.
    """

    def __init__(self, files: Iterable[Path], room: int) -> None:
        # Several links to one file count once.
        self._files, self._left = tuple(dict.fromkeys(path.resolve() for path in files)), room
        self._loads, self._lock, self._free = 0, threading.Lock(), threading.Event()
        self._background = Background(self._run)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that needs the disk for itself; for several threads."""
        with self._lock:
            self._loads += 1
            self._free.clear()
        try:
            yield
        finally:
            with self._lock:
                self._loads -= 1
                if self._loads == 0:
                    self._free.set()

    def close(self) -> None:
        """End the thread."""
        self._left = 0
        self._free.set()
        self._background.cancel()

    def _run(self, stop: Stop) -> None:
        for path in self._files:
            # A pipe in a file's place would wait for somebody to write.
            with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                for start in range(0, size, READ_AHEAD):
                    self._free.wait()
                    nbytes = min(READ_AHEAD, size - start)
                    if nbytes > self._left:
                        return
                    self._left -= nbytes
                    os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_WILLNEED)
