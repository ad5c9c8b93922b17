"""Chooses an overlay's inputs: what SOURCE and the flags name, and the parts beside a checkpoint. Fetches no weights.

The rules are those of DESIGN, "Commands": a folder's one matching file, the hub's default names, a flag's file,
folder, name within SOURCE, or REPO[@REV][/FILE]. It looks for all inputs before one error names every fault.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ltxpack.errors import (
    MAX_LISTED,
    FormatError,
    LtxpackError,
    OtherFormatError,
    SourceError,
    UnsupportedError,
    UsageError,
    listed,
    quoted,
)
from ltxpack.files.foreign import ARCHIVE, WEIGHT_FORMATS
from ltxpack.ltx23.classes import TEXT_ENCODER_TYPE
from ltxpack.ltx23.contents import described
from ltxpack.ltx23.forms import ALL, PLAIN, ROOT, TOLD, read_linears, refuse_quantised, root_and_parts
from ltxpack.ltx23.releases import CHECKPOINT, DEFAULT_FILES, LORA, PATTERNS, TEXT_ENCODER, TEXT_ENCODER_REPO, UPSAMPLER
from ltxpack.ltx23.text_encoder import TEXT_ONLY_TYPE, root_of
from ltxpack.manifest import is_overlay
from ltxpack.materialize.access import (
    OTHER_WEIGHTS,
    WEIGHTS,
    Access,
    InputFile,
    InputFolder,
    find_input,
    folder_of,
    hub_folder,
    local_folder,
)
from ltxpack.materialize.checkpoint import AGAIN, MADE_OF, read_lora, take_instead
from ltxpack.materialize.parts import PIECES, Part, lacking, pieces_of, shard_names

FLAGS = {role: "--" + role.replace("_", "-") for role in (CHECKPOINT, LORA, UPSAMPLER, TEXT_ENCODER)}
# Role -> the start of `described` for a suitable file.
KINDS = {CHECKPOINT: ("a whole checkpoint", "the transformer"), LORA: ("a LoRA",), UPSAMPLER: ("a latent upsampler",)}
DIFFUSERS_MARKS = ("model_index.json", "transformer/config.json")
# ComfyUI's folders for the parts of a model, below one folder.
COMFYUI_FOLDERS = ("diffusion_models", "unet", "checkpoints", "vae", "text_encoders", "clip")

_SAYS_QUANTISED = re.compile(r"fp8|fp4|int8|int4|nf4|bnb|gptq|awq", re.IGNORECASE)

S = TypeVar("S")
T = TypeVar("T")


class SeveralFaultsError(SourceError):
    """The faults of several inputs, each with its own list of limited length."""

    max_listed = len((CHECKPOINT, LORA, UPSAMPLER, TEXT_ENCODER)) * MAX_LISTED


class AmbiguousError(SourceError):
    """Several files are suitable, so that none is chosen, even if the input may be missing."""


@dataclass
class InputFaults:
    """Gathers the faults of several inputs in one error. ``found``: by role."""

    found: dict[str, LtxpackError] = field(default_factory=dict)

    def gather(self, role: str, read: Callable[[S], T], given: S | None) -> T | None:
        """The result of ``read``; if it raises, None, and keeps the fault. None too if nothing is ``given``."""
        try:
            return read(given) if given else None
        except UsageError:
            raise
        except LtxpackError as fault:
            self.found[role] = fault
            return None

    def refuse(self) -> None:
        """Raise the faults: one unchanged, several as one SourceError."""
        faults = [self.found[role] for role in FLAGS if role in self.found]
        if len(faults) == 1:
            raise faults[0]
        if faults:
            items = [line for fault in faults for line in _told(fault, MAX_LISTED // 2)]
            raise SeveralFaultsError("several inputs cannot be used", items=items, next=_all_next(faults))


@dataclass(frozen=True)
class Sources:
    """The inputs that were found. ``checkpoint``: its parts, at first the file that names it.

    ``lora``: also None for a distilled checkpoint, unless it was named. ``missing``: role -> reason, only if the caller
    allows missing inputs. ``faults``: those of the other inputs, and of a checkpoint that cannot be read.
    """

    checkpoint: tuple[Part, ...]
    lora: InputFile | None
    upsampler: InputFile | None
    text_encoder: InputFolder | None
    missing: Mapping[str, str]
    faults: InputFaults


def resolve(
    source: str,
    flags: Mapping[str, str | None],
    access: Access,
    *,
    parts: Sequence[str] = (),
    revision: str | None = None,
    allow_missing: bool = False,
) -> Sources:
    """The files that SOURCE and the flags (by role) name; ``parts``: more files of the checkpoint.

    ``allow_missing``: lists missing inputs other than the checkpoint; an ambiguous input stays a fault. Raises
    UsageError for flags that contradict one another, SourceError for an unusable SOURCE or part, and for a checkpoint
    and a LoRA that are swapped.
    """
    folder, single = open_source_folder(source, revision, access)
    if single is not None and flags.get(CHECKPOINT):
        advice = "give the folder as SOURCE, or leave --checkpoint out"
        raise UsageError("the checkpoint is named twice", expected="SOURCE or --checkpoint", found="both", next=advice)
    further = [*{part.path: part for part in (_part(typed, access, folder) for typed in parts)}.values()]
    faults = InputFaults()

    def chosen(role: str) -> InputFile:
        typed = flags.get(role)
        found = folder if typed is None else find_input(typed, access, within=folder)
        return choose(role, found, access) if isinstance(found, InputFolder) else found

    base = single or faults.gather(CHECKPOINT, chosen, CHECKPOINT)
    checkpoint = faults.gather(CHECKPOINT, lambda file: find_parts(file, further, access), base)
    needless = flags.get(LORA) is None and base is not None and base.distilled_by
    lora = faults.gather(LORA, chosen, None if needless else LORA)
    if base is not None and lora is not None and checkpoint is None:
        _refuse_swapped(base, lora, access)
    upsampler = faults.gather(UPSAMPLER, chosen, UPSAMPLER)
    encoder = faults.gather(TEXT_ENCODER, lambda role: _text_encoder(flags.get(role), folder, access), TEXT_ENCODER)
    missing = {
        role: " ".join(str(fault).split())
        for role, fault in faults.found.items()
        if allow_missing and role != CHECKPOINT and not isinstance(fault, AmbiguousError)
    }
    for role in missing:
        del faults.found[role]
    return Sources(tuple(checkpoint or ()), lora, upsampler, encoder, missing, faults)


def _refuse_swapped(checkpoint: InputFile, lora: InputFile, access: Access) -> None:
    """Raises SourceError if the LoRA and the checkpoint are swapped."""
    told = [""]
    with contextlib.suppress(LtxpackError):
        told = [described(access.header(file)) or "" for file in (checkpoint, lora)]
    if told[0] in KINDS[LORA] and told[-1].startswith(KINDS[CHECKPOINT]):
        flags = f"--checkpoint {quoted(lora.label)} --lora {quoted(checkpoint.label)}"
        items = [f"{file.label}: {what}" for file, what in zip((checkpoint, lora), told, strict=True)]
        raise SourceError("the checkpoint and the LoRA are swapped", items=items, next=f"{AGAIN}{flags}")


def part_of(file: InputFile, access: Access) -> Part:
    """A file that may be of a checkpoint, with its header; :func:`.parts.read_parts` does the full check.

    Raises UnsupportedError with the file to take instead for another format, codes or a LoRA, and ``access``'s errors.
    """
    refused = functools.partial(UnsupportedError, file=file.label, next=take_instead(file.label))
    try:
        header = access.header(file)
    except OtherFormatError as error:
        if WEIGHT_FORMATS.get(str(error.found), ARCHIVE) == ARCHIVE:
            raise
        raise refused(f"is {error.found}; an overlay is made from bf16 weights in safetensors") from None
    refuse_quantised(header, file.label, MADE_OF, take_instead(file.label))
    if root_and_parts(header)[1] != ALL and read_lora(header).is_lora:
        raise refused("is a LoRA, no checkpoint")
    return Part(file, header)


def _part(typed: str, access: Access, folder: InputFolder) -> InputFile:
    found = find_input(typed, access, within=folder)
    if isinstance(found, InputFolder):
        raise SourceError("is a folder", file=typed, expected="one file of the checkpoint", next=f"{AGAIN}--part FILE")
    return found


def find_parts(checkpoint: InputFile, named: Sequence[InputFile], access: Access) -> list[Part]:
    """The files of the checkpoint: ``checkpoint``, its other shards, the files ``named``, and parts beside it.

    For a transformer alone it finds the other parts in its folder, and in ComfyUI's. Raises SourceError for missing
    shards, AmbiguousError if several files hold one part, and the errors of :func:`part_of`.
    """
    parts = [part_of(checkpoint, access)]
    if shards := shard_names(checkpoint.name):
        beside = _beside(checkpoint, access)
        own = {file.name: file for name, file in beside.files.items() if "/" not in name}
        if missing := [name for name in shards if name not in own]:
            raise SourceError("lacks shards of the checkpoint", file=beside.label, items=missing)
        parts += [part_of(own[name], access) for name in shards if name != checkpoint.name]
    taken = {part.input.path for part in parts}
    parts += [part_of(file, access) for file in named if file.path not in taken]
    wanted = lacking(parts)
    if wanted and ROOT not in wanted:
        parts += _parts_beside(wanted, _beside(checkpoint, access), {part.input.path for part in parts}, access)
    return parts


def _parts_beside(wanted: Sequence[str], beside: InputFolder, taken: Collection[Path], access: Access) -> list[Part]:
    """One file for each ``wanted`` piece of a checkpoint that a file in ``beside`` holds."""
    held: dict[str, list[Part]] = {piece: [] for piece in wanted}
    for file in beside.files.values():
        if file.path not in taken and file.name.lower().endswith(WEIGHTS):
            with contextlib.suppress(LtxpackError):
                part = part_of(file, access)
                pieces = pieces_of(part.header)
                for piece in pieces if pieces and pieces <= set(wanted) else ():
                    held[piece].append(part)
    for piece, parts in held.items():
        if len(parts) > 1:
            parts.sort(key=lambda part: read_linears(part.header).form != PLAIN["BF16"])
            members = [part.input.member for part in parts]
            raise AmbiguousError(
                f"holds several files with {PIECES[piece]}", file=beside.label, items=members,
                next=f"{AGAIN}--part {quoted(members[0])}",
            )  # fmt: skip
    return [*{part.input.path: part for parts in held.values() for part in parts}.values()]


def _beside(file: InputFile, access: Access) -> InputFolder:
    """The folder of ``file``; if it is one of ComfyUI's, with ComfyUI's others."""
    folder, prefix = folder_of(file, access), file.member.rpartition("/")[0]
    if file.repo is None:
        return with_comfyui(folder) if Path(folder.label).resolve().name in COMFYUI_FOLDERS else folder
    found = folder.find(prefix) if prefix else folder
    assert isinstance(found, InputFolder)
    return found


def with_comfyui(folder: InputFolder) -> InputFolder:
    """A local ``folder``, with ComfyUI's folders for parts of a model beside it and in it."""
    own = Path(folder.label).resolve()
    places = {place: way for way in ("..", ".") for place in ((own / way / name).resolve() for name in COMFYUI_FOLDERS)}
    more = {
        f"{way}/{place.name}/{name}": file
        for place, way in places.items()
        if place != own and place.is_dir()
        for name, file in local_folder(place).files.items()
    }
    return InputFolder(folder.label, {**folder.files, **more}, broken=folder.broken)


