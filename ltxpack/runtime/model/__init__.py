"""The audio-video transformer, in its own code (spec 06). The model needs torch alone; only loading it needs more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT, Pass, Stream
from ltxpack.runtime.model.rope import RopeTables
from ltxpack.runtime.tuning import Tuning, tune

if TYPE_CHECKING:
    from ltxpack.runtime.model.weights import load_dit

__all__ = ["DiT", "DiTConfig", "Pass", "RopeTables", "Stream", "Tuning", "load_dit", "tune"]


def __getattr__(name: str) -> Any:
    if name == "load_dit":
        from ltxpack.runtime.model.weights import load_dit

        return load_dit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
