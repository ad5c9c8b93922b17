"""The commands from nothing to a video, and which of them are done already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ltxpack.errors import UsageError, quoted
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.manifest import BF16, RULES, Bake
from ltxpack.runtime.overlay import (
    BAKED,
    BASE,
    STRENGTH,
    Overlay,
    asked_stages,
    choose,
    form_of,
    official_transformers,
)
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import Recipe
from ltxpack.runtime.settings import AUTO, SessionSettings, Settings, words
from ltxpack.runtime.weights.report import Command

PUBLISHED = "Lightricks/LTX-2.3"
DEFAULT_FOLDER = Path("out")


def planned_stages(overlay: Overlay | None, recipe: Recipe, session: SessionSettings) -> tuple[str, ...]:
    """The transformers of the stages, as ``run`` takes them; the official ones, which are to be made, without bakes or
    where ``run`` would take none in the form of codes that is asked for.

    Raises OverlayError; UsageError for a name that, without an overlay, does not say how to bake it.
    """
    asked, form = session.transformers, session.format
    if overlay is not None:
        manifest, auto = overlay.manifest, set(asked) == {AUTO}
        official = official_transformers(recipe, manifest.distilled, form)
        if not manifest.bakes and auto and not manifest.distilled:
            return official
        found = choose(overlay, recipe, asked, form).stages
        in_form = form == BF16 or any(form_of(manifest, name) == form for name in found)
        return found if in_form or not auto else official
    pairs = zip(asked_stages(recipe, asked), official_transformers(recipe, form=form), strict=True)
    found = tuple(official if name == AUTO else name for name, official in pairs)
    for name in found:
        if name != BASE and not STRENGTH.fullmatch(name):
            problem = "unknown transformer, without an overlay to look it up in"
            advice = "ltxpack plan OVERLAY (or leave --stage1 and --stage2 out)"
            raise UsageError(problem, expected=f"{BASE}, or {BAKED}S for a strength S", found=name, next=advice)
    return found


def commands(
    stages: Sequence[str], request: Request, session: SessionSettings, overlay: Overlay | None = None, images: int = 0
) -> list[Command]:
    """The commands to the video of ``request`` from nothing, or from an existing ``overlay``.

    ``stages`` may name future bakes. ``images``: the number of images to condition on.
    """
    root = DEFAULT_FOLDER if overlay is None else overlay.root
    bakes = {} if overlay is None else overlay.manifest.bakes
    found = [Command(_materialized(overlay), overlay is not None)]
    names = [name for name in dict.fromkeys(stages) if name != BASE]
    for name in names:
        if name in bakes:
            bake = bakes[name]
            ending = "" if bake.format == BF16 else f" --format {bake.format}"
            found.append(Command(f"{baked(root, bake)}{ending}", True))
    missing: dict[str, str] = {}
    for parts in (STRENGTH.fullmatch(name) for name in names if name not in bakes):
        assert parts is not None, "planned_stages has looked at the names"
        ending = "" if parts["form"] is None else f" --format {parts['form']}"
        missing[ending] = missing.get(ending, "") + f" --strength {parts['strength']}"
    found += [Command(f"ltxpack bake-lora {quoted(root)}{each}{ending}", False) for ending, each in missing.items()]
    name = request.recipe.name
    said = [f"--recipe {name}"] if name != Settings.recipe else []
    said += [*words(request.settings, Settings.of({"recipe": name})), *words(session, SessionSettings())]
    run = " ".join([f'ltxpack run {quoted(root)} --prompt "…"', *said, *["--image FILE"] * images])
    return [*found, Command(run, False)]


def _materialized(overlay: Overlay | None) -> str:
    if overlay is None:
        return f"ltxpack materialize {PUBLISHED} {DEFAULT_FOLDER}"
    source = overlay.manifest.source
    words = ["ltxpack materialize", source.repo or "SOURCE", quoted(overlay.root)]
    if overlay.manifest.distilled:  # not the default of materialize
        words += [f"--checkpoint {quoted(file.name)}" for file in source.files if file.role == "checkpoint"]
    return " ".join(words)


def baked(root: Path, bake: Bake) -> str:
    """The command that makes ``bake``, in bf16."""
    *added, main = bake.loras or (None,)
    words = [f"ltxpack bake-lora {quoted(root)}"]
    words += [] if main is None or main.name == DISTILLED else [f"--lora {quoted(main.file)}"]
    words += [f"--strength {0 if main is None else main.applied}"]
    words += [f"--add {quoted(f'{lora.file}={lora.applied}')}" for lora in added]
    words += [f"--rule {bake.rule}"] if bake.rule != RULES[0] else []
    return " ".join(words)