def open_source_folder(source: str, revision: str | None, access: Access) -> tuple[InputFolder, InputFile | None]:
    """SOURCE as a folder and None; or, if SOURCE is a file, its folder and the file as the checkpoint."""
    found = find_input(source, access, revision=revision)
    return (found, None) if isinstance(found, InputFolder) else (folder_of(found, access), found)


def choose(role: str, folder: InputFolder, access: Access) -> InputFile:
    """The one file of ``folder`` for ``role``. Raises SourceError with the candidates if there is none or several."""
    weights = folder.own(WEIGHTS)
    if folder.repo is not None and DEFAULT_FILES[role] in weights:
        return weights[DEFAULT_FILES[role]]
    others = {name for other in (LORA, UPSAMPLER) if role == CHECKPOINT for name in _matching(weights, PATTERNS[other])}
    candidates = [name for name in _matching(weights, PATTERNS[role]) if name not in others]
    if role == CHECKPOINT and len(candidates) > 1:
        candidates = _whole(candidates, weights, access)
    if len(candidates) == 1:
        return weights[candidates[0]]
    expected, again = f"one file named {PATTERNS[role]}{WEIGHTS}", f"{AGAIN}{FLAGS[role]} "
    if candidates:
        told = {name: _form_of(weights[name], access) if role == CHECKPOINT else "" for name in candidates}
        best = min(candidates, key=lambda name: (told[name] != PLAIN["BF16"], bool(_SAYS_QUANTISED.search(name))))
        raise AmbiguousError(
            f"holds several files that may be the {role}", file=folder.label, expected=expected,
            items=[f"{name} ({told[name]})" if told[name] else name for name in candidates], next=again + quoted(best),
        )  # fmt: skip
    unusable = folder.own(*OTHER_WEIGHTS)
    if unusable and role == CHECKPOINT:
        return unusable[min(unusable)]  # refused later by its form, with a file to take instead
    raise _none_for(role, folder, weights, access)


