"""What the planner is asked for a video of the recipe hq, and placements that it could answer with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ltxpack.runtime.overlay import official_transformers
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import HQ
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.weights.plan import FILE, Placement, Work, held_blocks, spread
from ltxpack.runtime.weights.sizes import SMALL_PARTS, TEXT_ENCODER

OFFICIAL = official_transformers(HQ)


def hq_work(
    shape: VideoShape, transformers: Sequence[str], steps: int = 15, decode: str = "official", prompts: int = 1
) -> Work:
    """The work of a video of ``shape``."""
    sizes = {"height": shape.height, "width": shape.width, "num_frames": shape.frames, "fps": shape.fps}
    return Request.of("x", **sizes, steps=steps, decode=decode).work(transformers, prompts=prompts)  # type: ignore[misc]


def placements(
    transformer: Placement,
    small: str = FILE,
    text: str = "",
    *,
    blocks: int,
    layers: int,
    streamed: Sequence[int] = (0, 0),
    held: Sequence[int] = (0, 0),
) -> Mapping[str, Placement]:
    """A placement for every part; of both official transformers so many of the ``blocks`` are streamed and held."""
    found = {part: Placement(small) for part in SMALL_PARTS}
    found[TEXT_ENCODER] = Placement(source=text, streamed=frozenset(range(layers if text else 0)))
    for name, some, kept in zip(OFFICIAL, streamed, held, strict=True):
        numbers = spread(some, blocks)
        found[f"bakes/{name}"] = replace(transformer, streamed=numbers, held=held_blocks(numbers, kept, blocks))
    return found
