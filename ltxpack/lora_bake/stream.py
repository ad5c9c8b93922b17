"""Makes the shards of several bakes from one read of a base shard, one row range after the other.

Reading and writing run on threads of files.reader and repack.write; the arithmetic of a row range on a few threads of
our own. No sum depends on the number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import torch
from blake3 import blake3
from torch import Tensor

from ltxpack.errors import AdapterError, quoted
from ltxpack.files.direct import DirectReader
from ltxpack.files.reader import Range, RangeReader
from ltxpack.files.tensorfile import DTYPE_NAMES, FLOATS, TensorInfo
from ltxpack.lora_bake.adapter import Adapter
from ltxpack.lora_bake.coverage import TargetStat
from ltxpack.lora_bake.fuse import WHOLE, Fused, Term, Workspace, fuse_rows, precision_of, row_chunks, row_parts
from ltxpack.lora_bake.methods import term_of
from ltxpack.lora_bake.plan import Arithmetic, BaseShard, FusedTensor
from ltxpack.lora_bake.quantise import Encoded, encode
from ltxpack.ltx23.lora_keys import SCALE
from ltxpack.manifest import BF16, FP8, FileRecord, changed_file
from ltxpack.repack.items import ShardEntry
from ltxpack.repack.write import TensorWriter, passage
from ltxpack.reporter import Reporter

COPY_BYTES = 8 * 1024 * 1024
SMALL_BYTES = 1024 * 1024
# The most row chunks per read, by kernel, and the most bytes they should have, which are in memory at once. Chunks of
# two reads are under way together.
CHUNKS_PER_READ = {"fp32": 4, "fp32-bf16": 4, "addmm": 2, "official": 1, "official-fp32": 1}
READ_BYTES = 8 * 1024 * 1024
MOST_WORKERS = 4
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, DTYPE_NAMES[code]) for code in (*FLOATS, "F64")}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass(eq=False)
class ShardOutput:
    """One bake's version of a shard, made of ``entries``, and its measurements (tensor name -> stat).

    ``strengths`` gives the strengths for a tensor: one for each of the engine's adapters, in order of application.
    """

    path: str
    entries: Sequence[ShardEntry]
    strengths: Callable[[str], Sequence[float]]
    writer: TensorWriter
    stats: defaultdict[str, TargetStat] = field(default_factory=lambda: defaultdict(TargetStat))

    @functools.cached_property
    def touched(self) -> dict[str, FusedTensor]:
        """Tensor name -> the producer, for tensors that are fused or quantised."""
        producers = ((entry.tensors[0].name, entry.producer) for entry in self.entries)
        return {name: producer for name, producer in producers if isinstance(producer, FusedTensor)}


class _Read(NamedTuple):
    """One read: ``lead`` bytes to copy, then the rows ``chunks`` of a tensor; without a tensor, copy all.

    Biases are between the weights; a separate read for each would slow the reading ahead. A tensor that is fused whole
    comes in several reads, of which the last has the chunk.
    """

    range: Range
    info: TensorInfo | None = None
    chunks: tuple[tuple[int, int], ...] = ()
    lead: int = 0


class FactorReader:
    """Reads the factors of one adapter on demand, until it is closed."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._file = DirectReader(adapter.path)
        self.close = self._file.close

    def refuse_changed(self) -> None:
        """Raises AdapterError if the file has changed since its header was read: its hash was taken after that."""
        if self._file.stamp != self.adapter.stamp:
            advice = "copy it to a place where nothing writes it, then run the same command with the copy"
            raise AdapterError("has changed while it was baked", file=self.adapter.path, next=advice)

    def term(self, weight: str, work: Workspace | None = None, device: str = "cpu") -> Term | None:
        """The adapter's term for ``weight``, with the stored tensors; None if it has none. Raises FormatError.

        If ``work`` is given and ``device`` is the CPU, the tensors are in ``work`` and valid until its next use.
        """
        target, memory = self.adapter.targets.get(weight), work or Workspace()
        if target is None:
            return None

        def load(role: str) -> Tensor:
            info = target.tensors[role]
            stored = memory.empty(role, (info.nbytes,), torch.uint8)
            self._file.scatter([stored.numpy().data], info.start)
            return stored.view(DTYPES[info.dtype]).reshape(info.shape).to(device)

        tensors = {role: load(role) for role in target.tensors}
        for role in [role for role in tensors if role.endswith(SCALE)]:
            scaled, scale = tensors[role.removesuffix(SCALE)], tensors.pop(role).float()
            shape = (-1, *[1] * (scaled.dim() - 1)) if scale.numel() > 1 else ()
            tensors[role.removesuffix(SCALE)] = scaled.float() * scale.reshape(shape)
        return term_of(target, tensors)


