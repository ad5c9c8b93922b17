"""What the planner is asked for a video of the recipe hq, and placements that it could answer with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from ltxpack.runtime.overlay import official_transformers
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import HQ
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.weights.plan import FILE, HOST, Placement, Work, held_blocks, spread
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


def of_blocks(count: int) -> dict[str, Placement]:
    """Every kind of placement of a module with ``count`` blocks, by its name."""
    every = frozenset(range(count))
    return {
        "ahead": Placement(ahead=True),
        "kept in memory": Placement(HOST),
        "every block from memory": Placement(source=HOST, streamed=every),
        "some blocks from memory": Placement(source=HOST, streamed=frozenset({1, 3, count - 1})),
        "every block from the file": Placement(source=FILE, streamed=every),
        "some blocks from the file": Placement(source=FILE, streamed=frozenset({0, 2, 4})),
        "all in memory, some streamed": Placement(HOST, HOST, frozenset({0, 1, 3})),
        "some from memory, some held": Placement(FILE, HOST, frozenset({1, 3, count - 1}), frozenset({0, 1, 3})),
        "some from the file, some held": Placement(FILE, FILE, frozenset({0, 2, 3, 4}), frozenset({1, 2})),
    }


def digests(folder: Path) -> dict[Path, str]:
    """The hashes of the weight files in ``folder``."""
    return {path: blake3(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
