"""A stand-in for a CUDA stream that is as late as it may be: nothing is copied until somebody waits for it.

With the CPU's own stand-in, which copies as soon as it is asked, the two extremes of when a copy may happen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ltxpack.runtime.weights.copies import Copies


class LateCopies(Copies):
    """``waits`` counts how often the computation waited, ``pinned`` bytes."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.waits = self.pinned = self._done = 0
        self._queue: list[Callable[[], object]] = []
        self._lock = threading.RLock()

    @property
    def left(self) -> int:
        """The number of copies that are not done."""
        return len(self._queue)

    def run(self, work: Callable[[], object], after: object = None) -> int:
        with self._lock:
            self._queue.append(work)
            return self._done + len(self._queue)

    def before_computing(self, event: int | None) -> None:
        self.waits += 1
        self.finish(event)

    @torch.inference_mode()
    def finish(self, event: int | None) -> None:
        with self._lock:
            while event is not None and self._done < event:
                self._queue.pop(0)()
                self._done += 1

    def pin(self, memory: Tensor) -> bool:
        self.pinned += memory.nbytes
        return True

    def unpin(self, memory: Tensor) -> None:
        self.pinned -= memory.nbytes
