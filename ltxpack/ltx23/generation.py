"""Which generation of the model a checkpoint is, from its safetensors metadata (spec 01, section 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ltxpack.errors import UnsupportedError
from ltxpack.files.tensorfile import parse_json
from ltxpack.ltx23.releases import OFFICIAL_REPO

SUPPORTED = (2, 3)
CRF_BEFORE_2_4 = 33
CRF_FROM_2_4 = 18
MAX_LICENCE = 100_000


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about itself. ``model_version`` is verbatim."""

    config: Mapping[str, Any]
    model_version: str
    licence: str | None

    @property
    def image_crf(self) -> int:
        """The default x264 CRF of image conditioning (spec 04, section 4)."""
        return default_image_crf(self.model_version)


def parse_version(text: str) -> tuple[int, ...]:
    """``"2.3.0-rc1"`` -> (2, 3, 0): parts split at ``.`` and ``-`` up to the first that is not a number."""
    numbers: list[int] = []
    for part in text.replace("-", ".").split("."):
        if not (part.isascii() and part.isdigit() and len(part) < 10):
            break
        numbers.append(int(part))
    return tuple(numbers)


def default_image_crf(model_version: str) -> int:
    """33 before model version 2.4, 18 from there on."""
    return CRF_FROM_2_4 if parse_version(model_version) >= (2, 4) else CRF_BEFORE_2_4


def read_metadata(metadata: Mapping[str, str], names: Iterable[str], file: object) -> Metadata:
    """The metadata of an LTX-2.3 checkpoint with tensors ``names``. Raises UnsupportedError for another generation."""
    version = _plain(metadata, "model_version")
    generation = parse_version(version or "")
    if version is not None and generation[:2] != SUPPORTED:
        raise UnsupportedError(
            "is a checkpoint of another generation", file=str(file), expected="model_version 2.3.x",
            found=f"model_version {version}", next=f"get the LTX-2.3 checkpoint ({OFFICIAL_REPO})",
        )  # fmt: skip
    foreign = sorted({name.split(".")[0] for name in names if name.startswith("duration_head.")})
    if foreign:
        raise UnsupportedError(
            "is a checkpoint of another generation (LTX-2.5)", file=str(file), expected="tensors of LTX-2.3",
            found=f"{foreign[0]}.*", next=f"get the LTX-2.3 checkpoint ({OFFICIAL_REPO})",
        )  # fmt: skip
    missing = [name for name in ("config", "model_version") if name not in metadata]
    if missing:
        raise UnsupportedError(
            "is not an all-in-one LTX-2.3 checkpoint", file=str(file),
            expected="safetensors metadata with `config` and `model_version`", found=f"no {' and no '.join(missing)}",
            next="ltxpack inspect FILE",
        )  # fmt: skip
    config = parse_json(metadata["config"].encode("utf-8", "surrogatepass"), f"{file}: metadata `config`")
    if not isinstance(config, Mapping):
        raise UnsupportedError("metadata `config` is not an object", file=str(file), next="ltxpack inspect FILE")
    licence = _plain(metadata, "license") or _plain(metadata, "licence")
    assert version is not None
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
