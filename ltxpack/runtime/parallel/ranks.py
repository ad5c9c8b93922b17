"""The processes that make one video together, as one of them sees them.

Every rank runs the same recipe on its own device, with all weights of its own. What they exchange is written here and
nowhere else: rank 0 hands out requests and text contexts, and the passes of a guided step are shared out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltxpack.runtime.model.model import DiT, Pass
from ltxpack.runtime.sampling.guidance import Model
from ltxpack.runtime.sampling.shape import AV

Contexts = list[AV[Tensor]]


class Alone:
    """One process on one device: nothing is handed out."""

    def together(self, *work: Any) -> AbstractContextManager[None]:
        """A block in which all ranks do ``work``. If it fails, the others are of no use any more."""
        return nullcontext()

    def contexts(self, make: Callable[[], Contexts]) -> Contexts:
        """The text contexts that rank 0 gets from ``make``, on this rank's device."""
        return make()

    def front(self, model: DiT) -> Model:
        """``model`` as a denoiser is to use it."""
        return model

    def close(self) -> None:
        """The session is over, for all ranks."""


ALONE = Alone()


class GuidanceFront:
    """Shares out the passes of a guided step: each is made by one rank and sent to all.

    The arithmetic of a pass does not depend on which others are made with it, so the velocities are those of one
    device, bit for bit. A single pass is made by every rank, without an exchange.
    """

    def __init__(self, model: DiT, rank: int, size: int, check: Callable[[bool], None]) -> None:
        """``check(failed)`` raises where another rank has ended; ``failed``: an exchange says that one has."""
        self._model, self._rank, self._size, self._check = model, rank, size, check

    def passes(self, passes: Sequence[Pass], /) -> list[AV[Tensor]]:
        """As :meth:`.model.DiT.passes`. Raises what ``check`` raises."""
        if len(passes) == 1:
            return self._model.passes(passes)
        own = [each for number, each in enumerate(passes) if number % self._size == self._rank]
        made = iter(self._model.passes(own) if own else [])
        return [
            self._sent(next(made), number % self._size)
            if number % self._size == self._rank
            else self._received(each, number % self._size)
            for number, each in enumerate(passes)
        ]

    def _sent(self, velocities: AV[Tensor], owner: int) -> AV[Tensor]:
        return velocities.map(lambda velocity: self._exchanged(velocity.contiguous(), owner))

    def _received(self, each: Pass, owner: int) -> AV[Tensor]:
        def room(stream: Any, config: Any) -> Tensor:
            like = stream.latents
            return self._exchanged(like.new_empty((*like.shape[:2], config.out_channels)), owner)

        return each.streams.map(room, self._model.config.streams)

    def _exchanged(self, tensor: Tensor, owner: int) -> Tensor:
        self._check(False)
        try:
            dist.broadcast(tensor, src=owner)
        except RuntimeError:
            self._check(True)
            raise
        return tensor


def meeting_place(port: int = 0) -> Any:
    """Where the ranks of this machine meet: at ``port``, or newly opened by rank 0, whose ``port`` the others need."""
    # Not imported above: a torch without torch.distributed has none, and makes videos on one device.
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    return store("127.0.0.1", port, is_master=port == 0, wait_for_workers=False)


def join(store: Any, rank: int, size: int, device: torch.device) -> None:
    """Become one of ``size`` ranks, which wait for each other here: by NCCL on cards, by gloo on the CPU."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or gloo looks for the machine's name in the network
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
