"""Rank 0 of ranks that torchrun started, which are taken as they are: its command is the one that is seen.

The others are told by a broadcast what a worker of :mod:`team` is told by its standard input. When a rank ends,
torchrun ends all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ltxpack.errors import DeviceError
from ltxpack.reporter import Reporter
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.parallel.devices import Launched
from ltxpack.runtime.parallel.exchange import Exchange
from ltxpack.runtime.parallel.team import Leader
from ltxpack.runtime.settings import SessionSettings


class TorchrunTeam(Leader):
    """Rank 0. After a failure in the middle of a video the others wait in it for ever, so that it makes no more."""

    def __init__(
        self, launch: Launched, settings: SessionSettings, device: torch.device, config: DiTConfig, reporter: Reporter
    ) -> None:
        here = [f"{device.type}:{number}" for number in range(launch.here)]
        super().__init__(settings, here, launch.size, device, config, reporter)
        self._lost = False

    def close(self) -> None:
        if not self._lost:
            self._begin()
            self._tell(None)
            self.exchange.leave()
            self._lost = True

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Raises DeviceError after a failure."""
        if self._lost:
            problem = "the other ranks were lost with a video that failed"
            raise DeviceError(problem, next="run the same command again; it skips the videos that are done")
        try:
            self._begin()
            yield
        except BaseException:
            self._lost = True
            raise

    def _begin(self) -> None:
        """Join the others, which wait for that."""
        if not self._joined:
            self.joined(Exchange(None, 0, self._size, self._device, lambda failed: None), self._device)
            self._joined = True

    def _tell(self, message: Any) -> None:
        self.exchange.say(message)
