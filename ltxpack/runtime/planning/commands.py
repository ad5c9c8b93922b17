"""What to type to get from nothing to a video, and what of it is done already."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ltxpack.manifest import Bake
from ltxpack.runtime.overlay import BASE, Overlay
from ltxpack.runtime.planning.modes import AUTO, Work
from ltxpack.runtime.planning.report import Command

PUBLISHED = "Lightricks/LTX-2.3"
OFFICIAL = ("distilled-0.25", "distilled-0.5")
DISTILLED = "distilled-"
DEFAULT_FOLDER = Path("out")


@dataclass(frozen=True)
class Wanted:
    """What a run is given beside its prompt."""

    work: Work
    dtype: str
    residency: str


def official_commands(wanted: Wanted) -> list[Command]:
    """From nothing, with the official pair of strengths."""
    return [
        Command(f"ltxpack materialize {PUBLISHED} {DEFAULT_FOLDER}", False),
        Command(_bake(DEFAULT_FOLDER, OFFICIAL), False),
        Command(_run(DEFAULT_FOLDER, wanted), False),
    ]


def overlay_commands(overlay: Overlay, stages: tuple[str, str], wanted: Wanted) -> list[Command]:
    """For an overlay that is there; ``stages`` may name bakes of it that are not made yet."""
    root = overlay.root
    found = [Command(f"ltxpack materialize {overlay.manifest.source.repo or 'SOURCE'} {shlex.quote(str(root))}", True)]
    bakes = overlay.manifest.bakes
    missing = tuple(name for name in stages if name != BASE and name not in bakes)
    found += [Command(_baked(root, bakes[name]), True) for name in dict.fromkeys(stages) if name in bakes]
    if missing:
        found.append(Command(_bake(root, missing), False))
    return [*found, Command(_run(root, wanted), False)]


def _bake(root: Path, names: tuple[str, ...]) -> str:
    strengths = " ".join(f"--strength {name.removeprefix(DISTILLED)}" for name in names)
    return f"ltxpack bake-lora {shlex.quote(str(root))} {strengths}"


def _baked(root: Path, bake: Bake) -> str:
    *added, main = bake.loras
    words = [f"ltxpack bake-lora {shlex.quote(str(root))} --strength {main.strength:g}"]
    words += [f"--add {shlex.quote(f'{lora.file}={lora.strength:g}')}" for lora in added]
    return " ".join(words)


def _run(root: Path, wanted: Wanted) -> str:
    work, usual = wanted.work, (1088, 1920, 121, 24.0, 15, "bfloat16", AUTO)
    shape = work.shape
    given = (shape.height, shape.width, shape.frames, shape.fps, work.steps, wanted.dtype, wanted.residency)
    flags = ("height", "width", "num-frames", "fps", "steps", "dtype", "residency")
    words = [f"--{flag} {value:g}" if isinstance(value, float) else f"--{flag} {value}"
             for flag, value, default in zip(flags, given, usual, strict=True) if value != default]  # fmt: skip
    images = ["--image FILE"] * work.images
    return " ".join([f'ltxpack run {shlex.quote(str(root))} --prompt "…"', *words, *images])
