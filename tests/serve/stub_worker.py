"""A worker that makes files in place of videos: what is said of the queue is shown without weights.

It appends to the file ``STUB_LOG`` what it begins and ends; with ``STUB_FAULT`` it cannot begin. Prompts: ``slow``
waits to be cancelled, ``crash`` dies, ``fail`` fails, ``held`` is made once the file ``STUB_LOG``.go is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

from ltxpack.errors import UsageError
from ltxpack.runtime.parallel.process import run_worker

Tell = Callable[[dict[str, Any]], None]


def log(*words: object) -> None:
    with open(os.environ["STUB_LOG"], "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def is_cancelled(next: Any, job_id: str) -> bool:
    """Whether the server says so within a moment."""
    try:
        return bool(next(timeout=0.01) == {"cancel": job_id})
    except Empty:
        return False


def make(task: dict[str, Any], next: Any, tell: Tell) -> None:
    log("begin", task["id"], os.getpid())
    prompt = task["prompt"]
    if prompt == "crash":
        os._exit(9)
    tell({"progress": 1})
    while prompt == "slow" or (prompt == "held" and not Path(os.environ["STUB_LOG"] + ".go").exists()):
        if is_cancelled(next, task["id"]):
            tell({"cancelled": True})
            log("cancelled", task["id"])
            return
    if prompt == "fail":
        tell({"failed": "too small a card", "code": "server_error", "log": "too small a card"})
        return
    temporary = Path(task["output"]).with_name(f".{Path(task['output']).name}.{os.getpid()}.tmp")
    temporary.write_text(f"{task['id']} {prompt}")
    temporary.rename(task["output"])
    log("end", task["id"])
    tell({"done": {"stage 1": 0.5}})


def work(opening: Any, next: Any, tell: Tell) -> None:
    if "STUB_FAULT" in os.environ:
        raise UsageError(os.environ["STUB_FAULT"], next="choose another device")
    tell({"ready": opening.settings.device})
    while True:
        message = next()
        if "cancel" not in message:
            make(message, next, tell)


def main() -> int:
    return run_worker(work, lambda opening: os._exit(0))
