"""Describes a checkpoint, a LoRA, an upsampler, an overlay or another file, and names the programs that take it.

Reads headers and the manifest, and the input scales and markers of quantised files, a few bytes each.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltxpack.errors import MAX_LISTED, LtxpackError, OtherFormatError, SourceError, quoted
from ltxpack.files.foreign import ARCHIVE, GGUF, WEIGHT_FORMATS, entries, refuse_unfinished
from ltxpack.files.tensorfile import TensorFile, TensorInfo, parse_json, read_tensorfile, tensor_reader
from ltxpack.files.typed import at_home
from ltxpack.ltx23 import forms
from ltxpack.ltx23.contents import ACTIVATIONS, UPSAMPLER_MARK, described
from ltxpack.ltx23.lora_facts import judged_keys, listed_faults, read_facts
from ltxpack.ltx23.lora_keys import belongs_elsewhere, parse_key
from ltxpack.ltx23.lora_statements import configuration_beside, read_configuration
from ltxpack.ltx23.releases import SUPPORTED, likely, parse_version
from ltxpack.ltx23.renames import TRANSFORMER, component_of
from ltxpack.ltx23.text_encoder import root_of
from ltxpack.manifest import BF16, FP8, Bake, FileRecord, Manifest, is_overlay, read_manifest
from ltxpack.materialize.access import OTHER_WEIGHTS, WEIGHTS, InputFile, local_file
from ltxpack.materialize.checkpoint import LoraHeader, read_lora, read_upsampler, take_instead
from ltxpack.materialize.parts import Part, lacking, read_parts
from ltxpack.materialize.plan import METADATA
from ltxpack.materialize.takers import COMFYUI, DIFFUSERS, OFFICIAL, PROGRAMS, UNTRIED, Look, judge

MAX_TEXT = 500
MAX_MADE_FROM = 64 * 1024
MATERIALIZE = "ltxpack materialize"
TOLD_CODES = "prompts are read with bf16 weights"
NOT_CALIBRATED = "not calibrated"
_BLOCK = re.compile(r"(?<=blocks[._])\d+")


def inspect_path(path: str | Path) -> dict[str, Any]:
    """A JSON-able description of ``path``; ``kind`` is checkpoint, lora, upsampler, tensors, overlay or folder.

    Raises SourceError, FormatError or OverlayError if it cannot be read at all.
    """
    path = at_home(path)
    if os.path.isdir(path):  # noqa: PTH112 (a Path raises where it may not look)
        return _overlay(path) if is_overlay(path) else _folder(path)
    file = local_file(path)
    try:
        tensors = read_tensorfile(path)
    except OtherFormatError as error:
        kind = WEIGHT_FORMATS.get(str(error.found))
        if path.suffix.lower() == ".json":
            error.next = f"ltxpack inspect {quoted(path.parent)}"
        # A file whose name says safetensors counts as broken.
        if kind is None or path.suffix.lower() == WEIGHTS:
            raise
        return {"path": str(path), "kind": kind, "bytes": file.size, **_other(error, kind, file)}
    with tensor_reader(path) as read:
        return {"path": str(path), **_file(file, tensors, read)}


def _other(error: OtherFormatError, kind: str, file: InputFile) -> dict[str, Any]:
    """Names a file of another format without opening it."""
    only = dict.fromkeys((*OFFICIAL, MATERIALIZE), "no: reads safetensors only")
    if kind == GGUF:
        only |= dict.fromkeys(COMFYUI, "no: a node of its own reads it, such as that of ComfyUI-GGUF")
    taken: dict[str, str] = {**dict.fromkeys(PROGRAMS, UNTRIED), **only}
    instead = error.next if kind == ARCHIVE else take_instead(file.name)
    return {"summary": f"{error.found}, not opened", "takes": taken, "next": instead}


def _file(file: InputFile, tensors: TensorFile, read: forms.ReadTensor) -> dict[str, Any]:
    known = file.known
    by_name = likely(file.name, file.size)
    linears = forms.read_linears(tensors, read)
    common: dict[str, Any] = {
        "form": linears.form,
        "bytes": file.size,
        "sha256": file.sha256,
        "release": known.release.name if known.release else None,
        "release_by_name_and_size": by_name.name if by_name else None,
        "warning": known.warning or _unfinished(file),
        **_amounts(tensors.tensors.values()),
    }
    lora = read_lora(tensors)
    if lora.is_lora or lora.unpaired:
        return {"kind": "lora", **common, **_lora(lora, file, tensors, read)}
    if tensors.metadata.get("format", "").startswith(ACTIVATIONS):
        takes = {"ltxpack bake-lora": "yes: by --activations", "ltxpack export": "yes: by --activations"}
        return {"kind": "activations", **common, "metadata": _metadata(tensors), "takes": takes}
    root, parts = forms.root_and_parts(tensors)
    if parts:
        look = Look(tensors, linears, root, parts, _input_scales(linears, read))
        return {"kind": "checkpoint", **common, **_checkpoint(file, look)}
    if UPSAMPLER_MARK in tensors.tensors:
        converts, cell = _converts(lambda: read_upsampler(tensors, None, file.name))
        return {"kind": "upsampler", **common, "config": _config(tensors), **converts, "takes": {MATERIALIZE: cell}}
    diffusers = any(part in TRANSFORMER.paths.values() for name in tensors.tensors for part in name.split("."))
    naming: dict[str, Any] = {}
    if diffusers:
        cell = "no: reads no codes" if linears.quantised else "yes: with its folder"
        naming = {"naming": "diffusers", "takes": {"ltxpack run": "yes: within its overlay", DIFFUSERS: cell}}
    elif root_of(tensors.tensors) is not None:
        cell = f"no: {TOLD_CODES}" if linears.quantised else "yes: by --text-encoder, with its configs and tokenizer"
        naming = {"takes": {MATERIALIZE: cell}}
    metadata, names = _metadata(tensors), _listed(sorted(tensors.tensors))
    told = {"summary": described(tensors)} if described(tensors) else {}
    return {"kind": "tensors", **told, **common, **naming, "metadata": metadata, "names": names}


def _unfinished(file: InputFile) -> str | None:
    try:
        refuse_unfinished(file.member)
    except SourceError as error:
        return f"{error.problem} ({error.found})"
    return None


def _checkpoint(file: InputFile, look: Look) -> dict[str, Any]:
    tensors, linears = look.file, look.linears
    groups: dict[str, list[TensorInfo]] = {}
    for name, info in tensors.tensors.items():
        groups.setdefault(component_of(forms.official(name, look.root)) or "unknown", []).append(info)
    unknown = [info.name for info in groups.pop("unknown", [])]
    has_duration = any(name.startswith("duration_head.") for name in tensors.tensors)
    generation = _generation(tensors.metadata.get("model_version", "2.5" if has_duration else ""))
    faults, takes = judge(look)
    part = Part(replace(file, member=file.name), tensors)
    converts, cell = _converts(lambda: read_parts([part]))
    if generation not in ("unknown", _generation(".".join(map(str, SUPPORTED)))):
        takes = {}  # the verdicts on programs are for LTX-2.3
    quantised = _quantised(look) if linears.quantised else None
    return {
        "summary": _summary(look, quantised),
        "parts": look.parts,
        "prefix": look.root,
        "generation": generation,
        "model_version": tensors.metadata.get("model_version"),
        "licence": _cut(tensors.metadata.get("license") or tensors.metadata.get("licence")),
        "made_from": _made_from(tensors),
        "quantised": quantised,
        "components": {name: _amounts(infos) for name, infos in groups.items()},
        "unknown": {"count": len(unknown), "names": _listed(sorted(unknown))},
        **converts,
        "faults": {name: {"count": len(where), "names": where[: forms.MAX_LINEARS]} for name, where in faults.items()},
        "takes": takes | {MATERIALIZE: cell},
        "next": _next(file, part, bool(converts["converts"])),
    }


def _next(file: InputFile, part: Part, converts: bool) -> str:
    """The command that makes an overlay: from the file, from it and its other parts, or from a file to take instead."""
    missing = lacking([part])
    command = f"ltxpack materialize {quoted(file.member)} OVERLAY"
    if converts:
        return command
    alone = missing and forms.ROOT not in missing and not forms.read_linears(part.header).quantised
    return f"{command} --part FILE (and the other parts of it)" if alone else take_instead(file.name)


def _summary(look: Look, quantised: dict[str, Any] | None) -> str:
    words = [forms.PARTS_TOLD[look.parts], forms.TOLD[look.linears.form]]
    if quantised and quantised["linears"]:  # other forms name their weights in other ways
        blocks = len(quantised["blocks"])
        words.append(f"{quantised['linears']} linears in {blocks} block{'s' * (blocks != 1)} quantised")
        words += [quantised["calibration"]] if quantised["calibration"] else []
    if look.root not in (None, forms.ROOT):
        words.append(f"names without {forms.ROOT}")
    return ", ".join(words)


def _quantised(look: Look) -> dict[str, Any]:
    """The quantised linears: their number, blocks, markers, and whether they are calibrated."""
    linears = look.linears
    blocks = {int(found[0]) for name in linears.codes if (found := _BLOCK.search(name)) and len(found[0]) < 6}
    marks = [name for name, there in ((forms.QUANTISATION, linears.layers), (forms.MARKER, linears.markers)) if there]
    formats = (str(layer.get("format"))[:MAX_TEXT] for layer in linears.described.values())
    return {
        "linears": len(linears.codes),
        "blocks": sorted(blocks)[: forms.MAX_LINEARS],
        "marked_by": marks,
        "formats": dict(Counter(formats).most_common(MAX_LISTED)),
        "calibration": _calibration(look),
    }


def _calibration(look: Look) -> str | None:
    scales = look.linears.scales[forms.INPUT_SCALE]
    if not scales or look.linears.form != forms.SCALED:
        return None
    if not look.input_scales:
        return "unknown"
    return NOT_CALIBRATED if set(look.input_scales.values()) == {1.0} else "calibrated"


def _input_scales(linears: forms.Linears, read: forms.ReadTensor) -> dict[str, float]:
    """Linear -> its input scale, for scales that are F32 scalars."""
    found = {
        linear: info
        for linear, info in linears.scales[forms.INPUT_SCALE].items()
        if info.dtype == "F32" and math.prod(info.shape) == 1
    }
    return {linear: struct.unpack("<f", read(info))[0] for linear, info in found.items()} if forms.few(found) else {}


def _made_from(tensors: TensorFile) -> Any:
    """The metadata of an export of ours; None for other files."""
    text = tensors.metadata.get(forms.MADE_FROM)
    if text is None or len(text) > MAX_MADE_FROM:
        return _cut(text)
    try:
        return parse_json(text, tensors.path)
    except LtxpackError:
        return _cut(text)


def _converts(read: Callable[[], object]) -> tuple[dict[str, Any], str]:
    """Whether this version converts the file of ``read``, and the reason if not; and the same as a cell of takers."""
    try:
        read()
    except LtxpackError as error:
        return {"converts": False, "problem": str(error)}, f"no: {error.problem}"
    return {"converts": True, "problem": None}, "yes"


def _generation(model_version: str) -> str:
    version = parse_version(model_version.strip('"'))
    return "LTX-" + ".".join(str(part) for part in version[:2]).removesuffix(".0") if version else "unknown"


def _config(tensors: TensorFile) -> Any:
    try:
        return parse_json(tensors.metadata.get("config", "null"), tensors.path)
    except LtxpackError:
        return None


def _lora(lora: LoraHeader, file: InputFile, tensors: TensorFile, read: forms.ReadTensor) -> dict[str, Any]:
    stated = _stated(Path(file.member), tensors, read)
    alpha = stated.pop("alpha")
    text = any(key is not None and belongs_elsewhere(key.module) for key in map(parse_key, tensors.tensors))
    taken = "yes: if its targets fit, which --plan says" + ("; --text bakes those of the text path" if text else "")
    if stated["problem"] or stated["made_for"]:
        taken = "no: see problem" if stated["problem"] else "yes: with --force, if its targets fit"
    return {
        "style": lora.style,
        "targets": len(lora.targets),
        "ranks": {str(rank): count for rank, count in sorted(Counter(filter(None, lora.targets.values())).items())},
        # Module paths without the number of the block.
        "kinds": dict(sorted(Counter(_BLOCK.sub("*", module) for module in lora.targets).items())),
        "methods": dict(sorted(lora.methods.items())),
        "alpha": f"per target ({lora.roles['alpha']})" if lora.roles["alpha"] else alpha,
        "dora": lora.roles["magnitude"],
        "deltas": lora.deltas,
        "unpaired": lora.unpaired[:MAX_LISTED],
        "others": lora.others[:MAX_LISTED],
        **stated,
        "metadata": _metadata(tensors),
        "takes": {"ltxpack bake-lora": taken},
    }


def _stated(path: Path, tensors: TensorFile, read: forms.ReadTensor) -> dict[str, Any]:
    """The statements of a LoRA, as ``bake-lora`` reads them; ``problem``: the reason why it would refuse the file."""
    found: dict[str, Any] = {"alpha": "none", "made_for": None, "notes": [], "warnings": [], "problem": None}
    try:
        facts = read_facts(tensors, read_configuration(configuration_beside(path)), read)
        judged = facts.judge(judged_keys(tensors.tensors), tensors.tensors)
    except LtxpackError as error:
        return found | {"problem": str(error)}
    stated = {"made_for": facts.foreign, "notes": judged.notes, "warnings": judged.warnings}
    return (
        found | stated | {"alpha": facts.alpha, "problem": "; ".join(listed_faults(judged.faults)[:MAX_LISTED]) or None}
    )


def _overlay(folder: Path) -> dict[str, Any]:
    manifest, removed = read_manifest(folder).in_place(folder)
    components = {
        name: {
            "class": f"{component.library}.{component.class_name}",
            "files": len(component.files),
            "bytes": _bytes(component.files),
            "cast": len(component.cast),
        }
        for name, component in manifest.components.items()
    }
    source = manifest.source
    return {
        "kind": "overlay",
        "path": str(folder),
        "bytes": _bytes(manifest.records()),
        "generation": _generation(manifest.model_version),
        "model_version": manifest.model_version,
        "image_crf": manifest.image_crf,
        "licence": _cut(manifest.licence),
        "source": {
            "repo": source.repo,
            "revision": source.revision,
            "files": [
                {"role": file.role, "name": file.name, "bytes": file.size, "release": file.release, "repo": file.repo}
                for file in source.files
            ],
        },
        "components": components,
        "loras": [{"name": lora.name, "path": lora.file.path, "bytes": lora.file.size} for lora in manifest.loras],
        "bakes": {name: _bake(bake) for name, bake in manifest.bakes.items()},
        "text_encoders": {name: _bake(bake) for name, bake in manifest.text_encoders.items()},
        **({"removed": [*removed]} if removed else {}),
        "takes": _overlay_takes(manifest),
    }


def _overlay_takes(manifest: Manifest) -> dict[str, str]:
    kept = any(record.path == METADATA for record in manifest.files)
    coded = ", ".join(name for name, bake in manifest.bakes.items() if bake.format != BF16)
    return {
        "ltxpack run": "yes",
        "ltxpack export": "yes" if kept else f"no: there is no {METADATA}, which materialize --force adds",
        DIFFUSERS: f"yes: all but its quantised bakes ({coded})" if coded else "yes",
    }


def _bake(bake: Bake) -> dict[str, Any]:
    return {
        "loras": [{"name": lora.name, "file": lora.file, "strength": lora.stated} for lora in bake.loras],
        "rule": bake.rule,
        "kernel": bake.kernel,
        "bytes": _bytes(bake.files),
        "changed": len(bake.changed),
        "format": bake.format,
        "quantised": len(bake.quantised),
        "calibration": bake.calibration.name if bake.calibration else NOT_CALIBRATED if bake.format == FP8 else None,
    }


def _folder(folder: Path) -> dict[str, Any]:
    """A folder that is no overlay: a short description of each of its safetensors files."""
    try:
        names = (path for path in entries(folder) if path.name.lower().endswith((WEIGHTS, *OTHER_WEIGHTS)))
        files = [path for path in names if not path.is_dir()]
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=folder) from None
    if not files:
        raise SourceError(
            "holds neither an overlay nor a .safetensors file", file=folder, next="ltxpack inspect FILE_OR_OVERLAY"
        )
    listed: list[dict[str, Any]] = []
    for path in files[:MAX_LISTED]:
        try:
            described = inspect_path(path)
            form = {"form": described["form"]} if "form" in described else {}
            listed.append({"name": path.name, "kind": described["kind"], "bytes": described["bytes"], **form})
        except LtxpackError as error:
            listed.append({"name": path.name, "kind": "broken", "problem": error.problem})
    return {"kind": "folder", "path": str(folder), "count": len(files), "files": listed}


def _amounts(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    infos = list(infos)
    return {
        "tensors": len(infos),
        "params": sum(math.prod(info.shape) for info in infos),
        "tensor_bytes": sum(info.nbytes for info in infos),
        "dtypes": dict(sorted(Counter(info.dtype for info in infos).items())),
    }


def _bytes(records: Iterable[FileRecord]) -> int:
    """Bytes on disk: a symlink inside the overlay takes none."""
    return sum(record.size for record in records if record.link in (None, "hard"))


def _listed(names: list[str]) -> list[str]:
    """The first of ``names``, and the number of the others."""
    return names if len(names) <= MAX_LISTED else [*names[: MAX_LISTED - 1], f"and {len(names) - MAX_LISTED + 1} more"]


def _metadata(tensors: TensorFile) -> dict[str, str | None]:
    return {key: _cut(value) for key, value in sorted(tensors.metadata.items())[:MAX_LISTED]}


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= MAX_TEXT:
        return text
    return json.dumps(text[:MAX_TEXT])[1:-1] + "..."
