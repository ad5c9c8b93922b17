"""What the user names -> which files it is, on this machine or on the hub. No weight is read or fetched here.

The rules are those of DESIGN, "Commands": a folder's one matching file, the hub's default names, a flag's file,
folder, name within SOURCE, or REPO[@REV][/FILE]. All inputs are looked for before one error names every fault.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ltxpack.errors import MAX_LISTED, FormatError, LtxpackError, SourceError, UsageError, quoted
from ltxpack.files import tensorfile
from ltxpack.files.foreign import entries, is_foreign
from ltxpack.files.unfinished import refuse_unfinished
from ltxpack.ltx23.classes import TEXT_ENCODER_TYPE
from ltxpack.ltx23.releases import (
    CHECKPOINT,
    DEFAULT_FILES,
    LORA,
    PATTERNS,
    RELEASES,
    TEXT_ENCODER,
    TEXT_ENCODER_REPO,
    UPSAMPLER,
    Recognised,
    recognise,
)
from ltxpack.materialize.checkpoint import checkpoint_header
from ltxpack.materialize.hub.client import Hub, Reference, RepoInfo, cached_sha256, parse_reference
from ltxpack.reporter import Reporter

FLAGS = {role: "--" + role.replace("_", "-") for role in (CHECKPOINT, LORA, UPSAMPLER, TEXT_ENCODER)}
# What a fault that a flag resolves says to do, before the flag.
AGAIN = "the same command with "
WEIGHTS = ".safetensors"
# Weights that are found in order to be refused by name.
OTHER_WEIGHTS = (".gguf", ".ckpt", ".pt", ".pth")
# What may enter an overlay besides weights.
TEXT_ENDINGS = (".json", ".jinja", ".txt")
MAX_CONFIG_BYTES = 16 * 1024 * 1024

_SAYS_QUANTISED = re.compile(r"fp8|fp4|int8|int4|nf4|bnb|gptq|awq", re.IGNORECASE)

T = TypeVar("T")


class SeveralFaultsError(SourceError):
    """The faults of several inputs, each with a list of its own that ends."""

    max_listed = len((CHECKPOINT, LORA, UPSAMPLER, TEXT_ENCODER)) * MAX_LISTED


class AmbiguousError(SourceError):
    """Several files would do, so that none is chosen, even where an input may be missing."""


@dataclass(frozen=True)
class InputFile:
    """One input file. ``path``: the real file here, or where the hub cache will hold it once it is fetched.

    ``member``: its name within ``repo``, or for a local file the path as it was found.
    """

    name: str
    size: int
    sha256: str | None
    path: Path
    repo: RepoInfo | None
    member: str

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.repo.repo}/{self.member}" if self.repo else self.member

    @property
    def known(self) -> Recognised:
        """Which release it is, if it is one."""
        return recognise(self.name, self.size, self.sha256)

    @property
    def distilled_by(self) -> str | None:
        """What shows that it is a distilled checkpoint: hash, size (each published file has its own) or name."""
        by_size = next((release for release in RELEASES if release.size == self.size), None)
        known = (("hash", self.known.release), ("size", by_size))
        by, name = next(((by, release.name) for by, release in known if release), ("file name", self.name.lower()))
        return by if "distilled" in name else None


@dataclass(frozen=True)
class InputFolder:
    """A folder here, a repo on the hub, or a folder of one: ``files`` by relative path. Local ones go one level deep.

    ``repo`` is None for a folder of this machine.
    """

    label: str
    files: Mapping[str, InputFile]
    repo: RepoInfo | None = None

    def find(self, name: str) -> InputFile | InputFolder | None:
        """The file or subfolder ``name``; the ending of a weights file may be left out."""
        file = self.files.get(name) or self.files.get(name + WEIGHTS)
        prefix = name.strip("/") + "/"
        inside = {other[len(prefix) :]: file for other, file in self.files.items() if other.startswith(prefix)}
        return file or (InputFolder(f"{self.label}/{name}", inside, self.repo) if inside else None)


@dataclass(frozen=True)
class Sources:
    """The inputs. ``missing``: role -> why, only where the caller allowed inputs to be missing.

    ``lora`` is None too for a distilled checkpoint, unless a LoRA was named.
    """

    checkpoint: InputFile
    lora: InputFile | None
    upsampler: InputFile | None
    text_encoder: InputFolder | None
    missing: Mapping[str, str]


class Access:
    """Reads inputs wherever they are, each header once. Asks the hub only for inputs that are on it."""

    def __init__(self, reporter: Reporter, hub: Hub | None = None) -> None:
        self._reporter = reporter
        self._hub = hub
        self._infos: dict[tuple[str, str | None], RepoInfo] = {}
        self._headers: dict[Path, tensorfile.TensorFile] = {}

    @property
    def hub(self) -> Hub:
        """The hub client, made at first use: it imports huggingface_hub."""
        self._hub = self._hub or Hub(reporter=self._reporter)
        return self._hub

    def info(self, repo: str, revision: str | None = None) -> RepoInfo:
        """A repo's files at a revision; the hub is asked once."""
        key = (repo, revision)
        if key not in self._infos:
            self._infos[key] = self.hub.info(repo, revision)
        return self._infos[key]

    def header(self, file: InputFile) -> tensorfile.TensorFile:
        """The header of a safetensors file. Raises SourceError, for half a download too, or FormatError."""
        if file.path not in self._headers:
            if file.repo is None:
                refuse_unfinished(file.member)
                self._headers[file.path] = tensorfile.read_tensorfile(file.path)
            else:
                head = self.hub.header(file.repo, file.member)
                self._headers[file.path] = tensorfile.parse_header(head, file.size, file.label)
        return self._headers[file.path]

    def json(self, file: InputFile) -> Any:
        """A JSON file written by another library, with numbers of any size. Raises SourceError or FormatError."""
        return tensorfile.read_json(self._small(file, MAX_CONFIG_BYTES), MAX_CONFIG_BYTES, any_number=True)

    def index(self, file: InputFile) -> Mapping[str, str]:
        """A shard index: tensor name → file name. Raises SourceError or FormatError."""
        return tensorfile.read_index(self._small(file, tensorfile.MAX_INDEX_BYTES))

    def fetch(self, file: InputFile) -> None:
        """Have the file at its ``path``. Raises SourceError if what arrives is not the file that was planned with."""
        if file.repo is None:
            return
        path = self.hub.fetch(file.repo, file.member)
        size = path.stat().st_size
        if size != file.size:
            raise SourceError("arrived with another size", file=file.label, expected=file.size, found=size)
        planned = self._headers.get(file.path)
        if planned is not None:
            arrived = tensorfile.read_tensorfile(path)
            if (arrived.tensors, arrived.metadata) != (planned.tensors, planned.metadata):
                raise SourceError("arrived with another header than the hub sent before", file=file.label)

    def _small(self, file: InputFile, max_bytes: int) -> Path:
        """The path of a small file, fetched; a file that is too large is refused before that."""
        if file.size > max_bytes:
            most, found = f"at most {max_bytes} bytes", f"{file.size} bytes"
            raise FormatError("is too large", file=file.label, expected=most, found=found)
        self.fetch(file)
        return file.path


