"""Copies to a device beside its computation: a CUDA stream of their own, or on the CPU a stand-in that copies at once.

Three orders are told apart: of the computation (``now``), of the copies (events of ``run``), and of the host.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ltxpack.files.direct import aligned_buffer

# cudaHostRegisterPortable: pinned for every device of the process, not only for the one that is current.
PORTABLE = 1

Event = Any
"""A point that can be waited for: a CUDA event, or None where there is nothing to wait for."""


class Copies:
    """A queue of copies to one device, for several threads. On a card it is a CUDA stream beside ``compute``, the one
    that is current for the thread that makes the queue; on the CPU a copy is done at once, and there are no events.

    ``process_ends``: pinned memory stays pinned, as the kernel frees it faster.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.process_ends = device, False
        self.compute = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[[], object], after: Event = None) -> Event:
        """Do ``work``, which must not wait for the device, in the queue after ``after``. Returns the event after it."""
        if self.stream is not None and after is not None:
            self.stream.wait_event(after)
        with torch.inference_mode(), _current(self.stream):
            try:
                work()
            except BaseException:
                if self.stream is not None:
                    self.stream.synchronize()
                raise
            return self._event(self.stream)

    def now(self) -> Event:
        """The event after everything asked of the computation so far."""
        return self._event(self.compute)

    def before_computing(self, event: Event) -> None:
        """Let the computation asked for from now on wait for ``event``; the host goes on."""
        if self.compute is not None and event is not None:
            self.compute.wait_event(event)

    def finish(self, event: Event) -> None:
        """Let the host wait for ``event``, asleep, so that the thread does not burn a core."""
        if self.stream is not None and event is not None:
            event.synchronize()

    def computing(self) -> AbstractContextManager[object]:
        """A block whose tensors belong to the stream that computes, whichever thread makes them."""
        return _current(self.compute)

    def elsewhere(self) -> bool:
        """Whether this thread computes in another stream than the copies are made for."""
        return self.compute is not None and torch.cuda.current_stream(self.device) != self.compute

    def pin(self, memory: Tensor) -> bool:
        """Pin ``memory`` as it is: PyTorch's own allocations round up to a power of two. False if that is refused."""
        if self.stream is None or memory.nbytes == 0:
            return True
        # On the device itself: else the driver makes a context, half a gigabyte, on the first one.
        with torch.cuda.device(self.device):
            if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE)) == 0:
                return True
            # The driver keeps the refusal as its last error, which the next kernel would report as its own.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self.device).neg()
        return False

    def unpin(self, memory: Tensor) -> None:
        """Undo :meth:`pin` before the memory is freed, once nothing is copied from it."""
        if self.stream is not None and memory.nbytes:
            self.stream.synchronize()
            with torch.cuda.device(self.device):
                torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def _event(self, stream: torch.cuda.Stream | None) -> Event:
        if stream is None:
            return None
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(blocking=True)
            event.record(stream)
        return event


def _current(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class HostMemory:
    """``nbytes`` of host memory, freed with the object. Raises MemoryError.

    :meth:`pin` it after it is filled: by then the threads that read into it have brought its pages.
    """

    def __init__(self, nbytes: int, copies: Copies) -> None:
        # Whole pages: a page that others share could be pinned only once.
        self._pages = torch.frombuffer(aligned_buffer(nbytes), dtype=torch.uint8)
        self.bytes = self._pages[:nbytes]
        self.pinned = False
        self.copies = copies

    def pin(self) -> bool:
        """Whether the memory is pinned now."""
        if not self.pinned and self.copies.pin(self._pages):
            self.pinned = True
            # The finalizer holds the memory, so it is unpinned first and freed then.
            weakref.finalize(self, _unpin, self.copies, self._pages).atexit = False
        return self.pinned


# Memory that stays pinned until the process ends.
_LEFT: list[Tensor] = []


def _unpin(copies: Copies, pages: Tensor) -> None:
    if copies.process_ends:
        _LEFT.append(pages)
    else:
        copies.unpin(pages)
