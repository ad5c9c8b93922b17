"""A stand-in for a CUDA stream that is as late as it may be: nothing is copied until somebody waits for it.

With the CPU's own stand-in, which copies as soon as it is asked, the two extremes of when a copy may happen.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LateCopies:
    """``waits`` counts how often the computation waited."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    waits: int = 0
    pinned: int = 0
    process_ends: bool = False
    _queue: list[Callable[[], None]] = field(default_factory=list)
    _done: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def run(self, work: Callable[[], None], after: object = None) -> int:
        with self._lock:
            self._queue.append(work)
            return self._done + len(self._queue)

    def now(self) -> None:
        return None

    def before_computing(self, mark: int | None) -> None:
        self.waits += 1
        self.finish(mark)

    @torch.inference_mode()
    def finish(self, mark: int | None) -> None:
        with self._lock:
            while mark is not None and self._done < mark:
                self._queue.pop(0)()
                self._done += 1

    def computing(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def pin(self, memory: Tensor) -> bool:
        self.pinned += memory.nbytes
        return True

    def unpin(self, memory: Tensor) -> None:
        self.pinned -= memory.nbytes