def resolve(
    source: str,
    flags: Mapping[str, str | None],
    access: Access,
    *,
    revision: str | None = None,
    allow_missing: bool = False,
) -> Sources:
    """The files that SOURCE and the flags (by role) mean.

    ``allow_missing``: an input other than the checkpoint that is not found is listed; an ambiguous one still raises.
    Raises SourceError, UsageError or FormatError naming everything that is missing or ambiguous, UnsupportedError for a
    checkpoint that could not be used if the rest were there.
    """
    folder, single = open_source_folder(source, revision, access)
    if single is not None and flags.get(CHECKPOINT):
        raise UsageError(
            "the checkpoint is named twice", expected="SOURCE or --checkpoint", found="both",
            next="give the folder as SOURCE, or leave --checkpoint out",
        )  # fmt: skip

    chosen: dict[str, InputFile | None] = {}

    def file(role: str) -> InputFile | None:
        if role == CHECKPOINT and single:
            return single
        typed, base = flags.get(role), chosen.get(CHECKPOINT)
        if role == LORA and typed is None and base and base.distilled_by:
            return None
        found = folder if typed is None else _find(typed, access, within=folder)
        return choose(role, found) if isinstance(found, InputFolder) else found

    faults = InputFaults("several inputs were not found")
    for role in PATTERNS:
        chosen[role] = faults.gather(role, functools.partial(file, role))
    encoder = faults.gather(TEXT_ENCODER, lambda: _text_encoder(flags.get(TEXT_ENCODER), folder, access))
    allowed = [role for role in faults.found if allow_missing and role != CHECKPOINT]
    absent = [role for role in allowed if not isinstance(faults.found[role], AmbiguousError)]
    missing = {role: " ".join(str(faults.found.pop(role)).split()) for role in absent}
    checkpoint = chosen[CHECKPOINT]
    if faults.found and checkpoint is not None:
        _refuse_form(checkpoint, access)
    faults.refuse()
    assert checkpoint is not None
    return Sources(checkpoint, chosen[LORA], chosen[UPSAMPLER], encoder, missing)


