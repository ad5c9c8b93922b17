"""Writes an exported file: reads each file of the overlay once, in order, and puts its tensors in their places.

An unfinished file is in a folder beside the output, with a journal of its complete units, from which the same command
goes on. The header comes last, so that no program takes the unfinished file. All bytes are read back before the file
gets its name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

from blake3 import blake3

from ltxpack.errors import AdapterError, OverlayError, UsageError, quoted
from ltxpack.export.plan import ENDING, HEADER, ExportOptions, ExportPlan, Unit, plan_export
from ltxpack.files.publish import (
    check_writable,
    clipped_name,
    fsync_folder,
    move_file,
    remove_temporaries,
    require_space,
    write_errors,
)
from ltxpack.files.reader import Range, RangeReader, file_ranges
from ltxpack.lora_bake.bake import UnwrittenBake
from ltxpack.manifest import FileRecord, changed_file
from ltxpack.repack.items import Buffer, TensorSpec
from ltxpack.repack.lock import OverlayLock, real_target, refuse_links
from ltxpack.repack.staging import Journal
from ltxpack.repack.write import parts_of, read_plan, taken
from ltxpack.reporter import Reporter

JOURNAL = "journal.jsonl"
# The most bytes that wait in the page cache for the disk.
WAITING = 64 * 1024 * 1024
# Bytes that are put on the disk and read back together.
BATCH = 64 * 1024 * 1024
READS_AT_ONCE = 2


def export(options: ExportOptions, reporter: Reporter) -> ExportPlan:
    """Write the file: whole, on the disk and read back, or not at all. Returns its plan.

    Raises UsageError for an output that cannot be written or exists, the errors of :func:`plan_export`, OverlayError
    for a shard that changed or a full disk, AdapterError for sums that are not finite.
    """
    output = _checked(options)
    folder = output.parent / f".{clipped_name(output)}.ltxpack"
    refuse_links(folder)
    with OverlayLock(options.overlay, reporter, shared=True), OverlayLock(folder, reporter):
        remove_temporaries(output)
        plan = plan_export(options, reporter)
        with UnfinishedFile(folder, plan, reporter) as file:
            _write(plan, file, reporter)
            file.finish()
            with write_errors(output):
                move_file(file.path, output)
                fsync_folder(output.parent)
            file.discard()
    return plan


def _checked(options: ExportOptions) -> Path:
    """The output, absolute. Raises UsageError for a place where no file may be written."""
    output = options.output.absolute()
    if output.suffix != ENDING:
        better = output / f"ltx-2.3{ENDING}" if output.is_dir() else options.output.with_suffix(ENDING)
        raise UsageError(
            "is no name for a safetensors file", file=options.output, expected=f"a name ending in {ENDING}",
            next=f"choose -o {quoted(better)}",
        )  # fmt: skip
    check_writable(output, "-o", f"ltx-2.3{ENDING}")
    overlay = real_target(options.overlay)
    if overlay in output.resolve().parents:
        raise UsageError("is inside the overlay", file=options.output, next="choose -o in another folder")
    if output.exists() and not options.force:
        raise UsageError("exists already", file=options.output, next="choose another -o, or add --force")
    return output


def _write(plan: ExportPlan, file: UnfinishedFile, reporter: Reporter) -> None:
    """Write the units that the file does not hold yet."""
    left = [unit for unit in plan.units if not file.take_over(unit)]
    reporter.begin("writing", sum(unit.nbytes for unit in left), "B")
    base = () if plan.made is None else plan.made.plan.base.shards
    made = {shard.record.path for shard in base}
    fused = [unit for unit in left if unit.shard.record.path in made]
    try:
        # Copying waits for the disk, fusing for the processor.
        with ThreadPoolExecutor(1, "ltxpack-export") as thread:
            copying = thread.submit(_copy_all, [unit for unit in left if unit not in fused], file, reporter)
            with file.stopping():
                if fused and plan.made is not None:
                    _fuse_all(plan.made, fused, file, reporter)
                copying.result()
    except AdapterError:
        file.discard()
        raise
    reporter.end()


def _fuse_all(made: UnwrittenBake, units: Sequence[Unit], file: UnfinishedFile, reporter: Reporter) -> None:
    """Raises AdapterError listing the weights that overflow, OverlayError for a base that changed."""
    # These need torch, unlike copying.
    from ltxpack.lora_bake.stream import Engine, ShardOutput
    from ltxpack.lora_bake.trial import settled

    plan = made.plan
    # No report of an export says how far its weights are from the sums.
    with Engine(settled([plan], reporter), made.arithmetic, reporter, measure=False) as engine:
        for unit in units:
            path, writer = unit.shard.record.path, PlacedWriter(file, unit)
            engine.fuse_shard(unit.shard, [ShardOutput(path, unit.entries, plan.strengths_in, writer)])


def _copy_all(units: Sequence[Unit], file: UnfinishedFile, reporter: Reporter) -> None:
    with file.stopping(), ThreadPoolExecutor(1, "ltxpack-export-hash") as thread:
        for unit in units:
            _copy(unit, file, thread, reporter)


def _copy(unit: Unit, file: UnfinishedFile, thread: ThreadPoolExecutor, reporter: Reporter) -> None:
    """Raises OverlayError if the file differs from the manifest."""
    path, size = unit.shard.file.path, unit.shard.file.size
    hasher, writer = blake3(), PlacedWriter(file, unit)
    header = size - unit.nbytes
    with RangeReader(file_ranges(path, size)) as reader:
        for data in reader:
            body = data[header:]
            header = max(0, header - len(data))
            hashed = thread.submit(hasher.update, data)
            writer.write(body)
            hashed.result()
            reporter.advance(len(body))
    if hasher.hexdigest() != unit.shard.record.blake3:
        raise changed_file(path, f"blake3 {unit.shard.record.blake3}", f"blake3 {hasher.hexdigest()}")
    writer.close()


class PlacedWriter:
    """Takes the bytes of a unit's tensors in the unit's order, puts each tensor in its place, and hashes it.

    A :class:`.repack.write.TensorWriter`, like :class:`.repack.write.ShardWriter`, which writes a file of its own.
    """

    why = "its tensors have another order"

    def __init__(self, file: UnfinishedFile, unit: Unit) -> None:
        self._file, self._unit = file, unit
        self._tensors = deque(pair for pair in unit.tensors if pair[0].nbytes)
        # The bytes taken of the first of these tensors, their hash, and all of them if the tensor is to be widened.
        self._done, self._hasher, self._table = 0, blake3(), bytearray()
        empty = (name for name, spec in unit.exported.items() if not spec.nbytes)
        self._digests = dict.fromkeys(empty, blake3().hexdigest())

    def write(self, data: Buffer) -> None:
        """Take the next bytes. Raises OverlayError."""
        left = memoryview(data).cast("B")
        while len(left):
            stored, spec = self._tensors[0]
            part, left = left[: stored.nbytes - self._done], left[stored.nbytes - self._done :]
            if spec is not None and spec.dtype != stored.dtype:
                self._table += part
            elif spec is not None:
                self._put(part, spec.name, self._done)
            self._done += len(part)
            if self._done == stored.nbytes:
                self._end(spec)

    def close(self) -> FileRecord:
        """Return when all bytes of the unit are on the disk."""
        if self._tensors:
            raise AssertionError(f"{self._unit.shard.record.path}: tensors are missing")
        return self._file.complete(self._unit, self._digests)

    def _end(self, spec: TensorSpec | None) -> None:
        """Go on to the next tensor after ``spec``."""
        if spec is not None:
            if self._table:
                import numpy as np

                # bfloat16 values as float32, exactly
                self._put((np.frombuffer(self._table, "<u2").astype("<u4") << 16).view("u1").data, spec.name)
            digest = self._digests[spec.name] = self._hasher.hexdigest()
            self._file.written(spec.name, digest)
        self._tensors.popleft()
        self._done, self._hasher, self._table = 0, blake3(), bytearray()

    def _put(self, data: Buffer, name: str, done: int = 0) -> None:
        self._hasher.update(data)
        self._file.put(data, name, done)


class UnfinishedFile:
    """The file while it is written, in a folder of its own. Complete units stay for the next run of the same plan."""

    def __init__(self, folder: Path, plan: ExportPlan, reporter: Reporter) -> None:
        self.path = folder / f"unfinished{ENDING}"
        self._folder, self._plan, self._reporter = folder, plan, reporter
        self._back = ReadBack(self.path)
        self._fd, self._waiting = -1, 0
        self._completing = threading.Lock()
        self._problem: BaseException | None = None

    def __enter__(self) -> Self:
        journal = self._journal = Journal.read(self._folder / JOURNAL)
        fingerprint, records = self._plan.fingerprint(), dict[str, FileRecord]()
        with write_errors(self.path):
            there = self.path.is_file() and not self.path.is_symlink() and self.path.stat().st_size == self._plan.size
            if journal.fingerprint == fingerprint and there:
                names = {unit.shard.record.path: unit.exported.keys() for unit in self._plan.units}
                records = {
                    path: record
                    for path, record in journal.records.items()
                    if isinstance(note := journal.notes.get(path), dict) and note.keys() == names.get(path)
                }
                self._reporter.note(f"going on: {len(records)} of {len(self._plan.units)} parts are there")
            else:
                shutil.rmtree(self._folder, ignore_errors=True)
            used = self.path.stat().st_blocks * 512 if records else 0
            require_space(self._folder, max(0, self._plan.size - used), 2)
            self._folder.mkdir(exist_ok=True)
            journal.restart(fingerprint, records)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, self._plan.size)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._back.stop()
        os.close(self._fd)
        if self._back.failed:
            self.discard()
        if kind and issubclass(kind, KeyboardInterrupt) and self._folder.is_dir():
            done = len(self._journal.records)
            self._reporter.note(f"stopped; {done} parts are there, the same command goes on from there")

    def take_over(self, unit: Unit) -> bool:
        """Whether an earlier run wrote all of ``unit``; its bytes are then read back."""
        path = unit.shard.record.path
        if path not in self._journal.records:
            return False
        for name, digest in self._journal.notes[path].items():
            self.written(name, str(digest))
        return True

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Makes :meth:`put` raise an exception of this block on all other threads too."""
        try:
            yield
        except BaseException as problem:
            self._problem = self._problem or problem
            raise

    def put(self, data: Buffer, name: str, done: int = 0) -> None:
        """Write ``data``, the bytes of ``name`` after the first ``done``.

        Raises OverlayError for a full disk, and the exception that stopped another thread.
        """
        if self._problem is not None:
            raise self._problem
        left, offset = memoryview(data), self._plan.spans[name][0] + done
        with write_errors(self.path):
            while left:
                written = os.pwrite(self._fd, left, offset)
                left, offset = left[written:], offset + written
                self._waiting += written
            if self._waiting >= WAITING:
                # The disk begins to write now; else all bytes would wait for the end.
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
                self._waiting = 0

    def complete(self, unit: Unit, digests: Mapping[str, str]) -> FileRecord:
        """Note that all of ``unit`` is written; ``digests``: the blake3 of each tensor."""
        with write_errors(self.path):
            os.fsync(self._fd)
        with self._completing:
            self._journal.record(unit.shard.record, dict(digests))
        return unit.shard.record

    def written(self, name: str, digest: str) -> None:
        """Read ``name`` back, whose bytes are all written, meanwhile. Raises OverlayError for a faulty disk."""
        self._back.add(Written(name, Range(self.path, *self._plan.spans[name]), digest))

    def finish(self) -> None:
        """Write literals and header; wait until all is read back. Raises OverlayError if bytes differ."""
        for name, data in {**self._plan.literals, HEADER: self._plan.header}.items():
            self.put(data, name)
            self.written(name, blake3(data).hexdigest())
        self._back.finish(self._reporter)

    def discard(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class Written(NamedTuple):
    """The written tensor ``name``: its bytes in the file, and their blake3."""

    name: str
    range: Range
    blake3: str


class ReadBack:
    """Compares :meth:`added <add>` bytes on a thread of its own, until :meth:`finish` or :meth:`stop`.

    It puts a batch on the disk and out of the page cache before it reads it, so that it compares the disk's bytes.
    ``failed``: whether any bytes differed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "ltxpack-read-back")
        self._adding = threading.Lock()
        self._batch: list[Written] = []
        self._under_way: deque[tuple[int, Future[None]]] = deque()
        self._stopped = self.failed = False

    def stop(self) -> None:
        self._stopped = True
        self._thread.shutdown(cancel_futures=True)

    def add(self, written: Written) -> None:
        """Compare these bytes soon; any thread may call this. Raises OverlayError if earlier bytes differ."""
        with self._adding:
            if written.range.nbytes:
                self._batch.append(written)
            if sum(written.range.nbytes for written in self._batch) >= BATCH:
                self._submit()
            while self._under_way and self._under_way[0][1].done():
                self._under_way.popleft()[1].result()

    def finish(self, reporter: Reporter) -> None:
        """Wait until all is compared. Raises OverlayError if bytes differ."""
        self._submit()
        reporter.begin("reading back", sum(nbytes for nbytes, _ in self._under_way), "B")
        for nbytes, compared in self._under_way:
            compared.result()
            reporter.advance(nbytes)
        reporter.end()

    def _submit(self) -> None:
        batch, self._batch = self._batch, []
        if batch:
            nbytes = sum(written.range.nbytes for written in batch)
            self._under_way.append((nbytes, self._thread.submit(self._compare, batch)))

    def _compare(self, batch: Sequence[Written]) -> None:
        batch = sorted(batch, key=lambda written: written.range.start)
        ranges = [written.range for written in batch]
        with write_errors(self._path):
            self._put_on_disk(ranges)
        windows = read_plan(ranges)
        with RangeReader([window.range for window in windows], in_flight=READS_AT_ONCE) as reader:
            parts = parts_of(windows, reader)
            for written in batch:
                hasher = blake3()
                for part in taken(parts, written.range.nbytes):
                    if self._stopped:
                        return
                    hasher.update(part)
                if hasher.hexdigest() != written.blake3:
                    self.failed = True
                    raise OverlayError(
                        "did not come back from the disk as it was written",
                        file=self._path,
                        tensor=written.name,
                        expected=f"blake3 {written.blake3}",
                        found=f"blake3 {hasher.hexdigest()}",
                        next="check the disk, then run this again",
                    )

    def _put_on_disk(self, ranges: Sequence[Range]) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            for written in ranges:
                os.posix_fadvise(fd, written.start, written.nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
