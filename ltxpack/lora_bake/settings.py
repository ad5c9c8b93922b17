"""What an adapter's own configuration says about rank and alpha: PEFT's adapter_config.json, or the same fields in
the ``lora_adapter_metadata`` that diffusers writes (spec 02, sections 1 and 2). Untrusted: patterns are bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ltxpack.errors import AdapterError
from ltxpack.tensorfile import parse_json, read_json

METADATA_KEY = "lora_adapter_metadata"
MAX_PATTERN_LENGTH = 512
MAX_REPEATS = 3

_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# Set to anything but off, these change what merging means or what base the adapter belongs to.
_UNSUPPORTED = ("fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora")
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_GROUP_REPEAT = re.compile(r"\)\s*[*+?{]")


_Value = TypeVar("_Value")


class PatternTable(Generic[_Value]):
    """PEFT's ``rank_pattern`` or ``alpha_pattern``: the first pattern that matches a whole dotted ending wins.

    Plain names, the usual case and there may be thousands, are looked up instead of matched.
    """

    def __init__(self, table: Mapping[str, _Value]) -> None:
        self._values = list(table.values())
        self._plain = {pattern: i for i, pattern in enumerate(table) if _PLAIN.fullmatch(pattern)}
        self._expressions = [
            (i, re.compile(rf"(.*\.)?({pattern})$")) for i, pattern in enumerate(table) if pattern not in self._plain
        ]

    def __bool__(self) -> bool:
        return bool(self._values)

    def find(self, module: str, default: _Value | None) -> _Value | None:
        """The value for ``module``, or ``default``."""
        parts = module.split(".")
        endings = (".".join(parts[i:]) for i in range(len(parts)))
        first = min((self._plain[ending] for ending in endings if ending in self._plain), default=len(self._values))
        for i, expression in self._expressions:
            if i < first and expression.match(module):
                first = i
                break
        return self._values[first] if first < len(self._values) else default


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
    ranks = _pattern_table(values["rank_pattern"], "rank_pattern", path)
    alphas = _pattern_table(values["alpha_pattern"], "alpha_pattern", path)
    return Settings(
        rank=None if values["r"] is None else _rank(values["r"], "r", path),
        alpha=None if values["lora_alpha"] is None else _number(values["lora_alpha"], "lora_alpha", path),
        rslora=bool(rslora),
        ranks=PatternTable({pattern: _rank(value, "rank_pattern", path) for pattern, value in ranks.items()}),
        alphas=PatternTable({pattern: _number(value, "alpha_pattern", path) for pattern, value in alphas.items()}),
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{name} is not a finite number", file=path, found=value)
    return float(value)


def _rank(value: object, name: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise AdapterError(f"{name} is not a positive whole number", file=path, found=value)
    return value


def _pattern_table(value: object, name: str, path: Path) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name} is not an object", file=path, found=type(value).__name__)
    for pattern in value:
        _check_pattern(pattern, name, path)
    return value


def _check_pattern(pattern: str, name: str, path: Path) -> None:
    """Patterns are regular expressions in PEFT; those that could run for ever are refused."""
    repeats = sum(pattern.count(sign) for sign in "*+{?")
    if len(pattern) > MAX_PATTERN_LENGTH or repeats > MAX_REPEATS or _GROUP_REPEAT.search(pattern):
        raise AdapterError(f"{name} has a pattern that is too involved", file=path, found=pattern[:80])
    if _PLAIN.fullmatch(pattern):
        return
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{name} has a pattern that is not sound: {error}", file=path, found=pattern[:80]) from None
