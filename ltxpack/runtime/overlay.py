"""An overlay for the runtime: its manifest and folders, and a check of their bytes against the manifest.

It also chooses the transformer of each stage of a recipe.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ltxpack.errors import OverlayError, SourceError, UsageError, listed, quoted
from ltxpack.files.reader import hash_file
from ltxpack.ltx23.classes import DISTILLED, LOADED_CLASSES
from ltxpack.ltx23.codes import CODES
from ltxpack.manifest import BAKES, BF16, FORMATS, TEXT_ENCODERS, FileRecord, Manifest, changed_file, read_manifest
from ltxpack.runtime.sampling.recipes import Recipe, TransformerRule, stage_flag, stage_label
from ltxpack.runtime.settings import AUTO, SessionSettings

BASE = "base"
# The usual name of a bake of the distilled LoRA.
BAKED = f"{DISTILLED}-"
STRENGTH = re.compile(re.escape(BAKED) + rf"(?P<strength>\d+(\.\d+)?)(-(?P<form>{'|'.join(CODES)}))?")
# The LoRAs beneath a bake's main one, in order: hash and strength of each.
Stack = tuple[tuple[str, float | str], ...]
# Part of the text path -> its folder within a baked text encoder.
TEXT_PARTS = {"text_encoder": "", "connectors": "connectors"}


def transformer_part(name: str) -> str:
    """The part of the base transformer or a bake."""
    return "transformer" if name == BASE else f"{BAKES}/{name}"


@dataclass(frozen=True)
class Overlay:
    """An overlay folder and its validated manifest.

    ``text``: the folder of a baked text encoder in place of the base's; "" for the base's. ``removed``: the folders of
    bakes that are not there, and whose bakes ``manifest`` leaves out.
    """

    root: Path
    manifest: Manifest
    text: str = ""
    removed: tuple[str, ...] = ()

    @classmethod
    def open(cls, root: Path, text_encoder: str | None = None) -> Overlay:
        """Read the manifest; every file must exist with its size, every component must have its class.

        A bake whose folder is not there counts as not made.
        ``text_encoder``: the name of a baked one, None or ``base`` for the base's. Raises OverlayError, and UsageError
        for an unknown name. :meth:`check` compares contents when a part is used.
        """
        manifest, removed = read_manifest(root).in_place(root)
        text = "" if text_encoder in (None, BASE) else f"{TEXT_ENCODERS}/{text_encoder}"
        if text in removed:
            raise changed_file(root / text, "the folder of a text encoder", "none")
        if text and text_encoder not in manifest.text_encoders:
            known, advice = [BASE, *manifest.text_encoders], f"ltxpack inspect {quoted(root)}"
            raise UsageError(f"there is no text encoder {text_encoder!r}", file=root, items=known, next=advice)
        overlay = cls(root, manifest, text, removed)
        for name, wanted in LOADED_CLASSES.items():
            component = overlay.manifest.components.get(name)
            found = component and component.class_name
            if found != wanted:
                problem = f"component {name} is not what this runtime loads"
                again = f"ltxpack materialize SOURCE {quoted(root)} --force"
                raise OverlayError(problem, file=root, expected=wanted, found=found, next=again)
        for record in overlay.manifest.records():
            overlay._check_size(record)
        return overlay

    def folder(self, part: str) -> Path:
        """The folder of a component, or of a bake ``bakes/NAME``."""
        return self.root / (f"{self.text}/{TEXT_PARTS[part]}" if self.text and part in TEXT_PARTS else part)

    def records(self, part: str) -> tuple[FileRecord, ...]:
        """The files of a component, or of a bake ``bakes/NAME``."""
        if self.text and part in TEXT_PARTS:
            folder = posixpath.normpath(f"{self.text}/{TEXT_PARTS[part]}")
            files = self.manifest.baked[self.text].files
            return tuple(record for record in files if posixpath.dirname(record.path) == folder)
        return self.manifest.baked[part].files if "/" in part else self.manifest.components[part].files

    def check(self, records: Iterable[FileRecord]) -> None:
        """Compare files with the blake3 in the manifest. Raises OverlayError for the first that changed.

        It reads through the page cache, so that the next load does not read the disk again.
        """
        for record in records:
            self._check_size(record)
            path = self.root / record.path
            try:
                digest = hash_file(path, cached=True)
            except SourceError as error:
                raise changed_file(path, "readable", error.problem) from None
            if digest != record.blake3:
                raise changed_file(path, f"blake3 {record.blake3}", f"blake3 {digest}")

    def _check_size(self, record: FileRecord) -> None:
        path = self.root / record.path
        if not path.is_file():
            raise changed_file(path, f"a file of {record.size} bytes", "none")
        size = path.stat().st_size
        if size != record.size:
            raise changed_file(path, f"{record.size} bytes", size)


@dataclass(frozen=True)
class TransformerChoice:
    """The transformer of each stage of a recipe; ``note`` names them, and the official ones if they differ."""

    stages: tuple[str, ...]
    note: str


def choose(
    overlay: Overlay, recipe: Recipe, asked: Sequence[str], form: str = BF16, stack: Stack | None = None
) -> TransformerChoice:
    """The transformers of ``recipe``; ``asked`` says for each stage ``auto``, ``base`` or a bake's name.

    If several bakes have one strength, ``auto`` takes the one in ``form``, else the bf16 one, else any. With a
    ``stack`` it takes only bakes with that stack; the one with the distilled LoRA at 0 takes the place of the base.

    Raises OverlayError if no bake fits or several do, or if the base is distilled and the recipe needs the full model;
    UsageError for an unknown name, or for a stage that the recipe does not have.
    """
    asked, manifest, root = asked_stages(recipe, asked), overlay.manifest, overlay.root
    if manifest.distilled and not recipe.stages[0].transformer.base_if_distilled and asked[0] == AUTO:
        problem = f"the recipe {recipe.name} wants the full model for stage 1, and the base is a distilled one"
        expected = "--recipe distilled, or --stage1 base to run the recipe anyway"
        again = f"ltxpack run {quoted(root)} --recipe distilled --prompt TEXT"
        raise OverlayError(problem, file=root, expected=expected, next=again)
    for name in asked:
        if transformer_part(name) in overlay.removed:
            raise changed_file(root / transformer_part(name), "the folder of a bake", "none")
        if name not in (AUTO, BASE, *manifest.bakes):
            known, advice = [BASE, *manifest.bakes], f"ltxpack inspect {quoted(root)}"
            raise UsageError(f"there is no bake {name!r}", file=root, items=known, next=advice)
    candidates = _Candidates.of(overlay, form, stack)
    names = [candidates.pick(recipe, number) if name == AUTO else name for number, name in enumerate(asked)]
    official = official_transformers(recipe, manifest.distilled)
    usual = {name: f"{DISTILLED}-{strength:g}" for name, strength in candidates.strengths.items()}
    usual |= dict.fromkeys(_bases(manifest), BASE)
    found = tuple(usual.get(name, name) for name in names)
    beside = "" if found == official else f" (the official pair is {' and '.join(dict.fromkeys(official))})"
    note = ", ".join(f"{stage_label(number)}: {name}" for number, name in enumerate(names))
    for name in dict.fromkeys(name for name, wanted in zip(names, asked, strict=True) if wanted == AUTO):
        if form_of(manifest, name) != form:
            beside += f"; there is no {form} bake in place of {name}"
    if AUTO in asked and (lost := [folder for folder in overlay.removed if folder.startswith(f"{BAKES}/")]):
        beside += f"; without {listed(lost)}, whose folders were removed"
    return TransformerChoice(tuple(names), note + beside)


def chosen(overlay: Overlay, settings: SessionSettings, recipe: Recipe) -> TransformerChoice:
    """:func:`choose` with the transformers and the form of ``settings``."""
    return choose(overlay, recipe, settings.transformers, settings.format)


def form_of(manifest: Manifest, name: str) -> str:
    """The form of a transformer's linears, one of ``manifest.FORMATS``."""
    return manifest.bakes[name].format if name in manifest.bakes else BF16


