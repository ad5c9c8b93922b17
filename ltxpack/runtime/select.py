"""Which transformer each stage uses when the user does not say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ltxpack.errors import OverlayError, UsageError, quoted
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.manifest import Bake, Manifest
from ltxpack.runtime.overlay import BASE

AUTO = "auto"
OFFICIAL_STAGE1 = 0.25
OFFICIAL_STAGE2 = 0.5


@dataclass(frozen=True)
class Choice:
    """The transformers of both stages; ``note`` says what was picked, beside the official pair."""

    stage1: str
    stage2: str
    note: str


def choose(manifest: Manifest, stage1: str, stage2: str, overlay: Path) -> Choice:
    """Resolve ``auto`` (DESIGN, Commands). Raises OverlayError (no fitting bake), UsageError (unknown name)."""
    strengths = _candidates(manifest)
    names = [_first(strengths, overlay) if stage1 == AUTO else _named(manifest, stage1, overlay)]
    names += [_second(strengths, manifest, overlay) if stage2 == AUTO else _named(manifest, stage2, overlay)]
    official = [strengths.get(names[0]) == OFFICIAL_STAGE1, strengths.get(names[1]) == OFFICIAL_STAGE2]
    beside = "" if all(official) else " (the official pair is distilled-0.25 and distilled-0.5)"
    return Choice(names[0], names[1], f"stage 1: {names[0]}, stage 2: {names[1]}{beside}")


def _candidates(manifest: Manifest) -> dict[str, float]:
    """Bake name -> strength of the distilled LoRA: those of it alone, else the stacked ones if all have one suffix."""
    distilled = manifest.lora(DISTILLED)
    if distilled is None:
        return {}
    mains = {name: bake for name, bake in manifest.bakes.items() if bake.loras[-1].blake3 == distilled.file.blake3}
    alone = {name: bake for name, bake in mains.items() if len(bake.loras) == 1}
    if alone:
        return {name: bake.loras[-1].strength for name, bake in alone.items()}
    stacks: dict[tuple[tuple[str, float], ...], dict[str, Bake]] = defaultdict(dict)
    for name, bake in mains.items():
        stacks[tuple((lora.blake3, lora.strength) for lora in bake.loras[:-1])][name] = bake
    if len(stacks) != 1:
        return {}
    return {name: bake.loras[-1].strength for name, bake in next(iter(stacks.values())).items()}


def _first(strengths: Mapping[str, float], overlay: Path) -> str:
    at_quarter = [name for name, strength in strengths.items() if strength == OFFICIAL_STAGE1]
    if len(at_quarter) > 1:
        raise _ambiguous("stage1", at_quarter, overlay)
    return at_quarter[0] if at_quarter else BASE


def _second(strengths: Mapping[str, float], manifest: Manifest, overlay: Path) -> str:
    at_half = [name for name, strength in strengths.items() if strength == OFFICIAL_STAGE2]
    left = [name for name, strength in strengths.items() if strength != OFFICIAL_STAGE1]
    fitting = at_half or left
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise _ambiguous("stage2", fitting, overlay)
    raise OverlayError(
        "holds no bake that stage 2 could use",
        file=overlay,
        expected="a bake of the distilled LoRA at 0.5",
        found=", ".join(manifest.bakes) or "no bakes",
        next=f"ltxpack bake-lora {quoted(overlay)} --strength 0.25 --strength 0.5",
    )


def _ambiguous(stage: str, names: list[str], overlay: Path) -> OverlayError:
    return OverlayError(
        f"several bakes could serve as {stage}",
        file=overlay,
        items=sorted(names),
        next=f"ltxpack run {quoted(overlay)} --{stage} {sorted(names)[0]} --prompt TEXT",
    )


def _named(manifest: Manifest, name: str, overlay: Path) -> str:
    if name == BASE or name in manifest.bakes:
        return name
    raise UsageError(
        f"there is no bake {name!r}",
        file=overlay,
        items=[BASE, *manifest.bakes],
        next=f"ltxpack inspect {quoted(overlay)}",
    )