def _whole(candidates: Sequence[str], weights: Mapping[str, InputFile], access: Access) -> list[str]:
    """``candidates`` without the other shards of a candidate, and without parts that hold no transformer."""
    sets = {name: [shard for shard in shard_names(name) if shard in weights] or [name] for name in candidates}
    first = [name for name in candidates if name == sets[name][0]]
    kept = []
    for name in first:
        with contextlib.suppress(LtxpackError):
            pieces = pieces_of(access.header(weights[name]))
            if pieces and ROOT not in pieces and not shard_names(name):
                continue
        kept.append(name)
    return kept or first


def _form_of(file: InputFile, access: Access) -> str:
    """The form of a file's numbers, in a word; "" for an unreadable file."""
    try:
        return read_linears(access.header(file)).form
    except LtxpackError:
        return ""


def _none_for(role: str, folder: InputFolder, weights: Mapping[str, InputFile], access: Access) -> LtxpackError:
    """The error for a folder without a file for ``role``: names the files there, and those that are suitable."""
    again, expected = f"{AGAIN}{FLAGS[role]} ", f"one file named {PATTERNS[role]}{WEIGHTS}"
    broken = [f"{name}: {why}" for name, why in folder.broken.items() if _matching([name], PATTERNS[role])]
    if broken:
        advice = "fetch the file again; if it is a link that leads nowhere, put the file itself there (cp -L)"
        return SourceError(f"holds no whole file for the {role}", file=folder.label, items=broken, next=advice)
    if role == CHECKPOINT and folder.repo is None and is_overlay(Path(folder.label)):
        problem, run = "is an overlay already", f"ltxpack run {quoted(folder.label)} --prompt TEXT"
        return UnsupportedError(problem, file=folder.label, expected="a folder with a checkpoint", next=run)
    if role == CHECKPOINT and any(name in folder.files for name in DIFFUSERS_MARKS):
        problem = "is a folder in diffusers' layout; an overlay needs the checkpoint that it was converted from"
        return UnsupportedError(problem, file=folder.label, next=take_instead(folder.label))
    fitting = next((quoted(name) for name, file in weights.items() if _fits(role, file, access)), "FILE")
    return SourceError(
        f"holds no file for the {role}", file=folder.label, expected=expected,
        found=listed(sorted(weights)) or "no .safetensors file", next=again + fitting,
    )  # fmt: skip


