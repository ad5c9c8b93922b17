"""The commands from nothing to a video, and which of them are done already."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ltxpack.errors import UsageError, quoted
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.ltx23.codes import kept_blocks
from ltxpack.ltx23.releases import CHECKPOINT, DEFAULT_FILES, OFFICIAL_REPO, PATTERNS, TEXT_ENCODER, TEXT_ENCODER_REPO
from ltxpack.manifest import BF16, RULES, Bake, usual_name
from ltxpack.runtime.overlay import BAKED, BASE, STRENGTH, Overlay, asked_stages, choose, form_of, official_transformers
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import Recipe
from ltxpack.runtime.settings import AUTO, SessionSettings, Settings, words
from ltxpack.runtime.weights.report import Command
from ltxpack.runtime.weights.sizes import TRANSFORMER, read_configs

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
    found += [Command(_made(overlay, name), True) for name in names if overlay is not None and name in bakes]
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
    """The command that made ``overlay``, with flags for the inputs that it would not take by itself."""
    if overlay is None:
        return f"ltxpack materialize {OFFICIAL_REPO} {DEFAULT_FOLDER}"
    source = overlay.manifest.source
    words = ["ltxpack materialize", source.repo or "SOURCE", quoted(overlay.root)]
    for file in source.files:
        # A checkpoint with a name of its own may be SOURCE itself.
        if file.role in PATTERNS and (source.repo or file.role != CHECKPOINT or overlay.manifest.distilled):
            usual = DEFAULT_FILES[file.role] if source.repo else PATTERNS[file.role]
            elsewhere = f"{file.repo}/" if file.repo not in (None, source.repo) else ""
            if file.repo != source.repo or not fnmatchcase(file.name.lower(), usual):
                words.append(f"--{file.role} {quoted(elsewhere + file.name)}")
    encoders = dict.fromkeys(file.repo for file in source.files if file.role == TEXT_ENCODER)
    words += [f"--text-encoder {repo}" for repo in encoders if repo not in (None, source.repo, TEXT_ENCODER_REPO)]
    return " ".join(words)


def _made(overlay: Overlay, name: str) -> str:
    """The command that made the bake ``name``."""
    bake, words = overlay.manifest.bakes[name], list[str]()
    if name != usual_name([(lora.name, lora.applied) for lora in bake.loras], bake.format):
        words.append(f"--name {quoted(name)}")
    if bake.format != BF16:
        blocks = read_configs(overlay)[TRANSFORMER]["num_layers"]
        kept = sorted(set(range(blocks)).difference(int(linear.split(".")[1]) for linear in bake.quantised))
        words.append(f"--format {bake.format}")
        words += [f"--keep-blocks {','.join(map(str, kept)) or 'none'}"] if tuple(kept) != kept_blocks(blocks) else []
        words += [f"--activations {quoted(bake.calibration.name)}"] if bake.calibration else []
    return " ".join([baked(overlay.root, bake), *words])


def baked(root: Path, bake: Bake) -> str:
    """The command that makes ``bake``, in bf16."""
    *added, main = bake.loras or (None,)
    words = [f"ltxpack bake-lora {quoted(root)}"]
    words += [] if main is None or main.name == DISTILLED else [f"--lora {quoted(main.file)}"]
    words += [f"--strength {0 if main is None else main.applied}"]
    words += [f"--add {quoted(f'{lora.file}={lora.applied}')}" for lora in added]
    words += [f"--rule {bake.rule}"] if bake.rule != RULES[0] else []
    return " ".join(words)
