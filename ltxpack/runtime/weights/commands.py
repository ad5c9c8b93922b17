"""What to type to get from nothing to a video, and what of it is done already."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ltxpack.errors import UsageError
from ltxpack.manifest import Bake
from ltxpack.runtime.large_tiles import OFFICIAL as OFFICIAL_TILES
from ltxpack.runtime.overlay import BASE, Overlay
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.weights.plan import AUTO, StageWork, Work
from ltxpack.runtime.weights.report import Command

PUBLISHED = "Lightricks/LTX-2.3"
OFFICIAL = ("distilled-0.25", "distilled-0.5")
DISTILLED = "distilled-"
STRENGTH = re.compile(re.escape(DISTILLED) + r"\d+(\.\d+)?")
DEFAULT_FOLDER = Path("out")
USUAL_RULE = "fp32"


@dataclass(frozen=True)
class Wanted:
    """What a run is given beside its prompt; ``stages`` as typed."""

    shape: VideoShape
    steps: int
    images: int
    decode: str
    dtype: str
    residency: str
    stages: tuple[str, str] = (AUTO, AUTO)


def hq_work(
    shape: VideoShape,
    transformers: tuple[str, str],
    steps: int = 15,
    images: int = 0,
    decode: str = OFFICIAL_TILES,
    prompts: int = 1,
    once: bool = False,
) -> Work:
    """The work of the HQ recipe: three passes at half the size, then one pass at the whole."""
    first = StageWork(transformers[0], shape.half(), evaluations=2 * steps + 1, passes=3)
    second = StageWork(transformers[1], shape, evaluations=2 * 3 + 1, passes=1)
    return Work(shape, (first, second), images, decode, prompts, once)


def published_stages(asked: tuple[str, str]) -> tuple[str, str]:
    """The transformers of both stages where there is no overlay yet; the official pair unless ``asked`` otherwise.

    Raises UsageError for a name that says nothing of how to bake it.
    """
    first, second = (usual if name == AUTO else name for name, usual in zip(asked, OFFICIAL, strict=True))
    for name in (first, second):
        if name != BASE and not STRENGTH.fullmatch(name):
            raise UsageError(
                "unknown transformer, without an overlay to look it up in",
                expected=f"{BASE}, or {DISTILLED}S for a strength S",
                found=name,
                next="ltxpack plan OVERLAY (or leave --stage1 and --stage2 out)",
            )
    return first, second


def published_commands(stages: tuple[str, str], wanted: Wanted) -> list[Command]:
    """From nothing, with the transformers ``stages``."""
    baked = tuple(name for name in dict.fromkeys(stages) if name != BASE)
    found = [f"ltxpack materialize {PUBLISHED} {DEFAULT_FOLDER}"]
    found += [_bake(DEFAULT_FOLDER, baked)] if baked else []
    return [Command(text, False) for text in (*found, _run(DEFAULT_FOLDER, wanted))]


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
    words += [f"--rule {bake.rule}"] if bake.rule != USUAL_RULE else []
    return " ".join(words)


def _run(root: Path, wanted: Wanted) -> str:
    shape, usual = wanted.shape, (1088, 1920, 121, 24.0, 15, AUTO, AUTO, "bfloat16", AUTO, OFFICIAL_TILES)
    sizes = (shape.height, shape.width, shape.frames, shape.fps, wanted.steps)
    given = (*sizes, *wanted.stages, wanted.dtype, wanted.residency, wanted.decode)
    flags = ("height", "width", "num-frames", "fps", "steps", "stage1", "stage2", "dtype", "residency", "decode")
    words = [f"--{flag} {value:g}" if isinstance(value, float) else f"--{flag} {value}"
             for flag, value, default in zip(flags, given, usual, strict=True) if value != default]  # fmt: skip
    images = ["--image FILE"] * wanted.images
    return " ".join([f'ltxpack run {shlex.quote(str(root))} --prompt "…"', *words, *images])
