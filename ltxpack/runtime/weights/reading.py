"""Bytes of safetensors files into tensors, with several reads in flight, hashed as they pass.

What goes to a device passes through a few pinned buffers; what goes to host memory is read straight to its place, or
past the page cache through a buffer too. No file is held whole. Knows no module and no names: what arrives where comes
in as :class:`Arrival` values.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from ltxpack.files.source_file import ALIGN, CACHED, SourceFile
from ltxpack.manifest import changed_file
from ltxpack.runtime.weights.copies import Copies, Event, HostMemory

PIECE = 16 * 1024 * 1024
# Pieces read at once past the page cache, and how many more are in line for the threads that read: a disk ends reads
# that it began together at about the same time, and would wait while they are looked after. Through the cache, where
# the system reads ahead and threads copy, all are read at once.
AT_ONCE, IN_LINE = 6, 6
IN_FLIGHT = AT_ONCE + IN_LINE
# Buffers beyond those of the pieces in flight: their bytes are on the way to the device.
LANDING = 4


Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: ``start`` bytes into ``file``, stored as ``dtype``."""

    file: Path
    start: int
    nbytes: int
    dtype: torch.dtype


class Arrival:
    """One tensor on its way into ``final``, a contiguous tensor; another dtype there is a cast on arrival.

    ``on_host``: ``final`` is host memory, filled by the threads that read; else the queue of copies fills it. ``then``
    is called when its last byte is there, or in that queue.
    """

    __slots__ = ("_arriving", "_missing", "_then", "final", "on_host", "place")

    def __init__(
        self, place: Place, final: Tensor, on_host: bool = False, then: Callable[[], object] | None = None
    ) -> None:
        self.place, self.final, self.on_host = place, final, on_host
        self._then = then
        self._missing = place.nbytes
        self._arriving: Tensor | None = None

    def bytes(self, offset: int, nbytes: int) -> Tensor:
        """A stretch of where the stored bytes go, uint8."""
        if self._arriving is None:
            same = self.final.dtype == self.place.dtype
            self._arriving = self.final if same else torch.empty_like(self.final, dtype=self.place.dtype)
        return self._arriving.reshape(-1).view(torch.uint8)[offset : offset + nbytes]

    def landed(self, nbytes: int) -> None:
        """``nbytes`` more are there; with the last ones the tensor is cast if need be."""
        self._missing -= nbytes
        if self._missing == 0 and self._arriving is not None:
            if self._arriving is not self.final:
                self.final.copy_(self._arriving)
            self._arriving = None
            if self._then is not None:
                self._then()


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes that follow one another in a file: a tensor's from ``offset`` on, or nobody's."""

    start: int
    nbytes: int
    arrival: Arrival | None = None
    offset: int = 0

    @property
    def on_host(self) -> bool:
        """Whether it goes to host memory."""
        return self.arrival is not None and self.arrival.on_host


@dataclass(frozen=True, slots=True)
class Piece:
    """What one read brings: stretches without a gap between them. ``last``: the file ends with it."""

    file: Path
    stretches: tuple[Stretch, ...]
    last: bool

    @property
    def start(self) -> int:
        """Where in the file it begins."""
        return self.stretches[0].start

    @property
    def nbytes(self) -> int:
        """How long it is."""
        return sum(stretch.nbytes for stretch in self.stretches)

    @property
    def on_host(self) -> bool:
        """Whether nothing of it goes to a device."""
        return all(stretch.on_host for stretch in self.stretches)


@dataclass(slots=True)
class _Flight:
    """A piece being read into ``views``; ``buffer`` is the pinned buffer it uses, if any, from byte ``lead`` on."""

    piece: Piece
    views: list[memoryview]
    buffer: HostMemory | None
    done: Future[None]
    lead: int = 0


def no_stop() -> None:
    """Never stops a reading."""


class FileReader:
    """Reads files piece by piece on threads; pieces are taken in the order of the file. For one thread at a time.

    ``reads``: one of source_file.READS; past the page cache only where a filesystem allows it. A read is of ``piece``
    bytes; ``in_flight`` pieces are being read or in line for that.
    """

    def __init__(self, copies: Copies, *, reads: str = CACHED, piece: int = PIECE, in_flight: int = IN_FLIGHT) -> None:
        self.copies = copies
        self.reads = reads
        # Whether a filesystem would not read past its cache.
        self.refused = False
        self.piece, self.in_flight = piece, in_flight
        at_once = in_flight if reads == CACHED else min(AT_ONCE, in_flight)
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="ltxpack-read")
        # One thread: pieces are hashed in their order, while the next ones are sent on.
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="ltxpack-hash")
        # Buffers, the mark after which each is free again, and the hashing that must be done; oldest first.
        self._buffers: deque[tuple[HostMemory, Event, Future[None] | None]] = deque()
        self._made = 0

    def fill(
        self,
        arrivals: Iterable[Arrival],
        digests: Mapping[Path, str] | None = None,
        *,
        stop: Callable[[], None] = no_stop,
        after: Event = None,
        check: PieceCheck | None = None,
    ) -> Event:
        """Read every arrival. Returns the mark after which those on the device are there.

        The files of ``digests`` (file: blake3) are read whole and compared; without them ``check`` sees each piece.
        Nothing is copied to the device before ``after``; default: where the computation is now, which is when tensors
        just made are free to be written. ``stop`` raises to end the reading. Raises OverlayError for a file that
        changed or cannot be read; what had arrived by then is not to be used.
        """
        whole = _Check(digests or {}, self._hashing)
        check = check or whole
        after = after or self.copies.now()
        flights: deque[_Flight] = deque()
        mark: Event = None
        with contextlib.ExitStack() as files:
            try:
                pieces = plan_pieces(arrivals, list(digests or {}), self.piece)
                for piece, file in _opened(pieces, files, self.reads):
                    stop()
                    self.refused |= self.reads != CACHED and not file.past_cache
                    flights.append(self._take_off(piece, file))
                    if len(flights) == self.in_flight:
                        mark = self._land(flights.popleft(), check, after) or mark
                while flights:
                    mark = self._land(flights.popleft(), check, after) or mark
                whole.finish()
            except BaseException:
                self._abandon(flights)
                raise
        return mark

    def close(self) -> None:
        """End the threads and give the buffers back."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._hashing.shutdown(wait=True)
        self._settle()
        self._buffers.clear()

    def _take_off(self, piece: Piece, file: SourceFile) -> _Flight:
        """Begin to read ``piece``."""
        if file.past_cache:
            return self._take_off_past_cache(piece, file)
        buffer = None if piece.on_host else self._free_buffer()
        views = list(_views(piece, buffer))
        return _Flight(piece, views, buffer, self._threads.submit(file.scatter, views, piece.start))

    def _take_off_past_cache(self, piece: Piece, file: SourceFile) -> _Flight:
        """Such a read wants pages: all goes to the buffer, and the same thread copies on what stays on the host."""
        buffer, lead = self._free_buffer(), piece.start % ALIGN
        memory = buffer.bytes.numpy()
        found = memory[lead : lead + piece.nbytes]
        places = list(_places_on_host(piece, found))

        def read() -> None:
            file.gather(memory.data, piece.start, piece.nbytes)
            for place, part in places:
                np.copyto(place, part)

        return _Flight(piece, [found.data], buffer, self._threads.submit(read), lead)

    def _land(self, flight: _Flight, check: PieceCheck, after: Event) -> Event:
        """Wait for the read; have it hashed while it is sent on to the device; note what arrived."""
        mark, hashed = None, None
        try:
            flight.done.result()
            hashed = check.begin(flight.piece, flight.views)
            if flight.buffer is not None and not flight.piece.on_host:
                buffer = flight.buffer.bytes[flight.lead :]
                mark = self.copies.run(lambda: _send_on(flight.piece, buffer), after)
            _note_on_host(flight.piece)
        finally:
            if flight.buffer is not None:
                self._buffers.append((flight.buffer, mark, hashed))
        return mark

    def _free_buffer(self) -> HostMemory:
        if self._made < self.in_flight + LANDING:
            self._made += 1
            fresh = HostMemory(self.piece + (0 if self.reads == CACHED else 2 * ALIGN), self.copies)
            fresh.pin()
            return fresh
        buffer, mark, hashed = self._buffers.popleft()
        self._settle_one(mark, hashed)
        return buffer

    def _abandon(self, flights: deque[_Flight]) -> None:
        """Let nothing be written any more to memory that is about to be given back."""
        for flight in flights:
            flight.done.cancel()
        for flight in flights:
            with contextlib.suppress(Exception, CancelledError):
                flight.done.result()
            if flight.buffer is not None:
                self._buffers.append((flight.buffer, None, None))
        self._settle()

    def _settle(self) -> None:
        for _, mark, hashed in self._buffers:
            self._settle_one(mark, hashed)

    def _settle_one(self, mark: Event, hashed: Future[None] | None) -> None:
        """Wait until nobody reads the buffer; what the hash tells is heard at the end of the filling."""
        self.copies.finish(mark)
        if hashed is not None:
            wait([hashed])


