"""What an adapter's own configuration says about rank and alpha (spec 02, sections 1 and 2). Untrusted.

PEFT writes it as adapter_config.json, diffusers writes the same fields into the ``lora_adapter_metadata`` of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltxpack.errors import AdapterError
from ltxpack.files.tensorfile import parse_json

# Times the largest strength, which is as large, it still fits float32.
MAX_ALPHA = 1e18
# Longer than any name of a module.
MAX_PATTERN = 512
METADATA_KEY = "lora_adapter_metadata"

# Set to anything but off, these change what merging means or what base the adapter belongs to.
_UNSUPPORTED = ("fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora")
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")
_PLAIN = re.compile(r"(\^?)([A-Za-z0-9_-]+(?:\\?\.[A-Za-z0-9_-]+)*)\$?")


class Patterns:
    """PEFT's ``rank_pattern`` or ``alpha_pattern``: module names, or endings of them that begin after a dot.

    PEFT takes regular expressions and the first one that matches a module wins. Here a pattern must be a plain name,
    with ``^`` before it if it is the whole name. Raises AdapterError for any other pattern.
    """

    def __init__(self, table: Mapping[str, float], name: str = "", file: Path | None = None) -> None:
        self.name = name
        self._entries: dict[str, tuple[int, str, float]] = {}
        for number, (pattern, value) in enumerate(table.items()):
            plain = _PLAIN.fullmatch(pattern)
            if plain is None or len(pattern) > MAX_PATTERN:
                raise AdapterError(
                    f"{name} has a pattern that is no plain module name", file=file, found=pattern[:80],
                    expected="a module's name or an ending of it, such as attn1.to_q",
                    next=f"write plain module names in {name}",
                )  # fmt: skip
            self._entries.setdefault(plain[1] + plain[2].replace("\\", ""), (number, pattern, value))

    def __bool__(self) -> bool:
        return bool(self._entries)

    def find(self, path: str, module: str, default: float | None) -> float | None:
        """The value for a module: ``path`` is its name in the wrapped model, ``module`` the same without prefixes."""
        found = [self._entries[name] for name in _endings(path, module) if name in self._entries]
        return min(found, key=lambda entry: entry[0])[2] if found else default

    def unused(self, modules: Iterable[tuple[str, str]]) -> list[str]:
        """The patterns that match none of ``modules``, given as (path, module)."""
        used = {name for path, module in modules for name in _endings(path, module) if name in self._entries}
        return [pattern for name, (_, pattern, _) in self._entries.items() if name not in used]


def _endings(path: str, module: str) -> Iterator[str]:
    """What a pattern may be: the whole name, with and without the wrapped model's prefix, and what follows each dot."""
    yield f"^{path}"
    yield f"^{module}"
    at = 0
    while True:
        yield path[at:]
        at = path.find(".", at) + 1
        if at == 0:
            return


@dataclass(frozen=True)
class PeftConfig:
    """``rank`` and ``alpha`` hold for all modules that no pattern names; None where the file does not say."""

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    ranks: Patterns = field(default_factory=lambda: Patterns({}))
    alphas: Patterns = field(default_factory=lambda: Patterns({}))

    def factor(self, alpha: float | None, rank: int) -> float:
        """What strength is multiplied by: alpha/rank, alpha/sqrt(rank) with rslora, 1 without alpha."""
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def unused_patterns(self, modules: Iterable[tuple[str, str]]) -> list[str]:
        """A sentence for each field with patterns that match none of ``modules``, given as (path, module)."""
        modules, sentences = list(modules), []
        for patterns in (self.ranks, self.alphas):
            if patterns and (unused := patterns.unused(modules)):
                shown = ", ".join(unused[:5]) + (" …" if len(unused) > 5 else "")
                count = f"{len(unused)} pattern{'' if len(unused) == 1 else 's'}"
                sentences.append(f"{patterns.name} has {count} matching none of its modules: {shown}")
        return sentences


def from_metadata(metadata: Mapping[str, str], path: Path) -> PeftConfig:
    """The fields in ``__metadata__``; empty where diffusers wrote none. Raises AdapterError or FormatError."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return PeftConfig()
    document = parse_json(text.encode("utf-8", "surrogatepass"), f"{path}: metadata {METADATA_KEY}")
    if isinstance(document, dict):
        parts = {name: value for name, value in document.items() if name.startswith("transformer.")}
        document = {name.removeprefix("transformer."): value for name, value in parts.items()} or document
    return from_document(document, path)


def from_document(document: Any, path: Path) -> PeftConfig:
    """The fields of a PEFT LoraConfig as JSON. Raises AdapterError where a field has a wrong type or is not ours."""
    if not isinstance(document, dict):
        raise AdapterError("adapter configuration is not a JSON object", file=path)
    _refuse_other_methods(document, path)
    rank, alpha, rslora = (document.get(name) for name in ("r", "lora_alpha", "use_rslora"))
    if rslora not in (None, True, False):
        raise AdapterError("use_rslora is not true or false", file=path, found=rslora)
    return PeftConfig(
        rank=None if rank is None else _rank(rank, "r", path),
        alpha=None if alpha is None else _number(alpha, "lora_alpha", path),
        rslora=bool(rslora),
        ranks=_patterns(document, "rank_pattern", _rank, path),
        alphas=_patterns(document, "alpha_pattern", _number, path),
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
        problem = "belongs to a base changed by its initialisation, not to this one"
        advice = "save it converted to a plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        raise AdapterError(problem, file=path, found=f"init_lora_weights {start}", next=advice)


def _number(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        wanted = f"one of at most {MAX_ALPHA:g}"
        raise AdapterError(f"{name} is not a finite number", file=path, expected=wanted, found=value)
    return float(value)


def _rank(value: object, name: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise AdapterError(f"{name} is not a positive whole number", file=path, found=value)
    return value


def _patterns(
    document: Mapping[str, Any], name: str, read: Callable[[object, str, Path], float], path: Path
) -> Patterns:
    table = {} if document.get(name) is None else document[name]
    if not isinstance(table, dict):
        raise AdapterError(f"{name} is not an object", file=path, found=type(table).__name__)
    return Patterns({pattern: read(value, name, path) for pattern, value in table.items()}, name, path)
