"""The process of a rank other than 0: makes its share of each video, writes nothing, and ends with rank 0.

Started by :mod:`team`, which is the only one that can write to its standard input.
"""

from __future__ import annotations

import os
import pickle
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ltxpack.errors import LtxpackError
from ltxpack.runtime.numerics import Numerics
from ltxpack.runtime.parallel.devices import Launched
from ltxpack.runtime.parallel.exchange import Exchange, store_in
from ltxpack.runtime.parallel.ranks import Contexts, Member
from ltxpack.runtime.parallel.team import DECODE, EXPLAINED, FAULT, READY
from ltxpack.runtime.recipe_run import decode_share, latents_of
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.weights.plan import Work


class Messages:
    """What rank 0 writes, in order, up to None, its farewell. If it ends without one, ``abandon`` is called."""

    def __init__(self, abandon: Callable[[], object]) -> None:
        self._abandon = abandon
        self._waiting: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> Any:
        """The next message, once it is there."""
        return self._waiting.get()

    def _read(self) -> None:
        message: Any = ...
        while message is not None:
            try:
                message = pickle.load(sys.stdin.buffer)
            except (EOFError, OSError, pickle.UnpicklingError):
                self._abandon()
                return
            self._waiting.put(message)


class Follower(Member):
    """A rank other than 0."""

    def __init__(self, next: Callable[[], Any], parallel: str, size: int, session: Session) -> None:
        """``next()``: what rank 0 says next."""
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
        exchange = Exchange(None, launch.rank, launch.size, session.device, lambda failed: None)
        Follower(exchange.say, settings.parallel, launch.size, session).follow(exchange)


def main() -> int:
    """Until rank 0 has no more work; the exit status."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # rank 0 gets it too, and this one tidies up behind it
    root, settings, rank, size, parallel, place, threads = pickle.load(sys.stdin.buffer)
    messages = Messages(partial(_leave, place))
    torch.set_num_threads(threads)
    try:
        with Session(root, settings) as session:
            session.residency.processes = size
            follower = Follower(messages.next, parallel, size, session)
            say(READY)
            if messages.next() is not None:  # rank 0 joins when it has something to make
                follower.follow(Exchange(store_in(place, size), rank, size, session.device, _left_to_rank_0))
    except LtxpackError as error:
        say(FAULT + error.render().replace("\n", ";"))
        os._exit(1)
    except Exception as error:
        say(f"{FAULT}{type(error).__name__}: {str(error).splitlines()[:1]}")
        os._exit(1)
    shutil.rmtree(place, ignore_errors=True)
    return 0


def _left_to_rank_0(failed: bool) -> None:
    """Another rank may have ended. Rank 0 ends this one too, and is to be told by the other why, not by this one."""
    if failed:
        time.sleep(2 * EXPLAINED)


def _leave(place: Path) -> None:
    """Rank 0 is gone, and with it who removes the folder ``place``."""
    shutil.rmtree(place, ignore_errors=True)
    os._exit(1)


def say(line: str) -> None:
    """One line for the process that started this one."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
