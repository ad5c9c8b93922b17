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
from typing import Any, BinaryIO, NoReturn

import torch

from ltxpack.errors import LtxpackError
from ltxpack.reporter import Reporter
from ltxpack.runtime.lines import LineMaker
from ltxpack.runtime.parallel.share import Carried, Ready, Told
from ltxpack.runtime.parallel.team import FAULT, LEFT
from ltxpack.runtime.parallel.worker import Messages, say
from ltxpack.runtime.run import peak_memory
from ltxpack.runtime.session import Session


class Voice(Reporter):
    """What worker ``number`` says, on the stream that ``out`` is; progress is not told."""

    def __init__(self, number: int, out: BinaryIO) -> None:
        self._number, self._out = number, out

    def say(self, message: Any) -> None:
        """One message for the crew."""
        pickle.dump(message, self._out)
        self._out.flush()

    def note(self, message: str) -> None:
        self.say(Told(self._number, "note", message))

    def detail(self, message: str) -> None:
        self.say(Told(self._number, "detail", message))

    def warn(self, message: str) -> None:
        self.say(Told(self._number, "warn", message))


def main() -> int:
    """Until there are no more tasks; the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one gets it too
    signal.signal(signal.SIGTERM, _interrupted)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        messages = Messages(_end_at_once)
        root, settings, number, sharers, threads = messages.next()
        torch.set_num_threads(threads)
        voice = Voice(number, out)
        with Session(root, settings, voice) as session:
            session.process_ends, session.residency.processes = True, sharers
            if session.device.type == "cuda":
                torch.cuda.set_device(session.device)
            maker = LineMaker(session)
            voice.say(Ready(number))
            while (work := messages.next()) is not None:
                voice.say(Carried(number, maker.carry_out(*work)))
            voice.say(f"worker {number} on {session.device}: {peak_memory(session.device)}")
    except LtxpackError as error:
        say(FAULT + error.render().replace("\n", ";"))
        return 1
    except KeyboardInterrupt:
        os._exit(1)  # all is tidy; an interpreter that ends in order takes its time
    except Exception as error:
        say(f"{FAULT}{type(error).__name__}: {str(error).splitlines()[:1]}")
        return 1
    return 0


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
