"""Writes one file of known size, front to back, past the page cache where that helps: copy, hash, write in step.

A thread writes. The caller's thread copies memory and hashes (blake3) what it just copied while that is still in the
processor's cache: a thread for the hash alone would cost a third more CPU.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3

from ltxpack.files.direct import BUFFER, DIRECT_FROM, DirectWriter, aligned_buffer, round_up
from ltxpack.files.publish import Temporary, write_errors
from ltxpack.manifest import FileRecord
from ltxpack.repack.tensors import Buffer

WRITE_BUFFERS = 4
HASH_STEP = 256 * 1024


class ShardWriter:
    """Writes one file of known size front to back: ``write`` … ``close``; ``abort`` (or an error) leaves nothing.

    The bytes go to a temporary file beside ``root / path`` and get their name when all of them are on the disk. Up to
    ``buffers`` buffers of 4 MB are in flight. Raises OverlayError when the disk is full or refuses.
    """

    def __init__(
        self,
        root: Path,
        path: str,
        header: bytes,
        size: int,
        *,
        buffers: int = WRITE_BUFFERS,
        direct: bool = True,
    ) -> None:
        """``size`` counts the ``header``, which is written at once."""
        self.path = path
        self.size = size
        self._target = root / path
        self._hasher = blake3()
        self._written = 0
        self._spare = buffers
        self._memory: memoryview | None = None
        self._used = self._hashed = 0
        with write_errors(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Temporary(self._target)
            self._file = DirectWriter(self._temporary.path, direct=direct and size >= DIRECT_FROM)
        self._disk = _Disk(self._file)
        self.write(header)

    @property
    def why(self) -> str:
        """Why the file is not written past the page cache; "" if it is."""
        return self._file.why

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, data: Buffer) -> None:
        """The next bytes of the file; ``data`` may be reused at once. Any contiguous buffer will do."""
        source = memoryview(data)
        if not source.nbytes:
            return
        source = source.cast("B")
        done = 0
        while done < len(source):
            memory = self._memory = self._memory or self._take()
            count = min(len(source) - done, HASH_STEP - self._used % HASH_STEP, len(memory) - self._used)
            memory[self._used : self._used + count] = source[done : done + count]
            self._used += count
            done += count
            if self._used % HASH_STEP == 0 or self._used == len(memory):
                self._hash_up_to(self._used)
            if self._used == len(memory):
                self._submit()
        self._written += len(source)

    def close(self) -> FileRecord:
        """Wait for the disk, give the file its name, say what was written. Raises OverlayError if the disk refuses."""
        if self._written != self.size:
            raise AssertionError(f"{self.path}: {self._written} bytes were written of {self.size} planned")
        if self._memory is not None:
            self._hash_up_to(self._used)
            self._submit()
        self._disk.finish()
        with write_errors(self._target):
            self._disk.raise_failure()
            self._file.sync()
            self._file.close()
            self._temporary.publish(synced=True)
        return FileRecord(self.path, self.size, self._hasher.hexdigest())

    def abort(self) -> None:
        """Stop writing and remove what was begun; after ``close`` this does nothing."""
        self._disk.finish()
        self._file.close()
        self._temporary.discard()

    def _take(self) -> memoryview:
        """An empty buffer: a new one while there are some to spare, else the next that the disk is done with."""
        self._used = self._hashed = 0
        if self._spare:
            self._spare -= 1
            return aligned_buffer(min(BUFFER, round_up(self.size)))
        memory = self._disk.free.get()
        with write_errors(self._target):
            self._disk.raise_failure()
        return memory

    def _submit(self) -> None:
        assert self._memory is not None
        self._disk.put(self._memory[: self._used], self._memory)
        self._memory = None

    def _hash_up_to(self, end: int) -> None:
        assert self._memory is not None
        self._hasher.update(self._memory[self._hashed : end])
        self._hashed = end


class _Disk:
    """Appends buffers to a file on a thread of its own, started with the first one; then they are ``free`` again.

    After a failure the rest passes through unwritten, so that nobody waits for ever.
    """

    def __init__(self, file: DirectWriter) -> None:
        self.free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._file = file
        self._inbox: queue.SimpleQueue[tuple[memoryview, memoryview] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def put(self, data: memoryview, memory: memoryview) -> None:
        """Append ``data``, which lies in ``memory``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ltxpack-write", daemon=True)
            self._thread.start()
        self._inbox.put((data, memory))

    def finish(self) -> None:
        """Wait until everything put is written; the thread ends."""
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join()
            self._thread = None

    def raise_failure(self) -> None:
        """Raise what the thread met."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            data, memory = item
            if self._failure is None:
                try:
                    self._file.append(data)
                except BaseException as error:
                    self._failure = error
            self.free.put(memory)
