"""ltxpack: repack LTX-2.3 checkpoints, bake LoRAs into shards, run the video pipeline.

The first use of ``ltxpack.Pipeline`` loads it: the package itself imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltxpack.runtime.pipeline import Pipeline
    from ltxpack.runtime.request import ImageSpec, Request
    from ltxpack.runtime.video import Video

__version__ = "0.1.0"
__all__ = ["ImageSpec", "Pipeline", "Request", "Video", "__version__"]
_MODULES = {"ImageSpec": "request", "Pipeline": "pipeline", "Request": "request", "Video": "video"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ltxpack.runtime.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
