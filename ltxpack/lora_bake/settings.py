"""What an adapter's own configuration says about rank and alpha: PEFT's adapter_config.json, or the same fields in
the ``lora_adapter_metadata`` that diffusers writes (spec 02, sections 1 and 2). Untrusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltxpack.errors import AdapterError
from ltxpack.files.tensorfile import parse_json, read_json
from ltxpack.lora_bake.patterns import PatternTable

# Times the largest strength, which is as large, it still fits float32.
MAX_ALPHA = 1e18
METADATA_KEY = "lora_adapter_metadata"

_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# Set to anything but off, these change what merging means or what base the adapter belongs to.
_UNSUPPORTED = ("fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora")
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Settings:
    """``rank`` and ``alpha`` hold for all modules that no pattern names; None where the file does not say."""

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    ranks: PatternTable[int] = field(default_factory=lambda: PatternTable({}))
    alphas: PatternTable[float] = field(default_factory=lambda: PatternTable({}))

    @property
    def says_alpha(self) -> bool:
        """Whether any alpha is given."""
        return self.alpha is not None or bool(self.alphas)

    def rank_of(self, module: str) -> int | None:
        """The rank stated for ``module`` (as the file spells it, without prefix)."""
        return self.ranks.find(module, self.rank)

    def alpha_of(self, module: str) -> float | None:
        """The alpha stated for ``module``."""
        return self.alphas.find(module, self.alpha)

    def factor(self, alpha: float | None, rank: int) -> float:
        """What strength is multiplied by: alpha/rank, alpha/sqrt(rank) with rslora, 1 without alpha."""
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def from_config_file(path: Path) -> Settings:
    """Settings of a PEFT ``adapter_config.json``. Raises AdapterError, FormatError or SourceError."""
    return from_document(read_json(path), path)


def from_metadata(metadata: Mapping[str, str], path: Path) -> Settings:
    """Settings from ``__metadata__``; empty where diffusers wrote none. Raises AdapterError or FormatError."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return Settings()
    document = parse_json(text.encode("utf-8", "surrogatepass"), f"{path}: metadata {METADATA_KEY}")
    if isinstance(document, dict):
        parts = {name: value for name, value in document.items() if name.startswith("transformer.")}
        document = {name.removeprefix("transformer."): value for name, value in parts.items()} or document
    return from_document(document, path)


def from_document(document: Any, path: Path) -> Settings:
    """Settings from a PEFT LoraConfig as JSON. Raises AdapterError where a field has a wrong type or is not ours."""
    if not isinstance(document, dict):
        raise AdapterError("adapter configuration is not a JSON object", file=path)
    _refuse_other_methods(document, path)
    values = {name: document.get(name) for name in _FIELDS}
    rslora = values["use_rslora"]
    if rslora not in (None, True, False):
        raise AdapterError("use_rslora is not true or false", file=path, found=rslora)
    ranks = _table(values["rank_pattern"], "rank_pattern", path)
    alphas = _table(values["alpha_pattern"], "alpha_pattern", path)
    return Settings(
        rank=None if values["r"] is None else _rank(values["r"], "r", path),
        alpha=None if values["lora_alpha"] is None else _number(values["lora_alpha"], "lora_alpha", path),
        rslora=bool(rslora),
        ranks=PatternTable({p: _rank(value, "rank_pattern", path) for p, value in ranks.items()}, "rank_pattern", path),
        alphas=PatternTable(
            {p: _number(value, "alpha_pattern", path) for p, value in alphas.items()}, "alpha_pattern", path
        ),
    )


def _refuse_other_methods(document: Mapping[str, Any], path: Path) -> None:
    kind = document.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError("is not a LoRA", file=path, expected="peft_type LORA", found=kind)
    wrong = [name for name in _UNSUPPORTED if document.get(name)]
    if wrong:
        raise AdapterError("uses what cannot be merged exactly", file=path, items=wrong)
    start = document.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise AdapterError(
            "belongs to a base changed by its initialisation, not to this one",
            file=path,
            found=f"init_lora_weights {start}",
            next="save it converted to a plain LoRA (PEFT: path_initial_model_for_weight_conversion)",
        )


def _number(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise AdapterError(
            f"{name} is not a finite number", file=path, expected=f"one of at most {MAX_ALPHA:g}", found=value
        )
    return float(value)


def _rank(value: object, name: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise AdapterError(f"{name} is not a positive whole number", file=path, found=value)
    return value


def _table(value: object, name: str, path: Path) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name} is not an object", file=path, found=type(value).__name__)
    return value
