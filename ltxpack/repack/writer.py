"""Writes one file of known size, front to back, past the page cache where that helps: copies and hashes in step.

A thread writes. The caller's thread copies memory and hashes (blake3) what it just copied while that is still in the
processor's cache: a thread for the hash alone would cost a third more CPU.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
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
    ``buffers`` buffers of 4 MB are in flight. ``why``: why the file is not written past the page cache, or "". Raises
    OverlayError when the disk is full or refuses.
    """

    def __init__(
        self, root: Path, path: str, header: bytes, size: int, *, buffers: int = WRITE_BUFFERS, direct: bool = True
    ) -> None:
        """``size`` counts the ``header``, which is written at once."""
        self.path, self.size = path, size
        self._target = root / path
        self._hasher = blake3()
        self._written = 0
        self._spare = buffers
        self._memory: memoryview | None = None
        self._used = self._hashed = 0
        # Oldest first: when each buffer is free again.
        self._pending: deque[tuple[Future[None], memoryview]] = deque()
        with write_errors(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Temporary(self._target)
            self._file = DirectWriter(self._temporary.path, direct=direct and size >= DIRECT_FROM)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ltxpack-write")
        self.write(header)

    @property
    def why(self) -> str:
        """Why the file is not written past the page cache, or ""."""
        return self._file.why

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
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
                self._submit(memory)
        self._written += len(source)

    def close(self) -> FileRecord:
        """Wait for the disk and give the file its name; returns what was written."""
        if self._written != self.size:
            raise AssertionError(f"{self.path}: {self._written} bytes were written of {self.size} planned")
        if self._memory is not None:
            self._hash_up_to(self._used)
            self._submit(self._memory)
        with write_errors(self._target):
            for done, _ in self._pending:
                done.result()
            self._file.sync()
            self._file.close()
            self._temporary.publish(synced=True)
        return FileRecord(self.path, self.size, self._hasher.hexdigest())

    def abort(self) -> None:
        """Stop writing and remove what was begun; after ``close`` this only ends the thread."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()
        self._temporary.discard()

    def _take(self) -> memoryview:
        """An empty buffer: a new one while there are some to spare, else the next that the disk is done with."""
        self._used = self._hashed = 0
        if self._spare:
            self._spare -= 1
            return aligned_buffer(min(BUFFER, round_up(self.size)))
        done, memory = self._pending.popleft()
        with write_errors(self._target):
            done.result()
        return memory

    def _submit(self, memory: memoryview) -> None:
        self._pending.append((self._thread.submit(self._file.append, memory[: self._used]), memory))
        self._memory = None

    def _hash_up_to(self, end: int) -> None:
        assert self._memory is not None
        self._hasher.update(self._memory[self._hashed : end])
        self._hashed = end
