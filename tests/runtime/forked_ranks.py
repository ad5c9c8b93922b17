"""Ranks that are forks of the test's process, joined by gloo: for tests that need a model and no overlay."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ltxpack.runtime.parallel.exchange import Exchange


def of_ranks(size: int, work: Callable[[Exchange], Any]) -> list[Any]:
    """What ``work`` returns on each of ``size`` ranks: plain values, no tensors. Fails with what fails on a rank."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            context.Process(target=_child, args=(Path(folder) / "store", rank, size, work, ends[rank][1]))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        try:
            for _, theirs in ends:
                theirs.close()
            answers = [ours.recv() for ours, _ in ends]
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
    faults = [fault for _, fault in answers if fault]
    assert not faults, "\n".join(faults)
    return [value for value, _ in answers]


def _child(store: Path, rank: int, size: int, work: Callable[[Exchange], Any], end: Any) -> None:
    try:
        torch.set_num_threads(1)
        exchange = Exchange(dist.FileStore(str(store), size), rank, size, torch.device("cpu"), lambda failed: None)
        end.send((work(exchange), ""))
        dist.barrier()  # or the first to end takes the others' connections with it
    except BaseException:
        end.send((None, f"rank {rank}: {traceback.format_exc()}"))


class Traffic:
    """Counts what the exchanges of this process move, from now on; see ``moved``."""

    def __init__(self, patch: Any) -> None:
        self.calls: list[str] = []
        self.sent = self.received = 0
        for name in ("broadcast", "all_to_all_single", "all_gather", "all_reduce", "barrier", "send", "recv"):
            patch.setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **more: Any) -> Any:
            self.calls.append(name)
            others = dist.get_world_size(more.get("group")) - 1
            if name == "broadcast":
                owned = more["src"] == dist.get_rank()
                self.sent += given[0].nbytes * others * owned
                self.received += given[0].nbytes * (not owned)
            else:
                assert name == "all_to_all_single"
                part = given[1].nbytes // (others + 1)
                self.sent += part * others
                self.received += part * others
            return plain(*given, **more)

        return counted