class Engine:
    """Fuses shards with one arithmetic. A context manager: while it is open, torch's settings are its own.

    Without ``measure`` the outputs' stats are zeros.
    """

    def __init__(
        self, adapters: Sequence[Adapter], arithmetic: Arithmetic, reporter: Reporter, *, measure: bool = True
    ) -> None:
        self.readers = [FactorReader(adapter) for adapter in adapters]
        self.arithmetic = arithmetic
        self.reporter = reporter
        self.measure = measure
        # The official rule multiplies whole weights on all of torch's threads; the others do rows on one thread each.
        self.whole = arithmetic.kernel in WHOLE
        self._gathered = frozenset(
            name for adapter in adapters for name, target in adapter.targets.items() if target.needs_whole
        )
        self.chunks = CHUNKS_PER_READ[arithmetic.kernel]
        workers = 2 if self.whole else min(MOST_WORKERS, usable_cores())
        # The memory of each thread for sums.
        self.own = threading.local()
        self.pool = ThreadPoolExecutor(workers, "ltxpack-fuse", lambda: setattr(self.own, "sums", Workspace()))
        # Threads make the results of the next read while those of one are written.
        self.results = [[Workspace() for _ in range(self.chunks)] for _ in range(2)]
        # Threads make the sums of the next weight while the codes of one are written.
        self.sums = [Workspace(), Workspace()]
        self._settings = contextlib.ExitStack()

    def is_gathered(self, name: str) -> bool:
        """Whether the weight ``name`` is fused in one piece: under the official rule, or for a method that needs it."""
        return self.whole or name in self._gathered

    def __enter__(self) -> Self:
        if not self.whole:
            self._settings.enter_context(_exact_sums(self.arithmetic.device))
        self._settings.enter_context(precision_of(self.arithmetic.kernel))
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        for reader in self.readers:
            reader.close()
        self._settings.close()

    def fuse_shard(self, shard: BaseShard, outputs: Sequence[ShardOutput]) -> list[FileRecord]:
        """Write every output's version of ``shard``; returns their records and fills in their stats.

        Raises OverlayError if the base differs from the manifest, AdapterError for a LoRA that has changed, or listing
        the weights that overflow.
        """
        steps = list(self._steps(shard, frozenset().union(*(output.touched for output in outputs))))
        hasher = blake3()
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(RangeReader([step.range for step in steps], in_flight=2, kept=1))
            names = dict.fromkeys(step.info.name for step in steps if step.info and step.chunks)
            terms = self._terms_ahead({name: self._used(name, outputs) for name in names})
            fusing = _Fusing(self, outputs, terms, stack.enter_context(ThreadPoolExecutor(1, "ltxpack-out")))
            hashed = self.pool.submit(hasher.update, b"")
            for step, data in zip(steps, reader, strict=True):
                hashed.result()
                hashed = self.pool.submit(hasher.update, data)
                if step.info is not None:
                    fusing.fuse(step, step.info, data)
                elif step.range.start:
                    fusing.copy(data)
                # The next read overwrites the bytes of the one before this.
                fusing.settle(left=fusing.newest)
            hashed.result()
            fusing.settle()
            for factors in self.readers:
                factors.refuse_changed()
            _refuse_overflow(fusing.overflow, shard, self.readers)
            path = shard.file.path
            if hasher.hexdigest() != shard.record.blake3:
                raise changed_file(path, f"blake3 {shard.record.blake3}", f"blake3 {hasher.hexdigest()}")
            records = [output.writer.close() for output in outputs]
            for output in outputs:
                self.reporter.detail(f"{output.path}: {passage(reader, output.writer)}")
            return records

    def _steps(self, shard: BaseShard, touched: frozenset[str]) -> Iterator[_Read]:
        """Reads of all bytes of the shard in order; the first is the header, which is hashed but not copied."""
        path = shard.file.path
        tensors = [info for info in shard.file.tensors.values() if info.nbytes]
        copied = tensors[0].start if tensors else shard.file.size
        yield _Read(Range(path, 0, copied))
        for info in tensors:
            if info.name not in touched:
                continue
            if info.start - copied > SMALL_BYTES:
                yield from _copies(path, copied, info.start)
                copied = info.start
            for first, last, group in self._reads(info):
                yield _Read(Range(path, copied, last - copied), info, group, first - copied)
                copied = last
        yield from _copies(path, copied, shard.file.size)

    def _reads(self, info: TensorInfo) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
        """The reads of a fused tensor: first byte, end, and the row chunks that this read completes."""
        gathered = self.is_gathered(info.name)
        kernel = "official" if gathered else self.arithmetic.kernel
        chunks = tuple(row_chunks(info.shape, kernel, len(self.readers)))
        end = info.start + info.nbytes
        if gathered:
            for first in range(info.start, end, COPY_BYTES):
                last = min(first + COPY_BYTES, end)
                yield first, last, chunks if last == end else ()
            return
        row = info.nbytes // info.shape[0]
        # At least two, so that two threads have work.
        together = max(min(2, self.chunks), min(self.chunks, READ_BYTES // (chunks[0][1] * row)))
        for i in range(0, len(chunks), together):
            group = chunks[i : i + together]
            yield info.start + group[0][0] * row, info.start + group[-1][1] * row, group

    def _used(self, name: str, outputs: Sequence[ShardOutput]) -> list[bool]:
        """For each adapter whether its term for the weight is needed: at a strength of 0 only by the official rule."""
        rows = [output.strengths(name) for output in outputs if name in output.touched]
        return [self.whole or any(strengths) for strengths in zip(*rows, strict=True)]

    def _terms_ahead(self, used: Mapping[str, Sequence[bool]]) -> Iterator[list[Term | None]]:
        """Every used adapter's term for each weight in order; loads those of the next weight meanwhile."""
        # Three sets of workspaces take turns: one behind unfinished sums, one in use, one being filled.
        works = itertools.cycle([[Workspace() for _ in self.readers] for _ in range(3)])
        ahead: deque[Future[list[Term | None]]] = deque()
        for name, needed in used.items():
            ahead.append(self.pool.submit(self._load, name, needed, next(works)))
            if len(ahead) == 2:
                yield ahead.popleft().result()
        for last in ahead:
            yield last.result()

    def _load(self, name: str, used: Sequence[bool], works: Sequence[Workspace]) -> list[Term | None]:
        """Every used adapter's term for a weight, ready for the kernel, each in its own workspace."""
        device, kernel = self.arithmetic.device, self.arithmetic.kernel
        own = zip(self.readers, used, works, strict=True)
        terms = [(reader.term(name, work, device) if needed else None, work) for reader, needed, work in own]
        return [term and term.prepared(kernel, work, self.measure) for term, work in terms]


@dataclass
class _Weight:
    """A weight under way: its terms, memory for sums that become codes, and the results of its row chunks."""

    info: TensorInfo
    terms: Sequence[Term | None]
    memory: Workspace
    made: list[Future[list[Fused]]] = field(default_factory=list)

    def rows(self, first: int, last: int) -> list[Term]:
        """The terms for these rows, without None."""
        return [term.rows(first, last) for term in self.terms if term is not None]

    def strengths(self, output: ShardOutput) -> list[float]:
        """The strengths of the terms that :meth:`rows` returns."""
        pairs = zip(output.strengths(self.info.name), self.terms, strict=True)
        return [strength for strength, term in pairs if term is not None]


class _Fusing:
    """One shard under way: the engine's threads make sums, another writes results in order, one read behind.

    ``terms``: the terms of each fused weight, in order. ``newest``: the number of writes of the newest read.
    """

    def __init__(
        self,
        engine: Engine,
        outputs: Sequence[ShardOutput],
        terms: Iterator[list[Term | None]],
        thread: ThreadPoolExecutor,
    ) -> None:
        self.overflow: dict[str, None] = {}
        self.newest = 0
        self._engine, self._outputs, self._ahead, self._thread = engine, outputs, terms, thread
        self._weight: _Weight | None = None
        self._under_way: deque[Future[None]] = deque()
        self._turn = 0
        self._memories = itertools.cycle(engine.sums)
        self._whole = Workspace()
        self._filled = 0

    def settle(self, left: int = 0) -> None:
        """Wait until at most ``left`` queued writes remain. Raises the error of a write."""
        while len(self._under_way) > left:
            self._under_way.popleft().result()

    def copy(self, data: memoryview) -> None:
        self.newest = 0
        self._later(self._write, self._outputs, data)

    def fuse(self, step: _Read, info: TensorInfo, data: memoryview) -> None:
        """Fuse the rows of ``step`` for the outputs that touch the tensor, copy them for the others."""
        self.newest = 0
        touching = [output for output in self._outputs if info.name in output.touched]
        others = [output for output in self._outputs if output not in touching]
        lead, rows = data[: step.lead], data[step.lead :]
        self._later(self._write, self._outputs, lead)
        self._later(self._write, others, rows)
        if not self._engine.is_gathered(info.name):
            weight, self._turn = self._current(info), 1 - self._turn
            made = self._rows(step, weight, rows, touching)
            weight.made += made
            self._later(self._write_fused, info, touching, made)
            if step.chunks[-1][1] == info.shape[0]:
                self._encode(weight, touching)
            return
        gathered = self._gather(info, rows)
        if not step.chunks:
            return
        weight = self._current(info)
        exact = _as_tensor(gathered, info) if self._engine.whole and self._engine.measure else None
        # Weights are large, so only one bake's result waits for the writer at a time.
        for output in touching:
            self.settle()
            weight.made = self._rows(step, weight, gathered, [output])
            wait(weight.made)
            self._later(self._write_fused, info, [output], weight.made)
            self._encode(weight, [output], exact)
            if exact is not None:
                self.settle()

    def _current(self, info: TensorInfo) -> _Weight:
        if self._weight is None or self._weight.info is not info:
            self._weight = _Weight(info, next(self._ahead), next(self._memories))
        return self._weight

    def _gather(self, info: TensorInfo, data: memoryview) -> memoryview:
        """Append ``data`` to the tensor's memory; returns all of it."""
        memory = self._whole.empty("weight", (info.nbytes,), torch.uint8).numpy().data
        memory[self._filled : self._filled + len(data)] = data
        self._filled = (self._filled + len(data)) % info.nbytes
        return memory

    def _rows(
        self, step: _Read, weight: _Weight, data: memoryview, batch: Sequence[ShardOutput]
    ) -> list[Future[list[Fused]]]:
        """Futures of the results of each row chunk, for each output of ``batch``."""
        engine, stored = self._engine, _as_tensor(data, weight.info)
        strengths = [weight.strengths(output) for output in batch]
        start, results, kernel = step.chunks[0][0], engine.results[self._turn], engine.arithmetic.kernel
        sums = [self._sum(output, weight) for output in batch]

        def rows(slot: int) -> list[Fused]:
            first, last = step.chunks[slot]
            part, terms = stored[first - start : last - start].to(engine.arithmetic.device), weight.rows(first, last)
            into = [None if memory is None else memory[first:last] for memory in sums]
            return fuse_rows(part, terms, strengths, kernel, engine.own.sums, results[slot], into, engine.measure)

        return [engine.pool.submit(rows, slot) for slot in range(len(step.chunks))]

    def _sum(self, output: ShardOutput, weight: _Weight) -> Tensor | None:
        """The memory for the sum of a weight that ``output`` stores in codes; None for other weights."""
        if output.touched[weight.info.name].form == BF16:
            return None
        use, device = f"sum {self._outputs.index(output)}", self._engine.arithmetic.device
        return weight.memory.empty(use, weight.info.shape, torch.float32, device)

    def _encode(self, weight: _Weight, batch: Sequence[ShardOutput], whole: Tensor | None = None) -> None:
        """Queue the sums of a weight, made for ``batch``, to become codes and be written.

        Nothing waits for the sums here, so that the threads go on with the next weight. ``whole``: the stored weight,
        if its sums are not those of the fp32 rule, to measure the difference.
        """
        for i, output in enumerate(batch):
            memory = self._sum(output, weight)
            if memory is not None:
                self._later(self._write_codes, weight, output, memory, i, weight.made, whole)

    def _write_fused(self, info: TensorInfo, batch: Sequence[ShardOutput], made: Sequence[Future[list[Fused]]]) -> None:
        for chunk in made:
            for output, fused in zip(batch, chunk.result(), strict=True):
                if output.touched[info.name].form == BF16:
                    self._write([output], _bytes_of(fused.weight))
                output.stats[info.name] = output.stats[info.name].plus(fused.stat)
                if not fused.finite:
                    self.overflow[info.name] = None

    def _write_codes(
        self,
        weight: _Weight,
        output: ShardOutput,
        memory: Tensor,
        i: int,
        made: Sequence[Future[list[Fused]]],
        whole: Tensor | None,
    ) -> None:
        """The codes of a weight, whose sum is in ``memory``, then its scales. ``i``: which of ``made`` are its sums."""
        engine, name, scales = self._engine, weight.info.name, []
        producer, largest = output.touched[name], max(chunk.result()[i].largest for chunk in made)

        def encoded(first: int, last: int) -> Encoded:
            work, rows, beside = engine.own.sums, memory[first:last], None
            if whole is not None:
                exact = work.empty("exact", rows.shape, torch.float32, rows.device)
                part, terms = whole[first:last].to(rows.device), weight.rows(first, last)
                fuse_rows(part, terms, [weight.strengths(output)], "fp32", work, into=[exact])
                beside = torch.sub(rows, exact, out=exact)
            return encode(producer.form, rows, largest, work, beside, engine.measure)

        for job in [engine.pool.submit(encoded, *span) for span in row_parts(weight.info.shape)]:
            part = job.result()
            self._write([output], _bytes_of(part.codes))
            output.stats[name] = output.stats[name].plus(part.stat)
            scales.append(part.scales)
        own = [*scales[:1], torch.tensor(producer.input_scale)] if producer.form == FP8 else scales
        for scale in own:
            self._write([output], _bytes_of(scale))

    def _write(self, outputs: Iterable[ShardOutput], data: memoryview | bytes) -> None:
        for output in outputs:
            output.writer.write(data)
            self._engine.reporter.advance(len(data))

    def _later(self, write: Callable[..., None], *arguments: object) -> None:
        self.newest += 1
        self._under_way.append(self._thread.submit(write, *arguments))


@contextlib.contextmanager
def _exact_sums(device: str) -> Iterator[None]:
    """Run torch on the calling thread alone: its own threads spin while they wait, for long on busy cores.

    On a card it also makes full fp32 and bf16 matmuls, whatever shortcuts PyTorch is set to take.
    """
    matmul = torch.backends.cuda.matmul
    threads, before = torch.get_num_threads(), None
    torch.set_num_threads(1)
    if device == "cuda":
        before = (matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction)
        matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if before is not None:
            matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before


def _as_tensor(data: memoryview, info: TensorInfo) -> Tensor:
    """``data``, whole rows of the tensor ``info``, as a tensor."""
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(-1, *info.shape[1:])


def _bytes_of(tensor: Tensor) -> memoryview:
    found: memoryview = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return found


def _copies(path: Path, start: int, end: int) -> Iterator[_Read]:
    for first in range(start, end, COPY_BYTES):
        yield _Read(Range(path, first, min(COPY_BYTES, end - first)))


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _refuse_overflow(names: Collection[str], shard: BaseShard, readers: Sequence[FactorReader]) -> None:
    if names:
        beyond = ", ".join(sorted({shard.file.tensors[name].dtype for name in names}))
        cause = "the strength is too high, or the LoRA or the base is damaged"
        problem = f"the result is beyond {beyond} in {len(names)} weights: {cause}"
        lora = quoted(readers[0].adapter.path) if len(readers) == 1 else "FILE"
        again = f"ltxpack inspect {lora} (says what a LoRA holds)"
        raise AdapterError(problem, file=shard.record.path, items=list(names), next=again)
