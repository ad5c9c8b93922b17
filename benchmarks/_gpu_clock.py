"""Time and memory on a device: medians with its own events, peaks of its allocator, and limits that always hold."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

LEAST, MOST = 2, 20


class OutOfTime(BaseException):
    """A section's time is up. Like KeyboardInterrupt it passes through libraries that catch every Exception."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block once ``seconds`` are over. In the main thread, where signals arrive."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Clock:
    """Measures work on ``device``: by events on a GPU, by the host's clock on a CPU.

    Every limit in seconds is taken times ``patience``; 0 measures nothing more often than it must.
    """

    device: torch.device
    patience: float = 1.0

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median(self, work: Callable[[], object], seconds: float, warm_ups: int = 1) -> float:
        """Milliseconds of one call: the median of at least two, of twenty if they fit into ``seconds``."""
        for _ in range(warm_ups):
            work()
        self.wait()
        begin, times = time.perf_counter(), list[float]()
        while len(times) < LEAST or (len(times) < MOST and time.perf_counter() - begin < self.patience * seconds):
            times.append(self.once(work)[0])
        return statistics.median(times)

    def once(self, work: Callable[[], object]) -> tuple[float, object]:
        """Milliseconds of one call, and what it gave."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            made = work()
            return (time.perf_counter() - begin) * 1e3, made
        event: Callable[..., Any] = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        made = work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)), made

    def forget_peak(self) -> None:
        """Begin the peak anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """Bytes allocated at most since; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
