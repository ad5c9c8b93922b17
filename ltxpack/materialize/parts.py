"""Assembles one checkpoint from several files: shards, or the parts that other programs keep apart.

Pure: it sees names and headers. The result is the header of a whole checkpoint with the official names, and the file of
each tensor, so that the overlay does not depend on the files that the checkpoint came in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltxpack.errors import FormatError, UnsupportedError
from ltxpack.files.tensorfile import TensorFile, TensorInfo, parse_json
from ltxpack.ltx23.contents import described, official_names
from ltxpack.ltx23.forms import ROOT, refuse_quantised, spelled_root
from ltxpack.ltx23.releases import SUPPORTED, parse_version
from ltxpack.materialize.access import InputFile
from ltxpack.materialize.checkpoint import AGAIN, MADE_OF, Checkpoint, read_checkpoint, take_instead

# Prefix of the names in a whole checkpoint -> the name of the piece in a sentence.
PIECES = {
    ROOT: "the transformer",
    f"{ROOT}video_embeddings_connector.": "the video connector",
    f"{ROOT}audio_embeddings_connector.": "the audio connector",
    "text_embedding_projection.": "the text projections",
    "vae.": "the video VAE",
    "audio_vae.": "the audio VAE",
    "vocoder.": "the vocoder",
}
_LONGEST_FIRST = sorted(PIECES, key=len, reverse=True)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_MAX_SHARDS = 1000
# Metadata of the whole checkpoint that a later file may add.
_SHARED_METADATA = ("model_version", "license", "licence")


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint, with its header."""

    input: InputFile
    header: TensorFile


def pieces_of(file: TensorFile) -> frozenset[str]:
    """The keys of PIECES of which ``file`` holds tensors."""
    names = official_names(file.tensors, spelled_root(file.tensors))
    found = {next((root for root in _LONGEST_FIRST if name.startswith(root)), "") for name in names}
    return frozenset(found - {""})


def lacking(parts: Sequence[Part]) -> list[str]:
    """The keys of PIECES of which no part holds tensors."""
    there = frozenset[str]().union(*(pieces_of(part.header) for part in parts))
    return [piece for piece in PIECES if piece not in there]


def read_parts(parts: Sequence[Part]) -> Checkpoint:
    """The parsed checkpoint of ``parts``. If two hold the same tensor, the overlay takes the first file's.

    Raises UnsupportedError for codes and for a part alone, FormatError for parts that contradict one another, and the
    errors of :func:`.checkpoint.read_checkpoint`.
    """
    for part in parts:
        refuse_quantised(part.header, part.input.label, MADE_OF, take_instead(part.input.label))
    refuse_lacking(parts)
    file, places, doubled = _assembled(parts)
    return replace(read_checkpoint(file, parts[0].input.label), places=places, doubled=tuple(doubled))


def refuse_lacking(parts: Sequence[Part]) -> None:
    """Raises UnsupportedError for files that hold some pieces of an LTX-2.3 checkpoint and lack others."""
    missing = lacking(parts)
    versions = [part.header.metadata.get("model_version", "").strip('"') for part in parts]
    other = any(parse_version(version)[:2] not in ((), SUPPORTED) for version in versions)
    if not missing or other or not any(pieces_of(part.header) for part in parts):
        return
    # The audio VAE and its vocoder are usually in one file, each other piece in a file of its own.
    files = len({"audio" if piece in ("audio_vae.", "vocoder.") else piece for piece in missing})
    again = AGAIN + " ".join(["--part FILE"] * files)
    raise UnsupportedError(
        f"is no whole checkpoint but {described(parts[0].header)}", file=parts[0].input.label,
        items=[f"missing: {PIECES[piece]} ({piece}*)" for piece in missing],
        next=take_instead(parts[0].input.label) if ROOT in missing else again,
    )  # fmt: skip


def _assembled(parts: Sequence[Part]) -> tuple[TensorFile, dict[str, Path], list[str]]:
    """The header of the whole checkpoint with official names, the file of each tensor, and the names in two files."""
    first = parts[0]
    if len(parts) == 1 and spelled_root(first.header.tensors) in (None, ROOT):
        return first.header, dict.fromkeys(first.header.tensors, first.input.path), []
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Path] = {}
    doubled: list[str] = []
    for part in parts:
        names = official_names(part.header.tensors, spelled_root(part.header.tensors))
        if lost := sorted(part.header.tensors.keys() - names.values()):
            problem = "holds tensors twice, with the official root and without"
            raise FormatError(problem, file=part.input.label, items=lost, next="leave that file out")
        for official, name in names.items():
            info, known = part.header.tensors[name], tensors.get(official)
            if known is None:
                tensors[official], places[official] = replace(info, name=official), part.input.path
            elif (known.shape, known.dtype) == (info.shape, info.dtype):
                doubled.append(official)
            else:
                expected, found = (f"{each.dtype} {list(each.shape)}" for each in (known, info))
                problem, advice = "differs from the same tensor in another part", "leave one of the files out"
                label = part.input.label
                raise FormatError(problem, file=label, tensor=name, expected=expected, found=found, next=advice)
    size = sum(part.header.size for part in parts)
    return TensorFile(first.input.path, size, tensors, _metadata(parts)), places, doubled


def _metadata(parts: Sequence[Part]) -> Mapping[str, str]:
    """The metadata of the first part with a config, and the sections that only other parts have."""
    stating = [part for part in parts if "config" in part.header.metadata]
    base = dict((stating or parts)[0].header.metadata)
    for key in _SHARED_METADATA:
        stated = {part.input.label: part.header.metadata[key] for part in parts if key in part.header.metadata}
        if key == "model_version":
            _refuse_several(stated)
        if stated:
            base.setdefault(key, next(iter(stated.values())))
    sections: dict[str, Any] = {}
    for part in stating:
        config = parse_json(part.header.metadata["config"], f"{part.input.label}: `config`")
        for section, content in config.items() if isinstance(config, dict) else ():
            if sections.setdefault(section, content) != content:
                raise FormatError(
                    f"states another `{section}` in its config than another part", file=part.input.label,
                    next="take all parts from one checkpoint",
                )  # fmt: skip
    if stating and sections != parse_json(base["config"], "config"):
        base["config"] = json.dumps(sections)
    return base


def _refuse_several(versions: Mapping[str, str]) -> None:
    """Raises FormatError for parts of two generations. ``versions``: label -> model_version."""
    told = {parse_version(version.strip('"'))[:2]: f"{label}: {version}" for label, version in versions.items()}
    if len(told) > 1:
        problem = "the parts are of different generations of the model"
        raise FormatError(problem, items=list(told.values()), next="take all parts from one checkpoint")


def shard_names(name: str) -> list[str]:
    """The names of the whole set of shards that ``name`` belongs to, in order; none for a file that is no shard."""
    found = _SHARD.fullmatch(name)
    count = int(found["count"]) if found else 0
    if found is None or not 0 < int(found["number"]) <= count <= _MAX_SHARDS:
        return []
    return [f"{found['stem']}-{number:05d}-of-{found['count']}.safetensors" for number in range(1, count + 1)]
