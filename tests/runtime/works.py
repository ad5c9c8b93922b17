"""What the planner is asked for a video of the recipe hq."""

from __future__ import annotations

from collections.abc import Sequence

from ltxpack.runtime.overlay import official_transformers
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import HQ
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.weights.plan import Work

OFFICIAL = official_transformers(HQ)


def hq_work(
    shape: VideoShape, transformers: Sequence[str], steps: int = 15, decode: str = "official", prompts: int = 1
) -> Work:
    """The work of a video of ``shape``."""
    sizes = {"height": shape.height, "width": shape.width, "num_frames": shape.frames, "fps": shape.fps}
    return Request.of("x", **sizes, steps=steps, decode=decode).work(transformers, prompts=prompts)  # type: ignore[misc]