def _refuse_form(checkpoint: InputFile, access: Access) -> None:
    """UnsupportedError for a checkpoint that is of no use: nobody should look for the other inputs before."""
    with contextlib.suppress(SourceError, FormatError):
        checkpoint_header(lambda: access.header(checkpoint), checkpoint.label)


class InputFaults:
    """The faults of several inputs as one error. ``problem`` says what is wrong with all of them."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        self.found: dict[str, LtxpackError] = {}

    def gather(self, role: str, find: Callable[[], T]) -> T | None:
        """What ``find`` returns, or None if it raises: then the fault is kept."""
        try:
            return find()
        except UsageError:
            raise
        except LtxpackError as fault:
            self.found[role] = fault
            return None

    def refuse(self) -> None:
        """Raise what was found: one fault as it is, several as one SourceError."""
        faults = list(self.found.values())
        if len(faults) == 1:
            raise faults[0]
        if faults:
            items = [line for fault in faults for line in _told(fault, MAX_LISTED // 2)]
            raise SeveralFaultsError(self.problem, items=items, next=_all_next(faults))


def open_source_folder(source: str, revision: str | None, access: Access) -> tuple[InputFolder, InputFile | None]:
    """SOURCE as a folder, and the checkpoint itself if SOURCE is a file (the folder is then the one it is in)."""
    found = _find(source, access, revision=revision)
    if isinstance(found, InputFolder):
        return found, None
    return (local_folder(Path(found.member).parent) if found.repo is None else _repo_folder(found.repo, access)), found


def _find(
    typed: str, access: Access, *, revision: str | None = None, within: InputFolder | None = None
) -> InputFile | InputFolder:
    """What is typed: a file or folder here, a name ``within`` SOURCE, or a repo, a folder or a file on the hub."""
    path = Path(typed).expanduser()
    kind = _kind(path)
    if kind is not None:
        if revision is not None:
            raise UsageError("--revision is for a hub repo", found=f"{typed}, which is on this machine")
        return local_folder(path) if kind == "folder" else local_file(path)
    inside = within.find(typed) if within else None
    if inside is not None:
        return inside
    reference = hub_reference(typed)
    if reference is None:
        where = f", a name within {within.label}" if within else ""
        raise SourceError(
            "does not exist", file=typed, expected=f"a file or folder{where}, or a hub repo as OWNER/NAME",
            items=_similar(path) or (difflib.get_close_matches(typed, within.files, 8, 0.5) if within else []),
        )  # fmt: skip
    if revision is not None and reference.revision:
        raise UsageError("the revision is given twice", found=f"{typed} and --revision {revision}")
    folder = hub_folder(reference.repo, revision or reference.revision, access, path)
    if reference.file is None:
        return folder
    found = folder.find(reference.file)
    if found is None:
        close = difflib.get_close_matches(reference.file, folder.files, 8, 0.4)
        raise SourceError("is not in the repo", file=typed, expected=f"a file of {folder.label}", items=close)
    return found


def local_file(path: Path) -> InputFile:
    """A file on this machine; behind a symlink the real file is what is read and linked. Raises SourceError."""
    try:
        real = path.resolve(strict=True)
        size = real.stat().st_size
    except (OSError, RuntimeError) as error:
        raise SourceError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=path) from None
    return InputFile(path.name, size, cached_sha256(path), real, None, str(path))


def local_folder(folder: Path) -> InputFolder:
    """The files of ``folder`` that may enter an overlay, and of its subfolders that hold a config.json."""
    endings = (WEIGHTS, *TEXT_ENDINGS, *OTHER_WEIGHTS)
    try:
        folders = [folder, *filter(_has_config, entries(folder))]
        found = sorted(path for place in folders for path in entries(place) if path.name.endswith(endings))
        files = {path.relative_to(folder).as_posix(): local_file(path) for path in found if path.is_file()}
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=folder) from None
    return InputFolder(str(folder), files)


def _has_config(folder: Path) -> bool:
    """Whether ``folder`` holds a config.json that can be seen: a disk has folders of the system, too."""
    try:
        return (folder / "config.json").is_file()
    except OSError:
        return False


def hub_folder(repo: str, revision: str | None, access: Access, typed: Path | None = None) -> InputFolder:
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
    return _repo_folder(info, access)


def _repo_folder(info: RepoInfo, access: Access) -> InputFolder:
    files = {
        name: InputFile(PurePosixPath(name).name, file.size, file.sha256, access.hub.path(info, name), info, name)
        for name, file in info.files.items()
        if name.endswith((WEIGHTS, *TEXT_ENDINGS, *OTHER_WEIGHTS))
        and not is_foreign(name)
        and all(tensorfile.plain_file_name(part) for part in name.split("/"))
    }
    return InputFolder(info.repo if info.revision is None else f"{info.repo}@{info.revision}", files, info)


def choose(role: str, folder: InputFolder) -> InputFile:
    """The one file of ``folder`` for ``role``. Raises SourceError with the candidates if there is none or several."""
    weights = {name: file for name, file in folder.files.items() if "/" not in name and name.endswith(WEIGHTS)}
    if folder.repo is not None and DEFAULT_FILES[role] in weights:
        return weights[DEFAULT_FILES[role]]
    others = {name for other in (LORA, UPSAMPLER) if role == CHECKPOINT for name in _matching(weights, PATTERNS[other])}
    candidates = [name for name in _matching(weights, PATTERNS[role]) if name not in others]
    if len(candidates) == 1:
        return weights[candidates[0]]
    expected, again = f"one file named {PATTERNS[role]}{WEIGHTS}", f"{AGAIN}{FLAGS[role]} "
    if candidates:
        raise AmbiguousError(
            f"holds several files that may be the {role}", file=folder.label, expected=expected, items=candidates,
            next=again + quoted(min(candidates, key=lambda name: bool(_SAYS_QUANTISED.search(name)))),
        )  # fmt: skip
    unusable = [name for name in sorted(folder.files) if "/" not in name and name.endswith(OTHER_WEIGHTS)]
    if unusable and role == CHECKPOINT:
        return folder.files[unusable[0]]  # refused by its form later, with what to take instead
    raise SourceError(
        f"holds no file for the {role}", file=folder.label, expected=expected,
        found=", ".join(sorted(weights)) or "no .safetensors file", next=again + "FILE",
    )  # fmt: skip


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    return [name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def _text_encoder(typed: str | None, folder: InputFolder, access: Access) -> InputFolder:
    if typed is None and folder.repo is None:
        return _text_encoder_below(folder, access)
    if typed is None:
        return hub_folder(TEXT_ENCODER_REPO, None, access)
    found = _find(typed, access, within=folder)
    if isinstance(found, InputFolder):
        return found
    beside = local_folder(Path(found.member).parent) if found.repo is None else None
    if beside is not None and "config.json" not in beside.files:  # it is told what else it needs
        return InputFolder(found.member, {found.name: found})
    raise SourceError(
        "is a file", file=typed, expected="the folder of the text encoder",
        next=f"{AGAIN}{FLAGS[TEXT_ENCODER]} {quoted(str(PurePosixPath(typed).parent))}",
    )  # fmt: skip


def _text_encoder_below(folder: InputFolder, access: Access) -> InputFolder:
    """The one subfolder whose config says gemma3."""
    inners = [name.removesuffix("/config.json") for name in sorted(folder.files) if name.endswith("/config.json")]
    kinds = {inner: _model_type(folder.files[f"{inner}/config.json"], access) for inner in inners}
    candidates = [inner for inner, kind in kinds.items() if kind == TEXT_ENCODER_TYPE]
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
        items=[f"{inner} (model_type {kind})" for inner, kind in kinds.items()], next=again + TEXT_ENCODER_REPO,
    )  # fmt: skip


def _model_type(config: InputFile, access: Access) -> str | None:
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


def hub_reference(typed: str) -> Reference | None:
    """``typed`` as a place on the hub, or None for what can only be a path. Raises UsageError for a web address."""
    if typed.startswith((".", "/", "~")):
        return None
    try:
        reference = parse_reference(typed)
    except UsageError:
        if typed.startswith(("http:", "https:")):
            raise
        return None
    return None if reference.file is None and typed.endswith(WEIGHTS) else reference


def _similar(path: Path) -> list[str]:
    """Names beside a path that does not exist that look like it."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside, 5, 0.6)]


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
    """What to do about all faults: all flags in one command, the rest as each says it. A command stands alone: first
    comes what has to be done without one.
    """
    following = list(dict.fromkeys(fault.next for fault in faults))
    flags = [text.removeprefix(AGAIN) for text in following if text.startswith(AGAIN)]
    commands = [text for text in following if text.startswith("ltxpack ")]
    advice = [text for text in following if not text.startswith((AGAIN, "ltxpack "))]
    return "; ".join([*advice, *([AGAIN + " ".join(flags)] if flags else [])]) or commands[0]
