"""The process of a worker that makes whole videos: carries out tasks until its standard input is closed.

Started by :mod:`crew`. What it says goes as pickles to standard output, which libraries therefore do not get. If its
input is closed in the middle of a task, it ends as if interrupted, and removes what is half written.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from functools import partial
from typing import Any, BinaryIO, NoReturn

import torch

from ltxpack.errors import LtxpackError
from ltxpack.runtime.lines import LineMaker
from ltxpack.runtime.parallel.share import Carried, Ready, Voice
from ltxpack.runtime.parallel.team import FAULT, LEFT
from ltxpack.runtime.parallel.worker import Messages, say
from ltxpack.runtime.run import peak_memory
from ltxpack.runtime.session import Session


def main() -> int:
    """Until there are no more tasks; the exit status."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the process that started this one gets it too
    signal.signal(signal.SIGTERM, _interrupted)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        messages = Messages(_end_at_once)
        root, settings, number, sharers, only, threads = messages.next()
        torch.set_num_threads(threads)
        tell = partial(_tell, out)
        with Session(root, settings, Voice(number, tell)) as session:
            session.process_ends, session.residency.processes, session.only = True, sharers, only
            if session.device.type == "cuda":
                torch.cuda.set_device(session.device)
            maker = LineMaker(session)
            tell(Ready(number))
            while (work := messages.next()) is not None:
                tell(Carried(number, maker.carry_out(*work)))
            tell(f"worker {number} on {session.device}: {peak_memory(session.device)}")
    except LtxpackError as error:
        say(FAULT + error.render().replace("\n", ";"))
        return 1
    except KeyboardInterrupt:
        os._exit(1)  # all is tidy; an interpreter that ends in order takes its time
    except Exception as error:
        say(f"{FAULT}{type(error).__name__}: {str(error).splitlines()[:1]}")
        return 1
    return 0


def _tell(out: BinaryIO, message: Any) -> None:
    """One message for the crew."""
    pickle.dump(message, out)
    out.flush()


def _interrupted(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_at_once() -> None:
    """Called from the thread that reads the messages: interrupt the main thread, which may be deep in a library."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEFT)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
