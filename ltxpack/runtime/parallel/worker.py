"""A rank other than 0: makes its share of each video, writes nothing, and ends with rank 0.

As a process it is started by :mod:`team`; torchrun starts others as it starts rank 0.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ltxpack.imports import OF_A_RANK, import_libraries
from ltxpack.runtime.parallel.contract import Next, Tell
from ltxpack.runtime.parallel.devices import Launched
from ltxpack.runtime.parallel.exchange import Exchange, store_in
from ltxpack.runtime.parallel.process import run_worker
from ltxpack.runtime.parallel.ranks import Member, Numerics
from ltxpack.runtime.parallel.team import DECODE, EXPLAINED, READY, Joining
from ltxpack.runtime.recipe_run import decode_share, latents_of
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.text.prompt_cache import Contexts
from ltxpack.runtime.weights.plan import Work


class Follower(Member):
    """A rank other than 0. ``next()`` is what rank 0 says next."""

    def __init__(self, next: Callable[[], Any], parallel: str, size: int, session: Session) -> None:
        super().__init__(parallel, size, session.transformer_config, session.dtype)
        self.next, self._session = next, session
        session.ranks = self

    @contextmanager
    def together(self, work: Work, numerics: Callable[[], Numerics], *arguments: Any) -> Iterator[None]:
        self.choose(work)
        yield

    def contexts(self, make: Callable[[], Contexts]) -> Contexts:
        return [context.map(lambda tensor: tensor.to(self._session.device)) for context in self.next()]

    def follow(self, exchange: Exchange) -> None:
        """Make this rank's share of every video, until rank 0 has no more."""
        session, made = self._session, None
        self.joined(exchange, session.device)
        while (work := self.next()) is not None:
            if work != DECODE:
                numerics, *asked = work
                session.adopt(numerics)
                made = latents_of(session, *asked)
            elif made is not None:
                decode_share(session, exchange.broadcast(made.video.contiguous(), 0), self.tiles)
        exchange.leave()


def follow_torchrun(root: Path, settings: SessionSettings, launch: Launched) -> None:
    """Be a rank other than 0 that torchrun started, until rank 0 has no more work. Raises LtxpackError."""
    with Session(root, settings) as session:
        import_libraries(OF_A_RANK)
        exchange = Exchange(None, launch.rank, launch.size, session.device, lambda failed: None)
        Follower(exchange.say, settings.parallel, launch.size, session).follow(exchange)


def work(joining: Joining, next: Next, tell: Tell) -> None:
    """Follow rank 0 until it has no more work."""
    rank, place = joining.rank, joining.place
    size = rank.sharers
    with rank.session(libraries=OF_A_RANK) as session:
        follower = Follower(next, joining.parallel, size, session)
        tell(READY)
        if next() is not None:  # rank 0 joins when it has something to make
            follower.follow(Exchange(store_in(place, size), rank.number, size, session.device, _left_to_rank_0))
    shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    """As a process; the exit status."""
    return run_worker(work, _leave)


def _left_to_rank_0(failed: bool) -> None:
    """Another rank may have ended. Rank 0 ends this one too, and is to be told by the other why, not by this one."""
    if failed:
        time.sleep(2 * EXPLAINED)


def _leave(joining: Joining) -> None:
    """End at once: rank 0 is gone, and with it who removes the folder where the ranks met."""
    shutil.rmtree(joining.place, ignore_errors=True)
    os._exit(1)
