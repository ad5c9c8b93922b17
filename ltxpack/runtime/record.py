"""The record beside a video, from which a repeated command knows that the video is done.

``boat.mp4`` gets ``boat.mp4.json`` with the request and two hashes: one of all inputs of the video, one of the video
file. A video is done while both are unchanged. Another prompt, setting, image content or overlay, or another file in
its place, means that ltxpack makes it again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from blake3 import blake3

from ltxpack.errors import LtxpackError, SourceError, UsageError
from ltxpack.files.publish import atomic_write, output_errors
from ltxpack.files.reader import hash_file
from ltxpack.files.tensorfile import open_source, read_json
from ltxpack.ltx23.classes import LOADED_CLASSES
from ltxpack.manifest import FP8, FileRecord
from ltxpack.runtime.overlay import Overlay, form_of, transformer_part
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import Guidance, stage_flag
from ltxpack.runtime.settings import TOKEN, Settings

FORMAT = 1
MADE_BY = "ltxpack run --prompts"
BEGINNING = json.dumps({"made_by": MADE_BY}, indent=1).removesuffix("\n}").encode()
MAX_BYTES = 1024 * 1024


def record_path(output: Path) -> Path:
    """The path of the record of the video ``output``."""
    return output.with_name(f"{output.name}.json")


def is_free(output: Path) -> None:
    """Raises UsageError if a file that is no record of ours has the name of the record."""
    path = record_path(output)
    if path.exists() and _read(path) is None and not _begins_as_ours(path):
        raise UsageError("would be overwritten, and ltxpack did not write it", file=path, next=f"move {path}")


def described(
    request: Request, overlay: Overlay, transformers: Sequence[str], dtype: str, fp8: str = TOKEN
) -> dict[str, Any]:
    """All inputs of the video of ``request``, as JSON. Raises SourceError for an unreadable image."""
    settings = request.settings
    found: dict[str, Any] = {"prompt": request.prompt.strip()}
    found |= {one.name: getattr(settings, one.name) for one in fields(settings) if "guides" not in one.metadata}
    found["negative_prompt"] = request.negative_prompt.strip()
    found["guidance"] = {"video": _guidance(settings.guidance.video), "audio": _guidance(settings.guidance.audio)}
    found["images"] = [
        {"frame": image.frame, "strength": image.strength, "blake3": hash_file(image.path, cached=True)}
        for image in request.images
    ]
    if settings.image_crf is None:
        found["image_crf"] = overlay.manifest.image_crf
    if settings.recipe == Settings.recipe:
        # A record from a version without recipes must give the same fingerprint.
        del found["recipe"]
    if settings.keep_steps is None:
        del found["keep_steps"]
    if fp8 != TOKEN and any(form_of(overlay.manifest, name) == FP8 for name in transformers):
        found["fp8"] = fp8
    found |= {stage_flag(number): name for number, name in enumerate(transformers)}
    if overlay.text:
        found["text_encoder"] = overlay.text.rpartition("/")[2]
    return found | {"dtype": dtype}


def fingerprint(description: Mapping[str, Any], transformers: Sequence[str], overlay: Overlay) -> str:
    """The hash of ``description`` and of the weights for it."""
    weights = {
        name: _hashes(overlay.records(name)) for name in sorted({*LOADED_CLASSES, "tokenizer"} - {"transformer"})
    }
    weights |= {
        stage_flag(number): _hashes(overlay.records(transformer_part(name))) for number, name in enumerate(transformers)
    }
    document = {"format": FORMAT, "request": description, "weights": weights}
    return blake3(json.dumps(document, sort_keys=True).encode()).hexdigest()


def is_done(output: Path, wanted: str) -> bool:
    """Whether ``output`` is, byte for byte, the video of a record with the fingerprint ``wanted``."""
    record = _read(record_path(output))
    if record is None or record.get("fingerprint") != wanted:
        return False
    try:
        return record.get("video_blake3") == hash_file(output, cached=True)
    except SourceError:
        return False


def made_as(output: Path) -> str | None:
    """The fingerprint in the record of the video at ``output``, whose bytes it does not read; None without one."""
    found = _read(record_path(output)) if output.is_file() else None
    return None if found is None else str(found.get("fingerprint"))


def write_record(
    output: Path,
    video_blake3: str,
    description: Mapping[str, Any],
    fingerprint: str,
    seconds: Mapping[str, float],
    attention: str,
) -> None:
    """Write the record of the finished video ``output``. Raises UnwrittenError.

    ``video_blake3`` is the hash of the video that was made: another run may have replaced the file since. The
    fingerprint leaves out the ``attention`` kernel, because ``auto`` may choose another one next time.
    """
    document = {
        "made_by": MADE_BY,
        "format": FORMAT,
        "fingerprint": fingerprint,
        "video_blake3": video_blake3,
        "request": dict(description),
        "attention": attention,
        "seconds": {phase: round(count, 3) for phase, count in seconds.items()},
    }
    with output_errors(record_path(output)):
        atomic_write(record_path(output), (json.dumps(document, indent=1, ensure_ascii=True) + "\n").encode())


def _read(path: Path) -> dict[str, Any] | None:
    """The record at ``path``, or None if there is no record of ours."""
    try:
        document = read_json(path, MAX_BYTES)
    except LtxpackError:
        return None
    ours = isinstance(document, dict) and document.get("made_by") == MADE_BY and document.get("format") == FORMAT
    return document if ours else None


def _begins_as_ours(path: Path) -> bool:
    """Whether the file is a record of another version, or the beginning of one, as of a copy that broke off."""
    try:
        with open_source(path) as file:
            return BEGINNING.startswith(file.read(len(BEGINNING)))
    except SourceError:
        return False


def _guidance(guidance: Guidance) -> dict[str, Any]:
    strengths = dataclasses.asdict(guidance)
    if not guidance.skip:
        # As in records of versions without skip steps.
        del strengths["skip"]
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in strengths.items()}


def _hashes(records: tuple[FileRecord, ...]) -> list[str]:
    return [record.blake3 for record in sorted(records, key=lambda record: record.path)]
