"""The exchanges between ranks, through ``torch.distributed``: NCCL on cards, gloo on the CPU.

Every rank makes the same exchanges in the same order. Nothing else in the package sends a tensor to another rank.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ltxpack.runtime.parallel.schemes import Rates, Split

R = TypeVar("R")
# How long a rank waits for what rank 0 says next: while that encodes, decodes, or the disk is slow.
PATIENCE = timedelta(days=7)
# Of a product as in the blocks, of as many rows as stage 1 has tokens.
ROWS, WIDTH = 8192, 4096


def meeting_place() -> Path:
    """A new folder that only this user can enter, in which the ranks of this machine find each other. Remove it."""
    return Path(tempfile.mkdtemp(prefix="ltxpack-ranks-"))


def store_in(place: Path, size: int) -> Any:
    """What ``size`` ranks tell each other, in a file of the folder ``place``."""
    # Not imported above: a torch without torch.distributed has none, and makes videos on one device.
    store: Any = dist.FileStore  # type: ignore[attr-defined]
    return store(str(place / "store"), size)


class Exchange:
    """What rank ``rank`` of ``size`` sends to and gets from the others.

    ``check(failed)`` raises where another rank has ended; ``failed``: an exchange says that one has.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, check: Callable[[bool], None]) -> None:
        """Joins the others, and waits for all of them to join. ``store``: None for ranks that torchrun started."""
        self.rank, self.size, self._device, self._check = rank, size, device, check
        self._groups: dict[Split, list[Any]] = {}
        if store is None and device.type == "cuda":
            torch.cuda.set_device(device)
        if store is not None or size == int(os.environ["LOCAL_WORLD_SIZE"]):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or gloo looks for the machine's name in the network
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
        self._talk = dist.new_group(backend="gloo", timeout=PATIENCE) if store is None else None

    def say(self, message: Any = None) -> Any:
        """What rank 0 says, on all ranks that torchrun started; the others wait for it."""
        said = [message]
        return self._made(said, lambda: dist.broadcast_object_list(said, src=0, group=self._talk))[0]

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """``tensor`` with what it holds on rank ``owner``, on all ranks."""
        return self._made(tensor, lambda: dist.broadcast(tensor, src=owner))

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send ``tensor`` to one ``rank``, which waits for it."""
        self._made(tensor, lambda: dist.send(tensor, rank))

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        """``tensor`` with what ``rank`` sends."""
        return self._made(tensor, lambda: dist.recv(tensor, rank))

    def all_to_all(self, parts: Tensor, group: Any) -> Tensor:
        """``parts`` [ranks, ...], one for each rank of ``group`` -> what each has for this one, [ranks, ...]."""
        got = torch.empty_like(parts)
        return self._made(got, lambda: dist.all_to_all_single(got, parts, group=group))

    def all_gather(self, part: Tensor, group: Any) -> Tensor:
        """``part`` [...] of each rank of ``group``, in their order: [ranks, ...]."""
        got = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        return torch.stack(self._made(got, lambda: dist.all_gather(got, part, group=group)))

    def group(self, split: Split) -> Any:
        """The ranks that share this rank's tokens; None: all, as ``torch.distributed`` has it. All ranks ask."""
        if split.shards == self.size:
            return None
        if split not in self._groups:
            starts = range(0, split.groups * split.shards, split.shards)
            made: list[Any] = []

            def make(start: int) -> None:
                made.append(dist.new_group([*range(start, start + split.shards)]))

            for start in starts:
                self._made(made, partial(make, start))
            self._groups[split] = made
        number = self.rank // split.shards
        return self._groups[split][number] if number < split.groups else None

    def rates(self, rows: int = ROWS, width: int = WIDTH) -> Rates:
        """Those of the slowest rank: of a product as in the blocks, and of an all-to-all of its tokens."""

        def ones(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=torch.bfloat16, device=self._device)

        parts, weight, tokens = ones(self.size, 3 * rows // self.size**2, width), ones(width, width), ones(rows, width)
        spent = [self._seconds(lambda: tokens @ weight), self._seconds(lambda: self.all_to_all(parts, None))]
        product, moved = self._slowest(spent)
        return Rates(2 * rows * width * width / product, parts.nbytes * (self.size - 1) / self.size / moved)

    def leave(self) -> None:
        """No more exchanges."""
        self._groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _seconds(self, work: Callable[[], object]) -> float:
        """Of the second call; all ranks begin together."""
        work()
        self._slowest([0.0])
        begin = time.perf_counter()
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin

    def _slowest(self, seconds: list[float]) -> list[float]:
        """The largest of each of the ``seconds`` of all ranks; waits for all of them."""
        largest = torch.tensor(seconds, device=self._device)
        found: list[float] = self._made(largest, lambda: dist.all_reduce(largest, dist.ReduceOp.MAX)).tolist()
        return found

    def _made(self, result: R, exchange: Callable[[], object]) -> R:
        self._check(False)
        try:
            exchange()
        except RuntimeError:
            self._check(True)
            raise
        return result