def asked_stages(recipe: Recipe, asked: Sequence[str]) -> list[str]:
    """The transformer ``asked`` for each stage. Raises UsageError for a stage that ``recipe`` does not have."""
    count = len(recipe.stages)
    for number, name in enumerate(asked[count:], start=count):
        if name != AUTO:
            missing = f"the recipe {recipe.name} has no {stage_label(number)}"
            raise UsageError(missing, next=f"leave --{stage_flag(number)} out")
    return [*asked, *[AUTO] * count][:count]


def official_transformers(recipe: Recipe, distilled_base: bool = False, form: str = BF16) -> tuple[str, ...]:
    """The official transformers of the stages, by the usual names of their bakes in ``form``."""
    ending = "" if form == BF16 else f"-{form}"

    def official(rule: TransformerRule) -> str:
        if rule.strengths and not (rule.base_if_distilled and distilled_base):
            return f"{DISTILLED}-{rule.strengths[0]:g}{ending}"
        return f"{DISTILLED}-0{ending}" if ending else BASE

    return tuple(official(stage.transformer) for stage in recipe.stages)


def codes_named(name: str) -> str | None:
    """The dtype of the codes of a future bake, by its usual name; None for bf16."""
    found = STRENGTH.fullmatch(name)
    return None if found is None or found["form"] is None else CODES[found["form"]]


