"""The parts of an overlay on the device, as a plan has them: loaded on demand or ahead, kept or dropped.

Every file is compared with the manifest as it is read: what changed is refused before it is used.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ltxpack.files.source_file import AUTO
from ltxpack.manifest import FileRecord
from ltxpack.reporter import Reporter, SilentReporter
from ltxpack.runtime.codecs.tiles import FAST
from ltxpack.runtime.overlay import BASE, Overlay
from ltxpack.runtime.weights import advice, report
from ltxpack.runtime.weights import plan as modes
from ltxpack.runtime.weights.background import Background, Stop
from ltxpack.runtime.weights.cache_filler import CacheFiller
from ltxpack.runtime.weights.copies import copies_to
from ltxpack.runtime.weights.device import machine_of
from ltxpack.runtime.weights.load import Reader
from ltxpack.runtime.weights.offload import CARD, FILE, MEMORY, Offloaded, Placement, PlacingReader, SpareMemory
from ltxpack.runtime.weights.plan import Plan, Setup, Work
from ltxpack.runtime.weights.reading import FileReader, no_stop
from ltxpack.runtime.weights.sizes import BLOCKS, TEXT_ENCODER, TRANSFORMER, Model, overlay_model
from ltxpack.runtime.weights.slots import MemorySource

M = TypeVar("M", bound=nn.Module)
M_co = TypeVar("M_co", bound=nn.Module, covariant=True)
R = TypeVar("R")
Settle = Callable[[Any, bool], None]
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
WEIGHTS = ".safetensors"
# Until a plan is made: one part at a time, each whole.
UNPLANNED = Setup(modes.SWAP)
# A file as it was: device, inode, size, and when anything of it last changed.
Stamp = tuple[int, int, int, int]
IN_STREAM = {modes.KEPT: MEMORY, modes.BLOCKS: MEMORY, modes.FILE: FILE}
TEXT_BLOCKS = {modes.LAYERS: MEMORY, modes.LAYERS_FROM_FILE: FILE}


class Load(Protocol[M_co]):
    """What builds a part from its folder, such as :func:`ltxpack.runtime.model.load_dit`."""

    def __call__(self, folder: Path, device: torch.device, dtype: torch.dtype, reader: Reader, /) -> M_co: ...


class Residency:
    """Lends the parts of ``overlay`` on ``device`` in ``dtype``. ``mode`` is ``auto`` or one of ``plan.MODES``;
    ``reads`` is one of ``source_file.READS``.

    :meth:`prepare` makes the plan; without one a part is loaded when it is borrowed and dropped afterwards. Borrowed
    parts are for the block they are lent to. Not for several threads.
    """

    def __init__(
        self,
        overlay: Overlay,
        device: torch.device,
        dtype: torch.dtype,
        mode: str = modes.AUTO,
        reporter: Reporter | None = None,
        reads: str = AUTO,
    ) -> None:
        self.overlay, self.device, self.dtype = overlay, device, dtype
        self.mode, self.reads = mode, reads
        self.reporter = reporter or SilentReporter()
        self.plan: Plan | None = None
        self.load_seconds = 0.0
        self._filler: CacheFiller | None = None
        self._refused = self._refusal_told = False
        self._models: dict[tuple[str, ...], Model] = {}
        # Readers that nobody uses: their buffers stay pinned for the next load.
        self._idle: list[FileReader] = []
        self._spare = SpareMemory()
        self._kept: dict[Path, Offloaded[Any]] = {}
        self._ahead: dict[Path, Background[Offloaded[Any]]] = {}
        self._lent: set[Path] = set()
        # Of a transformer that is dropped: its blocks in host memory, and its files as they were when they were hashed.
        self._held: dict[Path, dict[int, MemorySource]] = {}
        self._hashed: dict[Path, dict[Path, Stamp]] = {}
        self._told = ""

    def check(self, work: Work) -> None:
        """Raises DeviceError if ``work`` fits in no way, naming the GB needed and free and what to do instead."""
        self._plan_for(work)

    def prepare(self, works: Sequence[Work]) -> Plan | None:
        """The plan for the largest of ``works``, told before anything is loaded. Raises DeviceError if nothing fits.

        A plan stays while it is enough, so that what is loaded is not loaded again; without works there is none.
        """
        if not works:
            return self.plan
        largest = max(
            works, key=lambda work: (work.shape.tokens, work.images, sum(stage.evaluations for stage in work.stages))
        )
        plan = self._plan_for(largest)
        if self.plan is None or plan.setup != self.plan.setup:
            self.close()
            machine = machine_of(self.device)
            if self.reads == AUTO:
                self._filler = CacheFiller(self._files(plan.work), modes.cacheable(plan, machine))
            for line in (*report.lines(plan, machine), report.reading(plan, self.reads, machine)):
                self.reporter.note(line)
            for line in report.table(plan):
                self.reporter.detail(line)
        decoding = report.decoding(plan) if plan.work.decode == FAST else ""
        if decoding and decoding != self._told:
            self.reporter.note(decoding)
        self._told = decoding
        self.plan = plan
        return plan

    def borrow(
        self,
        folder: Path,
        records: tuple[FileRecord, ...],
        load: Load[M],
        work: Callable[[M], R],
        settle: Settle | None = None,
    ) -> R:
        """``work(part)``, with the part of ``folder`` ready on the device.

        Work is handed in, and not the part out, so that no name in the caller keeps it alive. ``settle(part,
        streamed)`` is called before, once for a part that stays. Raises OverlayError for a file that changed.
        """
        part = self._take(folder, records, load)
        self._lent.add(folder)
        try:
            return _lend(part, settle, work)
        finally:
            self._lent.discard(folder)
            stays = part.placement.keep and part.placement.rest == CARD
            if part.placement.keep:
                self._kept[folder] = part
            else:
                if part.held:
                    self._held[folder] = part.held
                part.drop()
            del part
            if not stays:
                self._give_back()

    def prefetch(self, folder: Path, records: tuple[FileRecord, ...], load: Load[M]) -> None:
        """Begin to load the transformer of ``folder`` beside whatever is computed, if the plan has room for it."""
        here = folder in self._kept or folder in self._ahead or folder in self._lent
        if here or not self._room_ahead():
            return
        placement = self._placement(folder, ahead=True)
        self._ahead[folder] = Background(lambda stop: self._load(folder, records, load, placement, stop))

    def release(self) -> None:
        """Drop everything that is kept or on its way."""
        for background in self._ahead.values():
            background.cancel()
        self._ahead.clear()
        for part in self._kept.values():
            part.drop()
        self._kept.clear()
        self._held.clear()
        self._hashed.clear()
        self._spare.clear()
        self._give_back()

    def close(self) -> None:
        """Give back all memory; a later use loads anew."""
        self.release()
        for reader in self._idle:
            reader.close()
        self._idle.clear()
        if self._filler is not None:
            self._filler.close()
            self._filler = None

    def advice(self) -> str:
        """The command to try after memory ran out."""
        return advice.after_shortage(self.plan.setup if self.plan else UNPLANNED, self.mode)

    def _plan_for(self, work: Work) -> Plan:
        model, machine = self._sizes(work), machine_of(self.device, used=self.plan is not None)
        if self.plan is not None:
            same = modes.fitting_plan(model, work, machine, self.plan.setup)
            if same is not None:
                return same
        return advice.plan_or_refuse(model, work, machine, self.mode, str(self.device))

    def _sizes(self, work: Work) -> Model:
        names = work.transformers
        if names not in self._models:
            self._models[names] = overlay_model(self.overlay, names, DTYPE_NAMES[self.dtype])
        return self._models[names]

    def _take(self, folder: Path, records: tuple[FileRecord, ...], load: Load[M]) -> Offloaded[M]:
        """The part from where it is kept, from what was loaded ahead, or loaded now."""
        begin = time.perf_counter()
        if folder in self._kept:
            return self._kept.pop(folder)
        if folder in self._ahead:
            part: Offloaded[M] = self._ahead.pop(folder).result()
        else:
            part = self._load(folder, records, load, self._placement(folder), no_stop)
        seconds = time.perf_counter() - begin
        self.load_seconds += seconds
        size = sum(record.size for record in records)
        name = folder.relative_to(self.overlay.root)
        self.reporter.detail(f"{name}: {size / 1e9:.2f} GB ready after {seconds:.2f} s")
        if self._refused and not self._refusal_told:
            self._refusal_told = True
            self.reporter.note(f"{name}: this filesystem reads nothing past the page cache; read through it")
        if part.unpinned:
            self.reporter.warn(f"{name}: the system would not pin {part.unpinned / 1e9:.1f} GB; copies are slower")
        return part

    def _load(
        self,
        folder: Path,
        records: tuple[FileRecord, ...],
        load: Load[M],
        placement: Placement,
        stop: Stop,
    ) -> Offloaded[M]:
        """The part of ``folder``, hashed as it is read.

        With blocks in host memory only the rest is read, which cannot be hashed: the files must be the very ones that
        were, or all of it is read anew.
        """
        weights = [record for record in records if record.path.endswith(WEIGHTS)]
        self.overlay.check(record for record in records if record not in weights)
        digests = {self.overlay.root / record.path: record.blake3 for record in weights}
        held, stamps = self._held.pop(folder, {}), _stamps(digests)
        if stamps != self._hashed.pop(folder, None):
            held = {}
        alone = self._filler.waiting() if self._filler else contextlib.nullcontext()
        with self._reader() as reader:
            copies, known = copies_to(self.device), {} if held else digests
            read = PlacingReader(placement, known, reader, copies, stop, held, self._spare)
            # On any thread, as where it is used: to a compiler weights made otherwise are another kind of weights.
            with alone, torch.inference_mode():
                part = Offloaded(load(folder, self.device, self.dtype, read), read)
            self._refused |= reader.refused
        if placement.held:
            self._hashed[folder] = stamps
        return part

    def _placement(self, folder: Path, ahead: bool = False) -> Placement:
        """Where the part of ``folder`` goes by the plan."""
        setup = self.plan.setup if self.plan else UNPLANNED
        if folder == self.overlay.folder(TEXT_ENCODER):
            return replace(self._of_text(setup), together=True)
        if self._is_transformer(folder):
            return replace(self._of_transformer(setup, folder, ahead), together=True)
        return Placement(keep=setup.keep_parts)

    def _of_transformer(self, setup: Setup, folder: Path, ahead: bool) -> Placement:
        if setup.mode == modes.STREAM:
            return self._of_stream(setup, folder)
        if setup.mode == modes.RESIDENT:
            return Placement(keep=True)
        if setup.weights == modes.KEPT:
            return Placement(rest=MEMORY, keep=True)
        return Placement(rest=MEMORY if ahead else CARD)

    def _of_text(self, setup: Setup) -> Placement:
        if setup.text == modes.WHOLE:
            return Placement()
        assert self.plan is not None
        count = len(self._sizes(self.plan.work).parts[TEXT_ENCODER].blocks)
        return Placement(CARD, TEXT_BLOCKS[setup.text], BLOCKS[TEXT_ENCODER], frozenset(range(count)))

    def _of_stream(self, setup: Setup, folder: Path) -> Placement:
        assert self.plan is not None
        name = next(name for name in self.plan.blocks if self.overlay.transformer_folder(name) == folder)
        total, streamed, held = self.plan.blocks[name], setup.streamed[name], setup.held.get(name, 0)
        kept = setup.weights == modes.KEPT
        return Placement(
            rest=MEMORY if kept else CARD,
            blocks=IN_STREAM[setup.weights],
            root=BLOCKS[TRANSFORMER],
            streamed=spread(streamed, total),
            held=held_of(spread(streamed, total), held, total),
            keep=kept,
        )

    @contextlib.contextmanager
    def _reader(self) -> Iterator[FileReader]:
        """One for the block alone; from several threads."""
        try:
            reader = self._idle.pop()
        except IndexError:
            reader = FileReader(copies_to(self.device), reads=self.reads)
        try:
            yield reader
        finally:
            self._idle.append(reader)

    def _files(self, work: Work) -> list[Path]:
        """The weights of a run; last those of the text encoder, which a known prompt does not need."""
        names = sorted(self._sizes(work).parts, key=lambda name: name == TEXT_ENCODER)
        records = [record for name in work.transformers for record in self.overlay.transformer_records(name)]
        records += [record for name in names for record in self.overlay.records(name)]
        return [self.overlay.root / record.path for record in records if record.path.endswith(WEIGHTS)]

    def _room_ahead(self) -> bool:
        """Whether a transformer may be loaded before its stage: to where it stays, or to the one place for the next."""
        setup = self.plan.setup if self.plan else UNPLANNED
        if setup.mode == modes.RESIDENT or setup.weights == modes.KEPT:
            return True
        return setup.weights == modes.STAGED and not self._ahead

    def _is_transformer(self, folder: Path) -> bool:
        return folder in {self.overlay.transformer_folder(name) for name in (BASE, *self.overlay.manifest.bakes)}

    def _give_back(self) -> None:
        """Hand back memory of the card that only waits to be used again."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _lend(part: Offloaded[M], settle: Settle | None, work: Callable[[M], R]) -> R:
    """In a frame of its own: once it is left, no name holds the module."""
    with part.on_card(settle) as module:
        return work(module)


def held_of(streamed: frozenset[int], count: int, total: int) -> frozenset[int]:
    """The numbers of ``count`` blocks: streamed ones first, evenly, so that one read from its file comes while others
    compute.
    """
    first, others = sorted(streamed), sorted(set(range(total)) - streamed)
    chosen = {first[i] for i in spread(min(count, len(first)), len(first))}
    return frozenset(chosen | set(others[: max(0, count - len(first))]))


def _stamps(files: Iterable[Path]) -> dict[Path, Stamp]:
    """The files as they are now; one that is not there has none."""
    found = {}
    for path in files:
        with contextlib.suppress(OSError):
            stat = path.stat()
            found[path] = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime_ns)
    return found


def spread(count: int, total: int) -> frozenset[int]:
    """``count`` of ``total`` blocks, as evenly as can be: while one that stays computes, a streamed one comes."""
    return frozenset(i for i in range(total) if (i + 1) * count // total > i * count // total)