class PieceCheck(Protocol):
    """Takes in what is read."""

    def begin(self, piece: Piece, views: Sequence[memoryview]) -> Future[None] | None:
        """Begin to take in ``piece``; ``views`` stay until that is done. None if nothing is to be done."""


class _Check:
    """The blake3 of one file after the other, against what is expected; on a thread, in order."""

    def __init__(self, digests: Mapping[Path, str], thread: ThreadPoolExecutor) -> None:
        self._digests = digests
        self._thread = thread
        self._begun: list[Future[None]] = []
        self._hasher = blake3(max_threads=blake3.AUTO)

    def begin(self, piece: Piece, views: Sequence[memoryview]) -> Future[None] | None:
        """Begin to take in ``piece``; None if its file is not compared. ``views`` must stay until that is done."""
        if piece.file not in self._digests:
            return None
        self._begun.append(self._thread.submit(self._update, piece, views))
        return self._begun[-1]

    def finish(self) -> None:
        """Wait until all is taken in. Raises OverlayError for a file that is not what was expected."""
        for each in self._begun:
            each.result()

    def _update(self, piece: Piece, views: Sequence[memoryview]) -> None:
        for view in views:
            self._hasher.update(view)
        if piece.last:
            expected, found = self._digests[piece.file], self._hasher.hexdigest()
            self._hasher = blake3(max_threads=blake3.AUTO)
            if found != expected:
                raise changed_file(piece.file, f"blake3 {expected}", f"blake3 {found}")


