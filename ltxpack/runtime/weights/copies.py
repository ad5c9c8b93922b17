"""Copies to a device that run beside its computation: a CUDA stream, or on the CPU a stand-in that copies at once.

Three points in time are told apart: where the computation stands (``now``), where a copy is done (what ``run``
returns), and where the host is. Nothing here knows what is copied.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 * 1024 * 1024

Mark = Any
"""A point that can be waited for: a CUDA event, or None where there is nothing to wait for."""


class Copies(Protocol):
    """A queue of copies to one device."""

    device: torch.device

    def run(self, work: Callable[[], None], after: Mark = None) -> Mark:
        """Do ``work`` in the queue once ``after`` is reached. Returns the mark that it is done."""

    def now(self) -> Mark:
        """The mark that everything asked of the computation so far is done."""

    def before_computing(self, mark: Mark) -> None:
        """Let the computation asked for from now on wait for ``mark``; the host goes on."""

    def finish(self, mark: Mark) -> None:
        """Let the host wait for ``mark``."""

    def pin(self, memory: Tensor) -> bool:
        """Let the device copy from ``memory`` by itself; False where the system refuses."""

    def unpin(self, memory: Tensor) -> None:
        """Undo :meth:`pin`, before the memory is given back."""


class HostCopies:
    """The CPU's stand-in: a copy is done as it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, work: Callable[[], None], after: Mark = None) -> Mark:
        """Do ``work`` at once."""
        with torch.inference_mode():
            work()
        return None

    def now(self) -> Mark:
        """Nothing to wait for."""
        return None

    def before_computing(self, mark: Mark) -> None:
        """Nothing to wait for."""

    def finish(self, mark: Mark) -> None:
        """Nothing to wait for."""

    def pin(self, memory: Tensor) -> bool:
        """Host memory is the device's own."""
        return True

    def unpin(self, memory: Tensor) -> None:
        """Nothing was done."""


class CudaCopies:
    """A CUDA stream of its own. May be used from several threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], None], after: Mark = None) -> Mark:
        """Put ``work``, which must not wait for the device, into the stream."""
        if after is not None:
            self.stream.wait_event(after)
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            try:
                work()
            except BaseException:
                self.stream.synchronize()
                raise
            return self._event()

    def now(self) -> Mark:
        """An event in the stream that computes."""
        with torch.cuda.device(self.device):
            return self._event()

    def before_computing(self, mark: Mark) -> None:
        """The computing stream waits, not the host."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self, mark: Mark) -> None:
        """Sleeps, so that the thread does not burn a core."""
        if mark is not None:
            mark.synchronize()

    def pin(self, memory: Tensor) -> bool:
        """Registers the memory as it is: PyTorch's own pinned allocations round up to a power of two."""
        if memory.nbytes == 0:
            return True
        # On the device itself: the driver would else make a context, half a gigabyte, on the first one.
        with torch.cuda.device(self.device):
            if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
                return True
            # The refusal is kept as the last error, which the next launch of a kernel would report as its own.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self.device).neg()
        return False

    def unpin(self, memory: Tensor) -> None:
        """Unregisters what ``pin`` registered, once nothing is copied from it any more."""
        if memory.nbytes:
            self.stream.synchronize()
            with torch.cuda.device(self.device):
                torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def copies_to(device: torch.device) -> Copies:
    """A queue of copies to ``device``."""
    return CudaCopies(device) if device.type == "cuda" else HostCopies(device)


class HostMemory:
    """``nbytes`` of host memory that the device can copy from once :meth:`pin` was called; given back with the object.

    It is pinned after it is filled: by then its pages are there, brought by the threads that read into it. Raises
    MemoryError.
    """

    def __init__(self, nbytes: int, copies: Copies) -> None:
        # Whole pages of its own: a page is pinned once, whoever else has a part of it.
        self._pages = _fresh_pages(max(PAGE, -(-nbytes // PAGE) * PAGE))
        self.bytes = self._pages[:nbytes]
        self.pinned = False
        self._copies = copies

    def pin(self) -> bool:
        """Whether the memory is pinned now."""
        if not self.pinned and self._copies.pin(self._pages):
            self.pinned = True
            # The finalizer holds the memory, so it is unpinned first and freed then.
            weakref.finalize(self, self._copies.unpin, self._pages)
        return self.pinned


def _fresh_pages(nbytes: int) -> Tensor:
    """Memory of whole pages, uint8; huge ones as far as they are filled.

    A disk reads to a huge page in one go, and the system hands out, pins and unpins one where it would do so 512 times.
    """
    huge = nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    try:
        memory = mmap.mmap(-1, nbytes + (HUGE_PAGE if huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes of host memory: {error.strerror}") from None
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    if not huge:
        return raw
    start = -raw.data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE_PAGE * HUGE_PAGE)
    return raw[start : start + nbytes]
