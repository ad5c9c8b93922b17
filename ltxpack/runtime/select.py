"""Which transformer each stage uses when the user does not say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ltxpack.errors import OverlayError, UsageError, quoted
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.manifest import Bake, Manifest
from ltxpack.runtime.overlay import BASE
from ltxpack.runtime.sampling.recipes import Recipe, stage_flag, stage_label
from ltxpack.runtime.settings import AUTO

CHECKPOINT_ROLE = "checkpoint"


@dataclass(frozen=True)
class TransformerChoice:
    """The transformer of each stage of a recipe; ``note`` says what was picked, and the official choice if another."""

    stages: tuple[str, ...]
    note: str


def choose(manifest: Manifest, recipe: Recipe, asked: Sequence[str], overlay: Path) -> TransformerChoice:
    """The transformers of ``recipe``; ``asked`` says for each stage ``auto``, ``base`` or a bake's name.

    Raises OverlayError where no bake fits or several do, UsageError for an unknown name, or for a stage that the
    recipe does not have.
    """
    check_stages(recipe, asked)
    strengths = _candidates(manifest)
    names = []
    for number in range(len(recipe.stages)):
        name = asked_for(asked, number)
        if name == AUTO:
            name = _automatic(number, recipe, strengths, manifest, overlay)
        elif name != BASE and name not in manifest.bakes:
            raise _unknown(name, manifest, overlay)
        names.append(name)
    official = official_transformers(recipe, is_distilled(manifest))
    found = tuple(f"{DISTILLED}-{strengths[name]:g}" if name in strengths else name for name in names)
    beside = "" if found == official else f" (the official pair is {' and '.join(dict.fromkeys(official))})"
    told = ", ".join(f"{stage_label(number)}: {name}" for number, name in enumerate(names))
    return TransformerChoice(tuple(names), told + beside)


def asked_for(asked: Sequence[str], number: int) -> str:
    """What was asked for stage ``number``."""
    return asked[number] if number < len(asked) else AUTO


def check_stages(recipe: Recipe, asked: Sequence[str]) -> None:
    """Raises UsageError where a transformer was ``asked`` for a stage that ``recipe`` does not have."""
    for number, name in enumerate(asked[len(recipe.stages) :], start=len(recipe.stages)):
        if name != AUTO:
            told = f"--{stage_flag(number)}"
            raise UsageError(f"the recipe {recipe.name} has no {stage_label(number)}", next=f"leave {told} out")


def official_transformers(recipe: Recipe, distilled_base: bool = False) -> tuple[str, ...]:
    """The transformers that the official code takes for the stages, by the usual names of their bakes."""
    found = []
    for stage in recipe.stages:
        rule = stage.transformer
        base = not rule.strengths or (rule.base_if_distilled and distilled_base)
        found.append(BASE if base else f"{DISTILLED}-{rule.strengths[0]:g}")
    return tuple(found)


def is_distilled(manifest: Manifest) -> bool:
    """Whether the base transformer is a distilled one, by the name of its checkpoint."""
    return any(file.role == CHECKPOINT_ROLE and DISTILLED in file.name for file in manifest.source.files)


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


def _automatic(number: int, recipe: Recipe, strengths: Mapping[str, float], manifest: Manifest, overlay: Path) -> str:
    """The transformer of stage ``number`` by the rule of its stage."""
    rule = recipe.stages[number].transformer
    if rule.base_if_distilled and is_distilled(manifest):
        return BASE
    for wanted in rule.strengths:
        fitting = [name for name, strength in strengths.items() if strength == wanted]
        if fitting:
            return _only(fitting, number, overlay)
    if rule.else_base:
        return BASE
    left = [name for name, strength in strengths.items() if strength not in rule.besides]
    if left:
        return _only(left, number, overlay)
    official = [name.removeprefix(f"{DISTILLED}-") for name in official_transformers(recipe) if name != BASE]
    flags = " ".join(f"--strength {strength}" for strength in dict.fromkeys(official))
    raise OverlayError(
        f"holds no bake that {stage_label(number)} could use",
        file=overlay,
        expected=f"a bake of the distilled LoRA at {rule.strengths[0]:g}",
        found=", ".join(manifest.bakes) or "no bakes",
        next=f"ltxpack bake-lora {quoted(overlay)} {flags}",
    )


def _only(names: list[str], number: int, overlay: Path) -> str:
    """The one name. Raises OverlayError if there are several."""
    if len(names) == 1:
        return names[0]
    raise OverlayError(
        f"several bakes could serve as {stage_flag(number)}",
        file=overlay,
        items=sorted(names),
        next=f"ltxpack run {quoted(overlay)} --{stage_flag(number)} {sorted(names)[0]} --prompt TEXT",
    )


def _unknown(name: str, manifest: Manifest, overlay: Path) -> UsageError:
    return UsageError(
        f"there is no bake {name!r}",
        file=overlay,
        items=[BASE, *manifest.bakes],
        next=f"ltxpack inspect {quoted(overlay)}",
    )
