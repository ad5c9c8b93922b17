"""The process of a worker that makes whole videos, started by :mod:`crew`: carries out tasks until it is dismissed.

If its input is closed in the middle of a task, it ends as if interrupted, and removes what is half written.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, NoReturn

import torch

from ltxpack.runtime.libraries import import_libraries
from ltxpack.runtime.parallel.process import LEFT, Next, Tell, run_worker
from ltxpack.runtime.parallel.share import Carried, Ready, Voice
from ltxpack.runtime.run import peak_memory
from ltxpack.runtime.session import Session


def main() -> int:
    """Until there are no more tasks; the exit status."""
    signal.signal(signal.SIGTERM, _interrupted)
    return run_worker(_carry_out, _end_at_once)


def _carry_out(opening: Any, next: Next, tell: Tell) -> None:
    root, settings, number, sharers, only, threads = opening
    torch.set_num_threads(threads)
    with Session(root, settings, Voice(number, tell)) as session:
        session.process_ends, session.residency.processes, session.only = True, sharers, only
        if session.device.type == "cuda":
            torch.cuda.set_device(session.device)
        import_libraries()
        tell(Ready(number))
        while (work := next()) is not None:
            task, following = work
            tell(Carried(number, task.carry_out(session, following)))
        tell(f"worker {number} on {session.device}: {peak_memory(session.device)}")


def _interrupted(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_at_once(opening: Any) -> None:
    """Interrupt the main thread, which may be deep in a library; called from the thread that reads messages."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEFT)
    os._exit(1)