def plan_pieces(arrivals: Iterable[Arrival], whole: Sequence[Path], limit: int) -> Iterator[Piece]:
    """The pieces, file by file, of at most ``limit`` bytes; the files of ``whole`` from their first byte to the last.

    Of other files only what arrives is read.
    """
    by_file: dict[Path, list[Arrival]] = {path: [] for path in whole}
    for arrival in arrivals:
        by_file.setdefault(arrival.place.file, []).append(arrival)
    for path, wanted in by_file.items():
        wanted.sort(key=lambda arrival: arrival.place.start)
        size = _size(path) if path in whole else None
        cut = list(_cut(_stretches(wanted, size), limit))
        for number, stretches in enumerate(cut):
            yield Piece(path, stretches, number == len(cut) - 1)


def _stretches(arrivals: Sequence[Arrival], size: int | None) -> Iterator[Stretch]:
    """The arrivals as stretches in order; with ``size`` also what lies before, between and behind them."""
    end = 0
    for arrival in arrivals:
        place = arrival.place
        if size is not None and place.start > end:
            yield Stretch(end, place.start - end)
        if place.nbytes:
            yield Stretch(place.start, place.nbytes, arrival)
        end = max(end, place.start + place.nbytes)
    if size is not None and size > end:
        yield Stretch(end, size - end)


def _cut(stretches: Iterable[Stretch], limit: int) -> Iterator[tuple[Stretch, ...]]:
    """Stretches without a gap between them, together at most ``limit`` bytes."""
    group: list[Stretch] = []
    held = 0
    for stretch in stretches:
        if group and group[-1].start + group[-1].nbytes != stretch.start:
            yield tuple(group)
            group, held = [], 0
        done = 0
        while done < stretch.nbytes:
            taken = min(limit - held, stretch.nbytes - done)
            group.append(Stretch(stretch.start + done, taken, stretch.arrival, done))
            done, held = done + taken, held + taken
            if held == limit:
                yield tuple(group)
                group, held = [], 0
    if group:
        yield tuple(group)


def _opened(pieces: Iterable[Piece], files: contextlib.ExitStack, reads: str) -> Iterator[tuple[Piece, SourceFile]]:
    """Each piece with its file, opened once and closed by ``files``."""
    file: SourceFile | None = None
    for piece in pieces:
        if file is None or file.path != piece.file:
            file = SourceFile(piece.file, reads)
            files.callback(file.close)
        yield piece, file


def _views(piece: Piece, buffer: HostMemory | None) -> Iterator[memoryview]:
    """Where the bytes of ``piece`` are read to, in order: into the buffer at their own offset, or straight to a tensor.

    What lies side by side in the buffer is one view.
    """
    begin = end = 0
    position = 0
    for stretch in piece.stretches:
        if stretch.on_host and stretch.arrival is not None:
            if buffer is not None and end > begin:
                yield buffer.bytes.numpy().data[begin:end]
            yield stretch.arrival.bytes(stretch.offset, stretch.nbytes).numpy().data
            begin = end = position + stretch.nbytes
        else:
            end = position + stretch.nbytes
        position += stretch.nbytes
    if buffer is not None and end > begin:
        yield buffer.bytes.numpy().data[begin:end]


def _places_on_host(piece: Piece, found: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
    """Of each stretch of ``piece`` that stays on the host: its place, and its bytes among ``found``, the piece's."""
    position = 0
    for stretch in piece.stretches:
        if stretch.on_host and stretch.arrival is not None:
            place = stretch.arrival.bytes(stretch.offset, stretch.nbytes).numpy()
            yield place, found[position : position + stretch.nbytes]
        position += stretch.nbytes


def _send_on(piece: Piece, buffer: Tensor) -> None:
    """Copy from the buffer what does not lie in its place yet. Runs in the queue of copies."""
    position = 0
    for stretch in piece.stretches:
        arrival = stretch.arrival
        if arrival is not None and not stretch.on_host:
            part = buffer[position : position + stretch.nbytes]
            arrival.bytes(stretch.offset, stretch.nbytes).copy_(part, non_blocking=True)
            arrival.landed(stretch.nbytes)
        position += stretch.nbytes


@torch.inference_mode()
def _note_on_host(piece: Piece) -> None:
    """What goes to host memory has arrived."""
    for stretch in piece.stretches:
        if stretch.on_host and stretch.arrival is not None:
            stretch.arrival.landed(stretch.nbytes)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise changed_file(path, "a file", error.strerror) from None
