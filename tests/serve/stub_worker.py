"""A worker that makes files in place of videos: what is said of the queue is shown without weights.

It appends to the file ``STUB_LOG`` what it begins and ends; with ``STUB_FAULT`` it cannot begin. Prompts: ``slow``
waits to be cancelled, ``crash`` dies, ``fail`` fails, ``held`` is made once the file ``STUB_LOG``.go is there.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def messages() -> Iterator[dict[str, Any] | None]:
    """What the server says; None where nothing was said for a moment."""
    rest = b""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            data = os.read(0, 65536)
            if not data:
                os._exit(0)
            *lines, rest = (rest + data).split(b"\n")
            yield from map(json.loads, lines)
        else:
            yield None


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


def log(*words: object) -> None:
    with open(os.environ["STUB_LOG"], "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def make(task: dict[str, Any], inbox: Iterator[dict[str, Any] | None]) -> None:
    log("begin", task["id"], os.getpid())
    prompt = task["prompt"]
    if prompt == "crash":
        os._exit(9)
    say(progress=1)
    while prompt == "slow" or (prompt == "held" and not Path(os.environ["STUB_LOG"] + ".go").exists()):
        if next(inbox) == {"cancel": task["id"]}:
            say(cancelled=True)
            log("cancelled", task["id"])
            return
    if prompt == "fail":
        say(failed="too small a card", code="server_error", log="too small a card")
        return
    temporary = Path(task["output"]).with_name(f".{Path(task['output']).name}.{os.getpid()}.tmp")
    temporary.write_text(f"{task['id']} {prompt}")
    temporary.rename(task["output"])
    log("end", task["id"])
    say(done={"stage 1": 0.5})


inbox = messages()
opening = next(message for message in inbox if message)
if "STUB_FAULT" in os.environ:
    say(fault=os.environ["STUB_FAULT"], next="choose another device")
    os._exit(1)
say(ready=opening["settings"]["device"])
for message in inbox:
    if message and "cancel" not in message:
        make(message, inbox)