def _bases(manifest: Manifest, form: str | None = None) -> list[str]:
    """The bakes that are the base in another form, or only those in ``form``."""
    found = [name for name, bake in manifest.bakes.items() if all(lora.idle for lora in bake.loras)]
    return [name for name in found if form is None or form_of(manifest, name) == form != BF16]


def stacks(manifest: Manifest) -> dict[Stack, dict[str, float]]:
    """Stack -> bakes of the distilled LoRA above it -> the LoRA's strength in each.

    Leaves out bakes that are the base in another form, and those with another strength in some blocks.
    """
    distilled = manifest.lora(DISTILLED)
    found: dict[Stack, dict[str, float]] = {}
    bases = _bases(manifest)
    for name, bake in manifest.bakes.items():
        if distilled is None or name in bases:
            continue
        *added, main = bake.loras
        if main.blake3 == distilled.file.blake3 and not main.blocks:
            found.setdefault(tuple((lora.blake3, lora.stated) for lora in added), {})[name] = main.strength
    return found


@dataclass(frozen=True)
class _Candidates:
    """The transformers that ``auto`` chooses from: bakes of the distilled LoRA -> its strength, and the base or the
    bakes in its place.
    """

    overlay: Overlay
    form: str
    strengths: Mapping[str, float]
    bases: Sequence[str]

    @classmethod
    def of(cls, overlay: Overlay, form: str, stack: Stack | None) -> _Candidates:
        """Bakes with ``stack``; without one, bakes of the distilled LoRA alone, else all if they have one stack."""
        every = stacks(overlay.manifest)
        if stack is None:
            alone = every.get((), next(iter(every.values())) if len(every) == 1 else {})
            return cls(overlay, form, alone, [BASE, *_bases(overlay.manifest, form)])
        strengths = {name: strength for name, strength in every[stack].items() if strength}
        return cls(overlay, form, strengths, [name for name in every[stack] if name not in strengths])

    def pick(self, recipe: Recipe, number: int) -> str:
        """The transformer of stage ``number`` by the rule of its stage. Raises OverlayError."""
        rule, manifest, root = recipe.stages[number].transformer, self.overlay.manifest, self.overlay.root
        base = self._only(self.bases, number) if self.bases else None
        if manifest.distilled and base is not None:
            return base
        for wanted in rule.strengths:
            fitting = [name for name, strength in self.strengths.items() if strength == wanted]
            if fitting:
                return self._only(fitting, number)
        if rule.else_base and base is not None:
            return base
        left = [name for name, strength in self.strengths.items() if strength not in rule.besides]
        if left and not rule.else_base:
            return self._only(left, number)
        problem = f"holds no bake that {stage_label(number)} could use"
        expected = f"a bake of the distilled LoRA at {(*rule.strengths, 0)[0]:g}"
        found = ", ".join(manifest.bakes) or "no bakes"
        flags = " ".join(f"--strength {strength:g}" for strength in recipe.strengths or (0,))
        flags += "" if self.form == BF16 else f" --format {self.form}"
        bake = f"ltxpack bake-lora {quoted(root)} {flags}"
        raise OverlayError(problem, file=root, expected=expected, found=found, next=bake)

    def _only(self, names: Sequence[str], number: int) -> str:
        """The only one of ``names``; of one strength, that in the form, else in the first form that there is.

        Raises OverlayError if several are left.
        """
        if len({self.strengths.get(name) for name in names}) == 1:
            forms = {name: form_of(self.overlay.manifest, name) for name in names}
            first = next(one for one in (self.form, *FORMATS) if one in forms.values())
            names = [name for name in names if forms[name] == first]
        if len(names) == 1:
            return names[0]
        flag, names, root = stage_flag(number), sorted(names), self.overlay.root
        again = f"ltxpack run {quoted(root)} --{flag} {names[0]} --prompt TEXT"
        raise OverlayError(f"several bakes could serve as {flag}", file=root, items=names, next=again)
