"""Recognises a published file by its content, and the generation of a model by its metadata.

The two distilled LoRAs have the same size and nearly the same name, so that only a hash tells them apart (spec 01,
section 1). The hub states the hash, or the name of a blob in a hub cache does; ltxpack does not hash 46 GB for a name.
The generation is in a checkpoint's safetensors metadata (spec 01, section 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ltxpack.errors import UnsupportedError
from ltxpack.files.tensorfile import parse_json

# The inputs of an overlay.
CHECKPOINT, LORA, UPSAMPLER, TEXT_ENCODER = "checkpoint", "lora", "upsampler", "text_encoder"
# The pattern of each input's file name in a folder, and its name in the official repository.
PATTERNS = {CHECKPOINT: "*dev*", LORA: "*distilled-lora*", UPSAMPLER: "*spatial-upscaler-x2*"}
DEFAULT_FILES = {
    CHECKPOINT: "ltx-2.3-22b-dev.safetensors",
    LORA: "ltx-2.3-22b-distilled-lora-384-1.1.safetensors",
    UPSAMPLER: "ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
}
# The file to take for a distilled checkpoint.
DISTILLED_FILE = "ltx-2.3-22b-distilled-1.1.safetensors"
OFFICIAL_REPO = "Lightricks/LTX-2.3"
TEXT_ENCODER_REPO = "google/gemma-3-12b-it-qat-q4_0-unquantized"

SUPPORTED = (2, 3)
# The default x264 CRF of image conditioning (spec 04, section 4).
IMAGE_CRF = 33
MAX_LICENCE = 100_000


@dataclass(frozen=True)
class Release:
    name: str
    size: int
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"


RELEASES = tuple(
    Release(f"ltx-2.3-22b-{name}", size, sha256)
    for name, size, sha256 in (
        ("dev", 46_149_344_974, "7ab7225325bc403448ea84b6db2269811a880e5118cd2ee2b6282a93d585016f"),
        ("distilled", 46_149_345_038, "14409a4d1337a8ded02fa87fb895b17a91ab2c6588f7cc3352e624ff18a689bf"),
        ("distilled-1.1", 46_149_345_334, "b33b7fe4bbfe084f484be4aaf90b0f1d95dca20d403ac4c0e037eb8c4f0af7cc"),
        ("distilled-lora-384", 7_605_507_256, "2943ab994f3c9d88052e5a2a34cca14e4a2dfc36b1d8c407931d52d5c25dd72b"),
        ("distilled-lora-384-1.1", 7_605_507_256, "f5d4953f3386197a4b4f5abdb17616ff256171e8075c111d6e7d2dfa6e823b3a"),
    )
)


@dataclass(frozen=True)
class Recognised:
    """The release with a file's hash, and a warning if its name belongs to another one."""

    release: Release | None
    warning: str | None = None


def recognise(name: str, size: int, sha256: str | None) -> Recognised:
    """The known release of a file. Without a hash, only a wrong size is found."""
    promised = next((release for release in RELEASES if release.file == name), None)
    if sha256 is None:
        if promised is not None and promised.size != size:
            return Recognised(None, f"{name} has {size} bytes; the published file has {promised.size}")
        return Recognised(None)
    release = next((release for release in RELEASES if release.sha256 == sha256), None)
    if promised is None or promised is release:
        return Recognised(release)
    content = f"is {release.file} by its content" if release else "has unknown content"
    return Recognised(release, f"{name} {content} (sha256 {sha256}); the published file has {promised.sha256}")


def likely(name: str, size: int) -> Release | None:
    """The release with this name and size, which is no proof: two LoRAs share a size."""
    return next((release for release in RELEASES if release.file == name and release.size == size), None)


@dataclass(frozen=True)
class Metadata:
    """The metadata of a checkpoint. ``model_version`` is verbatim."""

    config: Mapping[str, Any]
    model_version: str
    licence: str | None


def parse_version(text: str) -> tuple[int, ...]:
    """``"2.3.0-rc1"`` -> (2, 3, 0): parts split at ``.`` and ``-`` up to the first that is not a number."""
    numbers: list[int] = []
    for part in text.replace("-", ".").split("."):
        if not (part.isascii() and part.isdigit() and len(part) < 10):
            break
        numbers.append(int(part))
    return tuple(numbers)


def read_metadata(metadata: Mapping[str, str], names: Iterable[str], file: object) -> Metadata:
    """The metadata of an LTX-2.3 checkpoint with tensors ``names``. Raises UnsupportedError for another generation."""
    version = _plain(metadata, "model_version")
    again = f"ltxpack materialize {OFFICIAL_REPO} OVERLAY (takes the LTX-2.3 checkpoint)"
    refused, other = partial(UnsupportedError, file=str(file), next=again), "is a checkpoint of another generation"
    names = list(names)
    if version is not None and parse_version(version)[:2] != SUPPORTED:
        raise refused(other, expected="model_version 2.3.x", found=f"model_version {version}")
    if any(name.startswith("duration_head.") for name in names):
        raise refused(f"{other} (LTX-2.5)", expected="tensors of LTX-2.3", found="duration_head.*")
    told = ("transformer_blocks.", "prompt_adaln_single.")
    if version is None and [any(part in name for name in names) for part in told] == [True, False]:
        found = "no prompt_adaln_single, and no model_version in the metadata"
        raise refused(f"{other} (LTX-2 or earlier)", expected="tensors of LTX-2.3", found=found)
    missing = [name for name in ("config", "model_version") if name not in metadata]
    if missing or version is None:
        expected, found = "safetensors metadata with `config` and `model_version`", f"no {' and no '.join(missing)}"
        raise refused("is not an all-in-one LTX-2.3 checkpoint", expected=expected, found=found)
    config = parse_json(metadata["config"], f"{file}: metadata `config`")
    if not isinstance(config, Mapping):
        raise UnsupportedError("metadata `config` is not an object", file=str(file), next="ltxpack inspect FILE")
    licence = _plain(metadata, "license") or _plain(metadata, "licence")
    return Metadata(config, version, licence[:MAX_LICENCE] if licence else None)


def _plain(metadata: Mapping[str, str], key: str) -> str | None:
    """A metadata value as text: writers store it bare or as a JSON string."""
    value = metadata.get(key)
    if value is None:
        return None
    text = value.strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and "\\" not in text and '"' not in text[1:-1]:
        text = text[1:-1]
    return text
