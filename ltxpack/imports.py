"""Imports of large libraries, without the pauses of Python's cyclic collector.

torch, diffusers and transformers make a million objects that stay until the process ends. The collector would look
through them again and again: while they are made, during the work, and once more before the process ends. Together
that takes as long as half of the imports.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# The libraries of all parts but the transformer: module -> its names for a video, and for what a rank other than 0
# makes beside its share of a step: pictures.
OF_A_VIDEO = {
    "diffusers": ("AutoencoderKLLTX2Audio", "AutoencoderKLLTX2Video"),
    "diffusers.pipelines.ltx2": ("LTX2LatentUpsamplerModel", "LTX2TextConnectors", "LTX2VocoderWithBWE"),
    "transformers": ("Gemma3TextModel", "PreTrainedTokenizerFast"),
}
OF_A_RANK = {"diffusers": ("AutoencoderKLLTX2Video",)}

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


def import_libraries(names: Mapping[str, tuple[str, ...]] = OF_A_VIDEO) -> None:
    """Import them before the clock of a video runs: both libraries import a module when its name is first used.

    Whoever loads a part imports its class then. Until then a command has not waited for diffusers and transformers,
    which take two seconds: commands that fail, and processes that only hand out work, never do.
    """
    with uncollected():
        for module, wanted in names.items():
            for name in wanted:
                getattr(importlib.import_module(module), name)


def main() -> None:
    """``python -m ltxpack.imports MODULE``: the function ``main`` of a module whose imports are large."""
    claim_process()
    with uncollected():
        module = importlib.import_module(sys.argv[1])
    sys.exit(module.main())


if __name__ == "__main__":
    # In the module of that name, whose other functions the worker uses.
    importlib.import_module("ltxpack.imports").main()