def _fits(role: str, file: InputFile, access: Access) -> bool:
    """Whether a file with an unusual name is of the kind that ``role`` needs."""
    with contextlib.suppress(LtxpackError):
        told = described(access.header(file)) or ""
        return told.startswith(KINDS[role]) and (role == LORA or told.endswith(TOLD[PLAIN["BF16"]]))
    return False


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    return [name for name in sorted(names) if fnmatch.fnmatchcase(name.lower(), pattern)]


def _text_encoder(typed: str | None, folder: InputFolder, access: Access) -> InputFolder:
    if typed is None and folder.repo is None:
        return _text_encoder_below(folder, access)
    if typed is None:
        return hub_folder(TEXT_ENCODER_REPO, None, access)
    found = find_input(typed, access, within=folder)
    if isinstance(found, InputFolder):
        return found
    # The error below is for a file of a whole folder; that for weights alone names the other files they need.
    if found.repo is None and "config.json" not in folder_of(found, access).files:
        return InputFolder(found.member, {found.name: found})
    raise SourceError(
        "is a file", file=typed, expected="the folder of the text encoder",
        next=f"{AGAIN}{FLAGS[TEXT_ENCODER]} {quoted(str(PurePosixPath(typed).parent))}",
    )  # fmt: skip


def _text_encoder_below(folder: InputFolder, access: Access) -> InputFolder:
    """The one subfolder whose config says gemma3."""
    inners = [name.removesuffix("/config.json") for name in sorted(folder.files) if name.endswith("/config.json")]
    kinds = {inner: _model_type(folder.files[f"{inner}/config.json"], access) for inner in inners}
    candidates = [inner for inner, kind in kinds.items() if kind in (TEXT_ENCODER_TYPE, TEXT_ONLY_TYPE)]
    if len(candidates) == 1:
        found = folder.find(candidates[0])
        assert isinstance(found, InputFolder)
        return found
    again = f"{AGAIN}{FLAGS[TEXT_ENCODER]} "
    if candidates:
        raise AmbiguousError(
            "holds several text encoders", file=folder.label, items=candidates, next=again + quoted(candidates[0])
        )
    raise SourceError(
        "holds no text encoder", file=folder.label,
        expected=f'one subfolder whose config.json says "model_type": "{TEXT_ENCODER_TYPE}"',
        items=[f"{inner} (model_type {kind})" for inner, kind in kinds.items()] + _gemma_alone(folder, access),
        next=again + TEXT_ENCODER_REPO,
    )  # fmt: skip


