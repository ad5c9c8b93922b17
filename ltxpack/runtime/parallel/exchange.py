"""The exchanges between ranks, through ``torch.distributed``: NCCL on cards, gloo on the CPU.

Every rank makes the same exchanges in the same order. Nothing else in the package sends a tensor to another rank. On
cards an exchange is a kernel in the queue of the device. The host goes on at once, so a failure shows at the next
exchange or in :meth:`Exchange.finish`.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ltxpack.errors import DeviceError, UsageError, one_line
from ltxpack.runtime.parallel.schemes import Rates, Split

R = TypeVar("R")
# How long a rank waits for rank 0's next word, while that encodes, decodes or reads; and for a rank that is behind in a
# video because it reads or compiles. The end of a rank is noticed otherwise.
PATIENCE, BEHIND = timedelta(days=7), timedelta(hours=1)
# Seconds that NCCL gets to stop its kernels.
ABORTED = 3.0
# Unless they are set: ranks of one machine use no network; and torch does not end a process that watches the others,
# with a traceback of its own.
OF_HERE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
WATCHED = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
# The sizes of a product as in the blocks, with as many rows as stage 1 has tokens.
ROWS, WIDTH = 8192, 4096


def meeting_place() -> Path:
    """A new folder for this user alone, in which the ranks of this machine find each other. Remove it afterwards."""
    return Path(tempfile.mkdtemp(prefix="ltxpack-ranks-"))


def store_in(place: Path, size: int) -> Any:
    """The store of ``size`` ranks, a file in the folder ``place``."""
    # Not imported above: a torch without torch.distributed makes videos on one device.
    store: Any = dist.FileStore  # type: ignore[attr-defined]
    return store(str(place / "store"), size)


class Exchange:
    """What rank ``rank`` of ``size`` sends to and gets from the others. Exchanged tensors are contiguous.

    ``check(failed)`` raises if another rank has ended; ``failed``: because an exchange failed.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, check: Callable[[bool], None]) -> None:
        """Join the others and wait until all have joined. ``store``: None for ranks that torchrun started."""
        self.rank, self.size, self._device, self._check = rank, size, device, check
        self._groups: dict[Split, list[Any]] = {}
        if dist.is_initialized():
            problem = "this process is in a group of torch.distributed already"
            raise UsageError(problem, next="torch.distributed.destroy_process_group() first, or one device")
        one_machine = store is not None or size == int(os.environ["LOCAL_WORLD_SIZE"])
        for name, value in {**(OF_HERE if one_machine else {}), **({} if store is None else WATCHED)}.items():
            os.environ.setdefault(name, value)
        more: dict[str, Any] = {"store": store, "rank": rank, "world_size": size, "timeout": BEHIND}
        if device.type == "cuda":
            torch.cuda.set_device(device)
            more["device_id"] = device  # the ranks connect now, and every group uses what they have
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Unless it is aborted, NCCL may wait for ranks that are gone.
        self._aborted = device.type == "cuda" and store is not None
        try:
            self._made(None, lambda: dist.init_process_group(backend, **more))
            self._talk = dist.new_group(backend="gloo", timeout=PATIENCE) if store is None else None
            kinds = self.all_gather(torch.tensor([_kind(device)], device=device), None)
        except BaseException:
            self.leave()
            raise
        # Whether all draw the same noise.
        self.alike = bool((kinds == kinds[0]).all())

    def say(self, message: Any = None) -> Any:
        """The ``message`` of rank 0 on all ranks, which torchrun started; the others wait for it."""
        said = [message]
        return self._made(said, lambda: dist.broadcast_object_list(said, src=0, group=self._talk))[0]

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """``tensor`` with the values of rank ``owner``, on all ranks."""
        return self._made(tensor, lambda: dist.broadcast(tensor, src=owner))

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send ``tensor`` to one ``rank``, which waits for it."""
        self._made(tensor, lambda: dist.send(tensor, rank))

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        """``tensor`` with the values that ``rank`` sends."""
        return self._made(tensor, lambda: dist.recv(tensor, rank))

    def all_to_all(self, parts: Tensor, group: Any) -> Tensor:
        """``parts`` [ranks, ...], one for each rank of ``group`` -> the parts for this rank, [ranks, ...]."""
        got = torch.empty_like(parts)
        return self._made(got, lambda: dist.all_to_all_single(got, parts, group=group))

    def all_gather(self, part: Tensor, group: Any) -> Tensor:
        """``part`` [...] of each rank of ``group``, in their order: [ranks, ...]."""
        return self.all_to_all(part.expand(dist.get_world_size(group), *part.shape).contiguous(), group)

    def group(self, split: Split) -> Any:
        """The ranks that share this rank's tokens; None, as in ``torch.distributed``: all. All ranks must ask."""
        if split.shards == self.size:
            return None
        if split not in self._groups:
            made: list[Any] = []

            def make(start: int) -> None:
                made.append(dist.new_group([*range(start, start + split.shards)], timeout=BEHIND))

            for start in range(0, split.groups * split.shards, split.shards):
                self._made(made, partial(make, start))
            self._groups[split] = made
        number = self.rank // split.shards
        return self._groups[split][number] if number < split.groups else None

    def rates(self, rows: int = ROWS, width: int = WIDTH) -> Rates:
        """The rates of the slowest rank, in a product as in the blocks and in an all-to-all of its tokens."""

        def ones(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=torch.bfloat16, device=self._device)

        parts, weight, tokens = ones(self.size, 3 * rows // self.size**2, width), ones(width, width), ones(rows, width)
        spent = [self._seconds(lambda: tokens @ weight), self._seconds(lambda: self.all_to_all(parts, None))]
        product, moved = self._slowest(spent)
        return Rates(2 * rows * width * width / product, parts.nbytes * (self.size - 1) / self.size / moved)

    def finish(self) -> None:
        """Wait for the device. Raises DeviceError if another rank has ended meanwhile."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._check(False)

    def abandon(self) -> None:
        """End, without results, what waits on the card for a rank that has ended. For any thread."""
        if self._aborted:
            aborting = threading.Thread(target=_abort, daemon=True)
            aborting.start()
            aborting.join(ABORTED)

    def leave(self) -> None:
        """End the exchanges. Ranks that torchrun started leave together, others at any time."""
        self._groups.clear()
        if self._aborted:
            self.abandon()
        elif dist.is_initialized():
            dist.destroy_process_group()

    def _seconds(self, work: Callable[[], object]) -> float:
        """Seconds of the second call of ``work``; all ranks begin together."""
        work()
        self._slowest([0.0])
        begin = time.perf_counter()
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin

    def _slowest(self, seconds: list[float]) -> list[float]:
        """Each of the ``seconds`` of the slowest rank; waits for all ranks."""
        found: list[float] = self.all_gather(torch.tensor(seconds, device=self._device), None).amax(0).tolist()
        return found

    def _made(self, result: R, exchange: Callable[[], object]) -> R:
        """``result`` after ``exchange``. Raises DeviceError if that fails; torch's own error if memory runs out."""
        self._check(False)
        try:
            exchange()
        except Exception as error:  # of any kind, once another thread has abandoned all exchanges
            self._check(True)
            if "out of memory" in str(error):
                raise
            problem, found = "an exchange between the devices failed", one_line(str(error) or type(error).__name__)
            advice = "NCCL_DEBUG=WARN before the same command (it says more), or the command without --devices"
            raise DeviceError(problem, found=found, next=advice) from error
        return result


_aborting = threading.Lock()


def _abort() -> None:
    with _aborting, suppress(AssertionError, ValueError):  # there is no group any more
        dist.distributed_c10d._abort_process_group()


def _kind(device: torch.device) -> int:
    """A number that is equal for devices that draw the same noise: a card spreads the drawing over its processors."""
    name = device.type
    if name == "cuda":
        card = torch.cuda.get_device_properties(device)
        name = f"{card.name}, {card.multi_processor_count}"
    return zlib.crc32(name.encode())
