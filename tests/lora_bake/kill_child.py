"""Runs a bake in a process of its own that dies by SIGKILL at a given call to the file system."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WATCHED = ("fsync", "rename", "replace", "unlink", "symlink")


def bake_until_killed(overlay: Path, options: dict[str, Any], kill_at: int, answer: Connection) -> None:
    """Bake; before the ``kill_at``-th watched call the process ends. Sends the calls counted if it gets through."""
    from ltxpack.lora_bake import BakeOptions, bake
    from ltxpack.reporter import SilentReporter

    calls = 0

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for name in WATCHED:
        setattr(os, name, watched(getattr(os, name)))
    bake(BakeOptions(overlay, **options), SilentReporter())
    answer.send(calls)
