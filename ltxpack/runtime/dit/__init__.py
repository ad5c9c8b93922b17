"""The audio-video transformer, in its own code (spec 06). The model needs torch alone; only loading it needs more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ltxpack.runtime.dit.config import DiTConfig
from ltxpack.runtime.dit.model import DiT, Pass, Stream
from ltxpack.runtime.dit.rope import RopeTables
from ltxpack.runtime.dit.tuning import Tuning, tune

if TYPE_CHECKING:
    from ltxpack.runtime.dit.weights import load_dit

__all__ = ["DiT", "DiTConfig", "Pass", "RopeTables", "Stream", "Tuning", "load_dit", "tune"]


def __getattr__(name: str) -> Any:
    if name == "load_dit":
        from ltxpack.runtime.dit.weights import load_dit

        return load_dit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
