"""The worker that makes whole videos of a prompts file: carries out tasks until it is dismissed.

A process whose input is closed in the middle of a task ends as if interrupted, and removes what is half written.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, NoReturn

from ltxpack.runtime.parallel.contract import Next, Opening, Tell
from ltxpack.runtime.parallel.process import LEFT, run_worker
from ltxpack.runtime.parallel.share import Carried, Left, Ready, Voice
from ltxpack.runtime.run import peak_memory


def main() -> int:
    """As a process, until there are no more tasks; the exit status."""
    signal.signal(signal.SIGTERM, _interrupted)
    return run_worker(work, _end_at_once)


def work(opening: Opening, next: Next, tell: Tell) -> None:
    """Carry out tasks, each with the video that is made next."""
    number = opening.number
    with opening.session(Voice(number, tell)) as session:
        tell(Ready(number, opening.where))
        while (asked := next()) is not None:
            task, following = asked
            tell(Carried(number, task.carry_out(session, following)))
        tell(Left(number, peak_memory(session.device)))


def _interrupted(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_at_once(opening: Any) -> None:
    """Interrupt the main thread, which may be deep in a library; called from the thread that reads messages."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEFT)
    os._exit(1)
