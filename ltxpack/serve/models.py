"""The models of a server: names that pick a recipe and the transformers of its stages.

``ltx-2.3-hq`` is the recipe with the bakes that ``auto`` takes. ``ltx-2.3-hq+style`` takes the bakes in which the LoRA
``style`` is stacked, ``ltx-2.3-hq+style-0.8`` those with this strength; ``-fp8`` or ``-int8`` at the end takes bakes in
that form. Whoever runs the server can add names for other pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ltxpack.errors import OverlayError, UsageError, quoted
from ltxpack.manifest import BF16, FORMATS
from ltxpack.runtime.overlay import BASE, Overlay, Stack, choose, form_of, stacks
from ltxpack.runtime.sampling.recipes import HQ, RECIPES, Recipe
from ltxpack.runtime.settings import AUTO, recipe_named

GENERATION = "ltx-2.3"
NAMED = "NAME=RECIPE, or NAME=RECIPE:STAGE1,STAGE2 with bakes of the overlay or base"
MAX_NAME = 200


@dataclass(frozen=True)
class ServedModel:
    """A name that a request may say: the recipe, and the transformer of each of its stages."""

    name: str
    recipe: str
    stages: tuple[str, ...]


def served_models(overlay: Overlay, form: str = BF16, named: Sequence[str] = ()) -> dict[str, ServedModel]:
    """The models that ``overlay`` can serve, the usual ones first; of bakes in several forms those in ``form``.

    ``named`` are further ones as ``NAME=RECIPE:STAGE1,STAGE2``. Raises OverlayError where there is none, UsageError for
    one that cannot be.
    """
    found = {model.name: model for model in (*_automatic(overlay, form), *_other_bakes(overlay))}
    for text in named:
        model = _named(overlay, form, text)
        found[model.name] = model
    if not found:
        strengths = " ".join(f"--strength {strength:g}" for strength in HQ.strengths)
        advice = f"ltxpack bake-lora {quoted(overlay.root)} {strengths}"
        raise OverlayError("holds no bake that a recipe could use", file=overlay.root, next=advice)
    return found


def _automatic(overlay: Overlay, form: str) -> Iterator[ServedModel]:
    """Of each recipe: by the rules of ``auto``, from each stack of LoRAs, and in each form that there is."""
    found = [stack for stack in stacks(overlay.manifest) if stack]
    names = {stack: _stack_names(overlay, stack) for stack in found}
    short = Counter(pair[0] for pair in names.values())
    choices: list[tuple[str, Stack | None]] = [("", None)]
    for stack, (brief, full) in names.items():
        choices += [(f"+{word}", stack) for word in ((brief, full) if short[brief] == 1 else (full,))]
    for ending, taken in choices:
        for recipe in RECIPES.values():
            for other in (form, *(one for one in FORMATS if one != form)):
                stages = _stages(overlay, recipe, other, taken)
                if stages and (other == form or other in {form_of(overlay.manifest, name) for name in stages}):
                    suffix = "" if other == form else f"-{other}"
                    yield ServedModel(f"{GENERATION}-{recipe.name}{ending}{suffix}", recipe.name, stages)


def _stages(overlay: Overlay, recipe: Recipe, form: str, stack: Stack | None) -> tuple[str, ...]:
    """The transformers of ``recipe``; none where the overlay lacks one, or has several to choose from."""
    try:
        return choose(overlay, recipe, (), form, stack).stages
    except OverlayError:
        return ()


def _stack_names(overlay: Overlay, stack: Stack) -> tuple[str, str]:
    """``style`` and ``style-0.8``: the LoRAs of a stack, without and with their strengths."""
    bake = overlay.manifest.bakes[next(iter(stacks(overlay.manifest)[stack]))]
    added = bake.loras[:-1]
    return "+".join(lora.name for lora in added), "+".join(f"{one.name}-{one.applied.in_name}" for one in added)


def _other_bakes(overlay: Overlay) -> Iterator[ServedModel]:
    """Bakes without the distilled LoRA, for recipes that take the base in every stage."""
    manifest = overlay.manifest
    stacked = {name for bakes in stacks(manifest).values() for name in bakes}
    recipes = [recipe for recipe in RECIPES.values() if set(_stages(overlay, recipe, BF16, None)) == {BASE}]
    for name, bake in manifest.bakes.items():
        if name not in stacked and not all(lora.idle for lora in bake.loras):
            for recipe in recipes:
                yield ServedModel(f"{GENERATION}-{recipe.name}+{name}", recipe.name, (name,) * len(recipe.stages))


def _named(overlay: Overlay, form: str, text: str) -> ServedModel:
    name, equals, rest = text.partition("=")
    if not equals or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise UsageError("--model does not say which model that is", expected=NAMED, found=text)
    recipe, _, pair = rest.partition(":")
    asked = pair.split(",") if pair else ()
    stages = choose(overlay, recipe_named(recipe), [one or AUTO for one in asked], form).stages
    return ServedModel(name, recipe, stages)
