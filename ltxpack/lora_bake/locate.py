"""Finds the LoRA that the user typed: a file, a folder, a place on the hub or the address of its page.

It works with names, and reads the headers of possible files to see whether they are LoRAs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from ltxpack.errors import LtxpackError, SourceError
from ltxpack.files.foreign import refuse_unfinished
from ltxpack.files.tensorfile import TensorFile, read_tensorfile
from ltxpack.files.typed import at_home, denied, similar_names, similar_paths
from ltxpack.lora_bake.adapter import adapter_files
from ltxpack.lora_bake.plan import lora_name
from ltxpack.ltx23.lora_statements import PEFT_CONFIG, PEFT_WEIGHTS, belongs
from ltxpack.materialize.access import WEIGHTS, Access, InputFile, InputFolder, hub_folder, hub_reference
from ltxpack.materialize.checkpoint import read_lora
from ltxpack.materialize.hub.errors import Reference

# The most files on the hub whose headers are fetched.
MOST_HEADERS = 10
EXPECTED = "a file, a folder with one LoRA, REPO/FILE on the hub, or the address of its page there"

Again = Callable[[str], str]
"""The command that names another LoRA in the place of the one typed."""


@dataclass(frozen=True)
class Located:
    """A LoRA's ``weights`` and PEFT configuration. ``name``: its part of a bake's name, unless it is the overlay's own.

    ``remote``: for a LoRA on the hub, both files there; the paths are then their future ones.
    """

    name: str
    weights: Path
    config: Path | None
    remote: tuple[InputFile, InputFile | None] | None = None


def locate(typed: str, access: Access, again: Again) -> Located:
    """The LoRA that ``typed`` names; a path that exists wins over the hub.

    Raises SourceError, with similar names, or for half a download; UsageError for a text that names no place.
    """
    path = at_home(typed)
    if os.path.exists(path):  # noqa: PTH110 (a Path raises for a name that is too long)
        return _here(path, again)
    reference = hub_reference(typed)
    if reference is None:
        similar = similar_paths(path)
        advice = again(similar[0]) if similar else None
        raise SourceError(denied(path) or "no such LoRA", file=typed, expected=EXPECTED, items=similar, next=advice)
    return _on_hub(reference, typed, access, again)


def _here(path: Path, again: Again) -> Located:
    if problem := denied(path):
        raise SourceError(problem, file=path)
    if path.is_dir() and not (path / PEFT_WEIGHTS).is_file():
        only = _only_one(path, again)
        found = _here(only, again)
        return replace(found, name=lora_name(only.resolve().parent.name)) if only.name == PEFT_WEIGHTS else found
    weights, config = adapter_files(path)
    refuse_unfinished(weights)
    name = path.resolve().name if path.is_dir() else path.stem
    return Located(lora_name(name), weights, config)


def _only_one(folder: Path, again: Again) -> Path:
    """The only LoRA in ``folder``, or in its subfolders if it holds no weights itself."""
    for pattern in ("*", "*/*"):
        files = sorted(path for path in folder.glob(pattern) if path.name.lower().endswith(WEIGHTS) and path.is_file())
        if files:
            break
    loras = [path for path in files if _is_lora(partial(read_tensorfile, path))]
    if len(loras) == 1:
        return loras[0]
    if not files:
        raise SourceError("is a folder without a LoRA", file=folder, expected=f"a {WEIGHTS} file in it")
    problem = "is a folder with several LoRAs" if loras else "is a folder whose files are no LoRAs"
    raise SourceError(problem, file=folder, items=loras or files, next=again(str(loras[0])) if loras else None)


def _is_lora(header: Callable[[], TensorFile]) -> bool:
    with contextlib.suppress(LtxpackError):
        return read_lora(header()).is_lora
    return False


def _on_hub(reference: Reference, typed: str, access: Access, again: Again) -> Located:
    """The named file, the adapter in a folder of the repo, or the only LoRA there."""
    repo, member = hub_folder(reference.repo, reference.revision, access, at_home(typed)), reference.file
    start = reference.repo if reference.revision is None else f"{reference.repo}@{reference.revision}"
    names = [name for name in sorted(repo.files) if name.endswith(WEIGHTS)]
    found = repo if member is None else repo.find(member)
    if isinstance(found, InputFolder):
        loras = _loras(found.files, access)
        if len(loras) != 1:
            listed = [file.member for file in loras] or names
            problem = "names a repo or folder with several or no LoRA files"
            advice = again(f"{start}/{listed[0]}") if loras else None
            raise SourceError(problem, file=typed, items=listed, next=advice)
        [found] = loras
    if found is None or found.member not in names:
        if member in access.info(reference.repo, reference.revision).files:
            raise SourceError("is not a .safetensors file", file=typed)
        close = similar_names(member or "", names)
        advice = again(f"{start}/{close[0]}") if close else None
        raise SourceError(f"is not in {reference.repo}", file=member or typed, items=close or names, next=advice)
    place = PurePosixPath(found.member)
    beside = [PurePosixPath(name).name for name in names if PurePosixPath(name).parent == place.parent]
    config = repo.files.get(str(place.with_name(PEFT_CONFIG))) if belongs(place.name, beside) else None
    # All PEFT files have the same name, so the folder or repo names the LoRA.
    label = PurePosixPath(found.label)
    name = lora_name(label.parent.name if label.name == PEFT_WEIGHTS else label.stem)
    return Located(name, found.path, None if config is None else config.path, (found, config))


def _loras(files: Mapping[str, InputFile], access: Access) -> list[InputFile]:
    """The possible files of a folder: PEFT's, the only one, else those whose headers are those of LoRAs."""
    weights = {name: file for name, file in files.items() if name.endswith(WEIGHTS)}
    if PEFT_WEIGHTS in weights:
        return [weights[PEFT_WEIGHTS]]
    own = [file for name, file in weights.items() if "/" not in name] or list(weights.values())
    if not 1 < len(own) <= MOST_HEADERS:
        return own
    return [file for file in own if _is_lora(partial(access.header, file))]
