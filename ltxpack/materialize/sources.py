"""What the user named -> which files it is: on this machine or on the hub. Nothing large is read or fetched here.

The rules are those of DESIGN, "Commands": a folder's one matching file, the hub's default names, a flag's file,
folder, name within SOURCE, or REPO[@REV][/FILE]. Faults of all inputs are found before one error tells them.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ltxpack.errors import MAX_LISTED, FormatError, LtxpackError, SourceError, UsageError, quoted
from ltxpack.files.tensorfile import plain_file_name
from ltxpack.ltx23.classes import TEXT_ENCODER_TYPE
from ltxpack.ltx23.releases import (
    CHECKPOINT,
    DEFAULT_FILES,
    LORA,
    PATTERNS,
    TEXT_ENCODER,
    TEXT_ENCODER_REPO,
    UPSAMPLER,
)
from ltxpack.materialize.access import Access, Located, located
from ltxpack.materialize.hub.client import parse_reference

FLAGS = {role: "--" + role.replace("_", "-") for role in (CHECKPOINT, LORA, UPSAMPLER, TEXT_ENCODER)}
WEIGHTS = ".safetensors"
# What may enter an overlay besides weights.
TEXT_ENDINGS = (".json", ".jinja", ".txt")


class AmbiguousError(SourceError):
    """Several files would do: never something to go on without."""


@dataclass(frozen=True)
class Place:
    """A folder here or a repo on the hub. ``files``: relative path -> file, at most one folder deep."""

    label: str
    files: Mapping[str, Located]
    repo: str | None = None
    revision: str | None = None

    def top(self) -> dict[str, Located]:
        """Files that are in no subfolder."""
        return {name: file for name, file in self.files.items() if "/" not in name}

    def inside(self, folder: str) -> dict[str, Located]:
        """Files of one subfolder, by name in it."""
        prefix = folder.strip("/") + "/"
        return {name[len(prefix) :]: file for name, file in self.files.items() if name.startswith(prefix)}

    def folders(self) -> list[str]:
        """Subfolders that hold a config.json."""
        return sorted(name.rpartition("/")[0] for name in self.files if name.endswith("/config.json"))


@dataclass(frozen=True)
class TextEncoderFolder:
    """A folder of Gemma files, by name."""

    label: str
    files: Mapping[str, Located]


@dataclass(frozen=True)
class Sources:
    """The inputs. ``missing``: role -> why, only where the caller allowed inputs to be missing."""

    checkpoint: Located
    lora: Located | None
    upsampler: Located | None
    text_encoder: TextEncoderFolder | None
    repo: str | None
    revision: str | None
    missing: Mapping[str, str]


@dataclass(frozen=True)
class Reference:
    """``REPO[@REV][/FILE]``."""

    repo: str
    revision: str | None
    file: str | None


@dataclass(frozen=True)
class Wanted:
    """SOURCE and the flags as typed."""

    source: str
    flags: Mapping[str, str | None]
    revision: str | None = None


def resolve(wanted: Wanted, access: Access, allow_missing: bool = False) -> Sources:
    """The files ``wanted`` means. Raises SourceError, UsageError or FormatError naming what is missing or ambiguous.

    ``allow_missing``: an input other than the checkpoint that cannot be had is listed; an ambiguous one still raises.
    """
    place, single = open_place(wanted.source, wanted.revision, access)
    if single is not None and wanted.flags.get(CHECKPOINT):
        raise UsageError(
            "the checkpoint is named twice", expected="SOURCE or --checkpoint", found="both",
            next="give the folder as SOURCE, or leave --checkpoint out",
        )  # fmt: skip
    finders: dict[str, Callable[[], Located | TextEncoderFolder]] = {
        role: (lambda role=role: _file(role, wanted.flags.get(role), place, access))  # type: ignore[misc]
        for role in PATTERNS
    }
    if single is not None:
        finders[CHECKPOINT] = lambda: single
    finders[TEXT_ENCODER] = lambda: _text_encoder(wanted.flags.get(TEXT_ENCODER), place, access)
    found: dict[str, Located | TextEncoderFolder] = {}
    faults: dict[str, LtxpackError] = {}
    for role, find in finders.items():
        try:
            found[role] = find()
        except (SourceError, FormatError) as fault:
            faults[role] = fault
    _raise_faults(faults, allow_missing)
    return Sources(
        checkpoint=found[CHECKPOINT],  # type: ignore[arg-type]
        lora=found.get(LORA),  # type: ignore[arg-type]
        upsampler=found.get(UPSAMPLER),  # type: ignore[arg-type]
        text_encoder=found.get(TEXT_ENCODER),  # type: ignore[arg-type]
        repo=place.repo,
        revision=place.revision,
        missing={role: " ".join(str(fault).split()) for role, fault in faults.items()},
    )


def open_place(source: str, revision: str | None, access: Access) -> tuple[Place, Located | None]:
    """SOURCE as a place, and the checkpoint itself if SOURCE is a file (its siblings are then the place)."""
    path = Path(source).expanduser()
    kind = _kind(path)
    if kind is not None:
        if revision is not None:
            raise UsageError("--revision is for a hub repo", found=f"{source}, which is on this machine")
        if kind == "folder":
            return local_place(path), None
        return local_place(path.parent), located(path)
    reference = _reference(source)
    if reference is None:
        raise _no_such_path(path, source)
    if revision is not None and reference.revision:
        raise UsageError("the revision is given twice", found=f"{source} and --revision {revision}")
    place = hub_place(reference.repo, revision or reference.revision, access, path)
    return place, _member(place, reference.file, source) if reference.file else None


def local_place(folder: Path) -> Place:
    """The files of ``folder`` and of its subfolders that hold a config.json."""
    files: dict[str, Located] = {}
    try:
        entries = sorted(folder.iterdir())
        for entry in entries:
            if entry.is_file() and entry.name.endswith((WEIGHTS, *TEXT_ENDINGS)):
                files[entry.name] = located(entry)
            elif entry.is_dir() and (entry / "config.json").is_file():
                inner = {f"{entry.name}/{name}": file for name, file in folder_files(entry).items()}
                files.update(inner)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=folder) from None
    return Place(str(folder), files)


def folder_files(folder: Path) -> dict[str, Located]:
    """The files of one folder that may enter an overlay."""
    endings = (WEIGHTS, *TEXT_ENDINGS)
    entries = [entry for entry in sorted(folder.iterdir()) if entry.name.endswith(endings) and entry.is_file()]
    return {entry.name: located(entry) for entry in entries}


def hub_place(repo: str, revision: str | None, access: Access, typed: Path | None = None) -> Place:
    """A repo on the hub. ``typed``: the path this might have been meant as, named when there is no such repo."""
    try:
        info = access.info(repo, revision)
    except SourceError as error:
        if typed is None or not typed.parent.is_dir():
            raise
        raise SourceError(
            f"{error.problem}; nor is there such a file or folder here", file=str(typed), expected=error.expected,
            found=error.found, items=error.items or _similar(typed), next=error.next,
        ) from None  # fmt: skip
    files = {
        name: Located(PurePosixPath(name).name, file.size, file.sha256, None, info, name)
        for name, file in info.files.items()
        if name.endswith((WEIGHTS, *TEXT_ENDINGS)) and all(plain_file_name(part) for part in name.split("/"))
    }
    label = repo if revision is None else f"{repo}@{revision}"
    return Place(label, files, info.repo, info.commit)


def _file(role: str, typed: str | None, place: Place, access: Access) -> Located:
    """The file of ``role``: the one named by its flag, else the one of the place."""
    if typed is None:
        return choose(role, place)
    path = Path(typed).expanduser()
    kind = _kind(path)
    if kind is not None:
        return choose(role, local_place(path)) if kind == "folder" else located(path)
    for name in (typed, typed + WEIGHTS):
        if name in place.files:
            return place.files[name]
    reference = _reference(typed)
    if reference is None:
        raise _no_such_path(path, typed, place)
    other = hub_place(reference.repo, reference.revision, access, path)
    return _member(other, reference.file, typed) if reference.file else choose(role, other)


def choose(role: str, place: Place) -> Located:
    """The one file of ``place`` for ``role``. Raises SourceError with the candidates if there is none or several."""
    weights = {name: file for name, file in place.top().items() if name.endswith(WEIGHTS)}
    if place.repo is not None and DEFAULT_FILES[role] in weights:
        return weights[DEFAULT_FILES[role]]
    pattern = PATTERNS[role]
    others = [other for name, other in PATTERNS.items() if name != role and role == CHECKPOINT]
    candidates = [
        name
        for name in sorted(weights)
        if fnmatch.fnmatchcase(name, pattern) and not any(fnmatch.fnmatchcase(name, other) for other in others)
    ]
    if len(candidates) == 1:
        return weights[candidates[0]]
    hint = quoted(candidates[0]) if candidates else "FILE"
    if candidates:
        raise AmbiguousError(
            f"holds several files that may be the {role}", file=place.label,
            expected=f"one file named {pattern}{WEIGHTS}", items=candidates, next=f"{FLAGS[role]} {hint}",
        )  # fmt: skip
    raise SourceError(
        f"holds no file for the {role}", file=place.label, expected=f"one file named {pattern}{WEIGHTS}",
        found=", ".join(sorted(weights)) or "no .safetensors file", next=f"{FLAGS[role]} {hint}",
    )  # fmt: skip


def _text_encoder(typed: str | None, place: Place, access: Access) -> TextEncoderFolder:
    flag = FLAGS[TEXT_ENCODER]
    if typed is None:
        if place.repo is not None:
            other = hub_place(TEXT_ENCODER_REPO, None, access)
            return TextEncoderFolder(other.label, other.top())
        return _text_encoder_below(place, access)
    path = Path(typed).expanduser()
    kind = _kind(path)
    if kind == "folder":
        return TextEncoderFolder(typed, folder_files(path))
    if kind == "file":
        expected = "the folder of the text encoder"
        raise SourceError("is a file", file=typed, expected=expected, next=f"{flag} {quoted(path.parent)}")
    if inside := place.inside(typed):
        return TextEncoderFolder(f"{place.label}/{typed}", inside)
    reference = _reference(typed)
    if reference is None:
        raise _no_such_path(path, typed, place)
    other = hub_place(reference.repo, reference.revision, access, path)
    if reference.file is None:
        return TextEncoderFolder(other.label, other.top())
    inside = other.inside(reference.file)
    if not inside:
        raise SourceError("has no such folder", file=other.label, expected=reference.file, items=other.folders())
    return TextEncoderFolder(typed, inside)


def _text_encoder_below(place: Place, access: Access) -> TextEncoderFolder:
    """The one subfolder whose config says gemma3."""
    kinds = {folder: _model_type(place.files[f"{folder}/config.json"], access) for folder in place.folders()}
    candidates = [folder for folder, kind in kinds.items() if kind == TEXT_ENCODER_TYPE]
    if len(candidates) == 1:
        return TextEncoderFolder(f"{place.label}/{candidates[0]}", place.inside(candidates[0]))
    flag = FLAGS[TEXT_ENCODER]
    if candidates:
        raise AmbiguousError(
            "holds several text encoders", file=place.label, items=candidates, next=f"{flag} {quoted(candidates[0])}"
        )
    raise SourceError(
        "holds no text encoder", file=place.label,
        expected=f'one subfolder whose config.json says "model_type": "{TEXT_ENCODER_TYPE}"',
        items=[f"{folder} (model_type {kind})" for folder, kind in kinds.items()],
        next=f"{flag} {TEXT_ENCODER_REPO}",
    )  # fmt: skip


def _model_type(config: Located, access: Access) -> str | None:
    """What a config.json says it is; None for one that says nothing or is broken (some other folder's)."""
    try:
        document = access.json(config)
    except FormatError:
        return None
    kind = document.get("model_type") if isinstance(document, dict) else None
    return kind if isinstance(kind, str) else None


def _kind(path: Path) -> str | None:
    """``file`` or ``folder``, or None for a path that is not there (or is none: too long, not permitted)."""
    try:
        return "folder" if path.is_dir() else "file" if path.exists() else None
    except (OSError, ValueError):
        return None


def _reference(typed: str) -> Reference | None:
    """``typed`` as a place on the hub, or None for what can only be a path. Raises UsageError for a web address."""
    if typed.startswith((".", "/", "~")):
        return None
    try:
        reference = Reference(*parse_reference(typed))
    except UsageError:
        if typed.startswith(("http:", "https:")):
            raise
        return None
    return None if reference.file is None and typed.endswith(WEIGHTS) else reference


def _member(place: Place, name: str, typed: str) -> Located:
    for candidate in (name, name + WEIGHTS):
        if candidate in place.files:
            return place.files[candidate]
    close = difflib.get_close_matches(name, place.files, 8, 0.4)
    raise SourceError("is not in the repo", file=typed, expected=f"a file of {place.label}", items=close)


def _no_such_path(path: Path, typed: str, place: Place | None = None) -> SourceError:
    within = difflib.get_close_matches(typed, place.files, 8, 0.5) if place else []
    where = f", a name within {place.label}" if place else ""
    return SourceError(
        "does not exist", file=typed, expected=f"a file or folder{where}, or a hub repo as OWNER/NAME",
        items=_similar(path) or within,
    )  # fmt: skip


def _similar(path: Path) -> list[str]:
    """Names beside a path that does not exist that look like it."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside, 5, 0.6)]


def _raise_faults(faults: Mapping[str, LtxpackError], allow_missing: bool) -> None:
    optional = {role for role in faults if allow_missing and role != CHECKPOINT}
    serious = [fault for role, fault in faults.items() if role not in optional or isinstance(fault, AmbiguousError)]
    if not serious:
        return
    if len(serious) == 1:
        raise serious[0]
    room = MAX_LISTED // len(serious)
    items = [line for fault in serious for line in _told(fault, room)]
    raise SourceError("inputs cannot be had", items=items, next=_all_next(serious))


def _told(fault: LtxpackError, room: int) -> list[str]:
    """One fault of several in at most ``room`` lines: what is wrong, and below it what it lists."""
    stated = (("expected", fault.expected), ("found", fault.found))
    facts = [f"{word} {value}" for word, value in stated if value is not None]
    head = f"{fault.file}: {fault.problem}" if fault.file else fault.problem
    listed = [f"  {item}" for item in fault.items]
    if len(listed) > room - 1:
        listed[room - 2 :] = [f"  and {len(listed) - room + 2} more"]
    return [", ".join([head, *facts]), *listed]


def _all_next(faults: Sequence[LtxpackError]) -> str:
    """What to do about all faults: whatever a flag mends in one command, the rest as each says it."""
    following = list(dict.fromkeys(fault.next for fault in faults))
    flags = [text for text in following if text.startswith("--")]
    others = [text for text in following if text not in flags]
    return "; ".join([*others, *([f"the same command with {' '.join(flags)}"] if flags else [])])
