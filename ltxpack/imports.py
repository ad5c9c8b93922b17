"""Imports of large libraries, without the pauses of Python's cyclic collector.

torch, diffusers and transformers make a million objects that stay until the process ends. The collector would look
through them again and again: while they are made, during the work, and once more before the process ends. Together
that takes as long as half of the imports.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ours = False


def claim_process() -> None:
    """This process is a command or a worker of ltxpack, so that :func:`uncollected` may change it."""
    global _ours  # noqa: PLW0603
    _ours = True


@contextmanager
def uncollected() -> Iterator[None]:
    """In the block the collector is off; it never looks through what exists when the block has imported something.

    A block in which nothing is imported for the first time changes nothing, and neither does one in a process that is
    somebody else's.
    """
    if not _ours:
        yield
        return
    enabled, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if enabled:
            gc.enable()


def main() -> None:
    """``python -m ltxpack.imports MODULE``: the function ``main`` of a module whose imports are large."""
    claim_process()
    with uncollected():
        module = importlib.import_module(sys.argv[1])
    sys.exit(module.main())


if __name__ == "__main__":
    main()