def _gemma_alone(folder: InputFolder, access: Access) -> list[str]:
    """Files of a text encoder's weights in ``folder``, each with the other files that it needs."""
    told = "weights alone; config.json, tokenizer.json and tokenizer_config.json belong to them"
    weights = folder.own(WEIGHTS, *OTHER_WEIGHTS)
    return [f"{name}: {told}" for name, file in weights.items() if _is_language_model(file, access)]


def _is_language_model(file: InputFile, access: Access) -> bool:
    with contextlib.suppress(LtxpackError):
        return root_of(access.header(file).tensors) is not None
    return "gemma" in file.name.lower()


def _model_type(config: InputFile, access: Access) -> str | None:
    """The model_type of a config.json; None if it has none or is broken (another model's folder)."""
    try:
        document = access.json(config)
    except FormatError:
        return None
    kind = document.get("model_type") if isinstance(document, dict) else None
    return kind if isinstance(kind, str) else None


def _told(fault: LtxpackError, room: int) -> list[str]:
    """One fault of several in at most ``room`` lines: the problem, and below it its list."""
    stated = (("expected", fault.expected), ("found", fault.found))
    facts = [f"{word} {value}" for word, value in stated if value is not None]
    head = f"{fault.file}: {fault.problem}" if fault.file else fault.problem
    below = [f"  {item}" for item in fault.items]
    if len(below) > room - 1:
        below[room - 2 :] = [f"  and {len(below) - room + 2} more"]
    return [", ".join([head, *facts]), *below]


def _all_next(faults: Sequence[LtxpackError]) -> str:
    """What to do about all faults: all flags in one command, and the other remedies as they are.

    A command must stand alone, so remedies without a command come first.
    """
    following = list(dict.fromkeys(fault.next for fault in faults))
    flags = [text.removeprefix(AGAIN) for text in following if text.startswith(AGAIN)]
    commands = [text for text in following if text.startswith("ltxpack ")]
    advice = [text for text in following if not text.startswith((AGAIN, "ltxpack "))]
    return "; ".join([*advice, *([AGAIN + " ".join(flags)] if flags else [])]) or commands[0]
