"""What a checkpoint, a LoRA, an upsampler or an overlay holds, from headers and the manifest alone."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ltxpack.errors import LtxpackError, SourceError
from ltxpack.files.tensorfile import TensorFile, TensorInfo, parse_json, read_tensorfile
from ltxpack.ltx23.releases import likely, parse_version
from ltxpack.ltx23.renames import component_of
from ltxpack.manifest import Bake, FileRecord, is_overlay, read_manifest
from ltxpack.materialize.checkpoint import LoraHeader, read_checkpoint, read_lora, read_upsampler
from ltxpack.materialize.sources import InputFile, local_file

MAX_LISTED = 20
MAX_TEXT = 500
_BLOCK = re.compile(r"(?<=blocks[._])\d+")
UPSAMPLER_MARK = "post_upsample_res_blocks.0.conv1.weight"


def inspect_path(path: str | Path) -> dict[str, Any]:
    """A JSON-able description of ``path``; ``kind`` is checkpoint, lora, upsampler, tensors, overlay or folder.

    Raises SourceError, FormatError or OverlayError if it cannot be read at all.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _overlay(path) if is_overlay(path) else _folder(path)
    file = local_file(path)
    tensors = read_tensorfile(path)
    return {"path": str(path), **_file(file, tensors)}


def _file(file: InputFile, tensors: TensorFile) -> dict[str, Any]:
    known = file.known
    by_name = likely(file.name, file.size)
    common: dict[str, Any] = {
        "bytes": file.size,
        "sha256": file.sha256,
        "release": known.release.name if known.release else None,
        "release_by_name_and_size": by_name.name if by_name else None,
        "warning": known.warning,
        **_amounts(tensors.tensors.values()),
    }
    lora = read_lora(tensors)
    if lora.is_lora:
        return {"kind": "lora", **common, **_lora(lora, tensors)}
    if any(component_of(name) for name in tensors.tensors):
        return {"kind": "checkpoint", **common, **_checkpoint(file, tensors)}
    if UPSAMPLER_MARK in tensors.tensors:
        converts = _converts(lambda: read_upsampler(tensors, None, file.name))
        return {"kind": "upsampler", **common, "config": _config(tensors), **converts}
    return {"kind": "tensors", **common, "metadata": _metadata(tensors), "names": sorted(tensors.tensors)[:MAX_LISTED]}


def _checkpoint(file: InputFile, tensors: TensorFile) -> dict[str, Any]:
    groups: dict[str, list[TensorInfo]] = {}
    for name, info in tensors.tensors.items():
        groups.setdefault(component_of(name) or "unknown", []).append(info)
    unknown = [info.name for info in groups.pop("unknown", [])]
    has_duration = any(name.startswith("duration_head.") for name in tensors.tensors)
    return {
        "generation": _generation(tensors.metadata.get("model_version", "2.5" if has_duration else "")),
        "model_version": tensors.metadata.get("model_version"),
        "licence": _cut(tensors.metadata.get("license") or tensors.metadata.get("licence")),
        "components": {name: _amounts(infos) for name, infos in groups.items()},
        "unknown": {"count": len(unknown), "names": sorted(unknown)[:MAX_LISTED]},
        **_converts(lambda: read_checkpoint(tensors, file.name)),
    }


def _converts(read: Callable[[], object]) -> dict[str, Any]:
    """Whether this version converts the file that ``read`` reads, and if not, why."""
    try:
        read()
    except LtxpackError as error:
        return {"converts": False, "problem": str(error)}
    return {"converts": True, "problem": None}


def _generation(model_version: str) -> str:
    version = parse_version(model_version.strip('"'))
    return "LTX-" + ".".join(str(part) for part in version[:2]).removesuffix(".0") if version else "unknown"


def _config(tensors: TensorFile) -> Any:
    try:
        return parse_json(tensors.metadata.get("config", "null").encode(), tensors.path)
    except LtxpackError:
        return None


def _lora(lora: LoraHeader, tensors: TensorFile) -> dict[str, Any]:
    return {
        "style": lora.style,
        "targets": len(lora.targets),
        "ranks": {str(rank): count for rank, count in sorted(Counter(lora.targets.values()).items())},
        # Module paths with the number of the block dropped.
        "kinds": dict(sorted(Counter(_BLOCK.sub("*", module) for module in lora.targets).items())),
        "alpha": _alpha(lora, tensors),
        "dora": lora.roles["magnitude"],
        "deltas": lora.deltas,
        "unpaired": lora.unpaired[:MAX_LISTED],
        "others": lora.others[:MAX_LISTED],
        "metadata": _metadata(tensors),
    }


def _alpha(lora: LoraHeader, tensors: TensorFile) -> str:
    """Where the file states alpha: per target, in the metadata, or nowhere (then the scale is the strength)."""
    if lora.roles["alpha"]:
        return f"per target ({lora.roles['alpha']})"
    text = tensors.metadata.get("lora_adapter_metadata", "") + tensors.metadata.get("lora_alpha", "")
    return "in the metadata" if "alpha" in text or "lora_alpha" in tensors.metadata else "none"


def _overlay(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
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
    }


def _bake(bake: Bake) -> dict[str, Any]:
    return {
        "loras": [{"name": lora.name, "file": lora.file, "strength": lora.strength} for lora in bake.loras],
        "rule": bake.rule,
        "kernel": bake.kernel,
        "bytes": _bytes(bake.files),
        "changed": len(bake.changed),
    }


def _folder(folder: Path) -> dict[str, Any]:
    """A folder that is no overlay: its safetensors files, each in a line's worth."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith(".safetensors"))
    if not files:
        raise SourceError(
            "holds neither an overlay nor a .safetensors file", file=folder, next="ltxpack inspect FILE_OR_OVERLAY"
        )
    listed = []
    for path in files[:MAX_LISTED]:
        try:
            described = inspect_path(path)
            listed.append({"name": path.name, "kind": described["kind"], "bytes": described["bytes"]})
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
    """Bytes on disk: a symlink inside the overlay costs none."""
    return sum(record.size for record in records if record.link in (None, "hard"))


def _metadata(tensors: TensorFile) -> dict[str, str | None]:
    return {key: _cut(value) for key, value in sorted(tensors.metadata.items())[:MAX_LISTED]}


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= MAX_TEXT:
        return text
    return json.dumps(text[:MAX_TEXT])[1:-1] + "..."
