"""The statements that a LoRA makes beside its factors: fields of its header and its configuration. Untrusted.

Fields are in the header's metadata, flat or as JSON and under any prefix, and in PEFT's adapter_config.json. A table
says which spelling states which fact; lora_facts.py combines the statements of one LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ltxpack.errors import AdapterError, FormatError, LtxpackError
from ltxpack.files.tensorfile import TensorFile, parse_json, read_json, read_tensorfile
from ltxpack.ltx23.lora_keys import METHODS, parse_key
from ltxpack.ltx23.lora_patterns import Patterns

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# Its product with the largest strength, which is as large, still fits float32.
MAX_ALPHA = 1e18
HEADER = "the header"
# The most files beside a configuration that are opened to find its own.
MAX_BESIDE = 50

# Fields that, unless they are off, change the arithmetic of merging or the base of the adapter.
_UNSUPPORTED = (
    "fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora",
    "kasa_config", "monteclora_config",
)  # fmt: skip
# Fields that name trained tensors other than factors.
BESIDE = ("bias", "lora_bias", "modules_to_save", "target_parameters")
# Fact -> the fields that state it.
_SPELLED: Mapping[str, Sequence[str]] = {
    "alpha": ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha"),
    "rank": ("r", "lora_rank", "network_dim", "ss_network_dim", "rank"),
    "rslora": ("use_rslora", "rs_lora"),
    "dora": ("use_dora", "dora_wd"),
    "base": (
        "model_version", "modelspec.architecture", "ss_base_model_version", "base_model_name_or_path", "base_model",
    ),
    **{
        name: (name,)
        for name in (
            "peft_type", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_cayley_neumann",
            "num_cayley_neumann_terms", "coft", "eps", *BESIDE, *_UNSUPPORTED,
        )
    },
}  # fmt: skip
_FIELDS = {name: fact for fact, names in _SPELLED.items() for name in names}
_IC_LORA = re.compile(r"(?:ss_)?(?:reference_\w{0,40}(?:factor|scale)|ic_lora_\w{1,40})")
# JSON under a key of the header is a LoRA's configuration if the key says so or a field is no other program's.
_CONFIGURATIONS = ("lora_adapter_metadata", PEFT_CONFIG.removesuffix(".json"), "peft_config", "lora_config")
_DISTINCT = frozenset(_FIELDS) - {"r", "alpha", "rank", "bias", "base_model", "model_version", "coft", "eps"}
_TELLING = re.compile("|".join([*map(re.escape, sorted(_DISTINCT)), "reference_", "ic_lora_"]))
_DEEPEST = 3
# kohya writes None, and Dynamic for a file whose ranks differ.
_NOTHING = frozenset({"", "none", "null", "n/a", "unknown", "dynamic", "mixed", "various"})
# kohya takes alpha 0 for the rank.
_ZERO_IS_RANK = ("ss_network_alpha", "network_alpha")
# PEFT's kinds of adapters, and those whose ``r`` is no rank.
PEFT_METHODS, RANKLESS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT"), ("OFT", "BOFT")
# The start values that leave the base as it is; PEFT's others (pissa, olora, corda, loftq, lora_ga) take from it.
_HARMLESS_STARTS = ("true", "false", "default", "gaussian", "eva", "orthogonal", "mica")


class Configuration(NamedTuple):
    """A PEFT configuration as JSON, and how messages name its file."""

    document: Any
    file: Path


@dataclass(frozen=True)
class Statement:
    """One field: its ``fact``, its value as text or JSON, its name, the prefix of the name, and its ``place``."""

    fact: str
    value: Any
    name: str
    prefix: str
    place: str

    def __str__(self) -> str:
        shown = ".".join(part for part in (self.prefix, self.name) if part)
        return f"{shown} {str(self.value)[:80]} ({self.place})"


def configuration_beside(weights: Path) -> Path | None:
    """The adapter_config.json of a file of weights; None if there is none, or it may belong to another file."""
    config = weights.with_name(PEFT_CONFIG)
    try:
        if not config.is_file():
            return None
        if weights.name == PEFT_WEIGHTS:
            return config
        others = [path for path in weights.parent.iterdir() if not belongs(weights.name, [path.name])]
    except OSError:
        return None
    return None if len(others) > MAX_BESIDE or any(map(_holds_factors, others)) else config


def _holds_factors(path: Path) -> bool:
    """Whether ``path`` is an adapter, by its header."""
    roles = frozenset[str]().union(*(method.roles for method in METHODS[:-1]))
    try:
        return any(key.role in roles for key in map(parse_key, read_tensorfile(path).tensors) if key)
    except LtxpackError:
        return True


def belongs(weights: str, names: Iterable[str]) -> bool:
    """Whether an adapter_config.json beside ``names`` belongs to ``weights``: by PEFT's name, or as the only file."""
    others = (name for name in names if name != weights and not name.startswith("."))
    return weights == PEFT_WEIGHTS or not any(name.lower().endswith(".safetensors") for name in others)


def read_configuration(config: Path | None) -> Configuration | None:
    """The configuration in the file ``config``. Raises SourceError or FormatError."""
    return None if config is None else Configuration(read_json(config), config)


def statements_of(file: TensorFile, configuration: Configuration | None) -> Iterator[Statement]:
    if configuration is not None:
        if not isinstance(configuration.document, dict):
            raise AdapterError("adapter configuration is not a JSON object", file=configuration.file)
        yield from _fields(configuration.document, configuration.file.name, deepest=0)
    yield from _fields(file.metadata, HEADER, deepest=0)
    for key, text in file.metadata.items():
        known = key in _CONFIGURATIONS
        if not known and not (text.lstrip().startswith("{") and _TELLING.search(text)):
            continue
        try:
            document = parse_json(text, f"{file.path}: metadata {key}")
        except FormatError:
            if known:
                raise
            continue
        if not isinstance(document, dict):
            raise AdapterError("adapter configuration is not a JSON object", file=file.path, found=f"metadata {key}")
        found = list(_fields(document, f"{HEADER}'s {key}"))
        if known or any(one.name in _DISTINCT or one.fact == "use" for one in found):
            yield from found


def _fields(document: Mapping[str, Any], place: str, prefix: str = "", deepest: int = _DEEPEST) -> Iterator[Statement]:
    """The fields of a document that state a fact. Fields of an object in it have the object's name as a prefix."""
    for key, value in document.items():
        head, _, name = ("", "", key) if key in _FIELDS else key.rpartition(".")
        fact = _FIELDS.get(name) or ("use" if _IC_LORA.fullmatch(name) else None)
        below = ".".join(part for part in (prefix, head) if part)
        if fact is not None:
            yield Statement(fact, _unquoted(value), name, below, place)
        elif isinstance(value, dict) and deepest and not name.endswith(("_config", "_pattern")):
            yield from _fields(value, place, ".".join(part for part in (prefix, key) if part), deepest - 1)


def number_of(one: Statement, where: Path) -> float | None:
    """The number of a statement; None if it states nothing."""
    value = None if _says_nothing(one.value) else one.value
    if isinstance(value, str) and one.place != PEFT_CONFIG:
        try:
            value = float(value)
        except ValueError:
            value = None if one.fact == "rank" else value
    zero_is_rank = value == 0 and one.name in _ZERO_IS_RANK
    return None if value is None or zero_is_rank else _checked(value, one.name, where, one.fact == "rank")


def _checked(value: object, name: str, where: Path, is_rank: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        wanted = f"one of at most {MAX_ALPHA:g}"
        raise AdapterError(f"{name} is not a finite number", file=where, expected=wanted, found=value)
    if is_rank and (value != int(value) or not 0 < value < 1 << 31):
        raise AdapterError(f"{name} is not a positive whole number", file=where, found=value)
    return float(value)


def truth_of(one: Statement, where: Path) -> bool:
    value = one.value.lower() if isinstance(one.value, str) else one.value
    if value in (True, "true", "1"):
        return True
    if _says_nothing(value) or value in (False, "false", "0"):
        return False
    raise AdapterError(f"{one.name} is not true or false", file=where, found=one.value)


def patterns_of(one: Statement | None, where: Path) -> Patterns:
    if one is None or _says_nothing(one.value):
        return Patterns({})
    table = parse_json(one.value, f"{where}: {one.name}") if isinstance(one.value, str) else one.value
    if not isinstance(table, dict):
        raise AdapterError(f"{one.name} is not an object", file=where, found=type(table).__name__)
    ranks = one.fact == "rank_pattern"
    numbers = {pattern: _checked(value, one.name, where, ranks) for pattern, value in table.items()}
    return Patterns(numbers, one.name, where)


def refuse_other_methods(statements: Iterable[Statement], where: Path) -> None:
    """Raises AdapterError for an adapter that is no LoRA, or that cannot be merged into the clean base."""
    for one in statements:
        if one.fact == "peft_type" and not _says_nothing(one.value) and one.value not in PEFT_METHODS:
            raise AdapterError("is not a LoRA", file=where, expected="peft_type LORA", found=one.value)
        if one.fact in _UNSUPPORTED and is_set(one):
            raise AdapterError("uses what cannot be merged exactly", file=where, items=[one])
        start = one.value if one.fact == "init_lora_weights" and not _says_nothing(one.value) else True
        if str(start).lower() not in _HARMLESS_STARTS:
            raise AdapterError(
                "belongs to a base changed by its initialisation, not to this one", file=where,
                expected=f"init_lora_weights {', '.join(_HARMLESS_STARTS)}", found=one,
                next="save it converted to a plain LoRA (PEFT: path_initial_model_for_weight_conversion)",
            )  # fmt: skip


def _unquoted(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.strip()
    quoted = len(value) > 1 and value[0] == value[-1] == '"'
    return value[1:-1].strip() if quoted else value


def _says_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.lower() in _NOTHING)


def is_set(one: Statement) -> bool:
    """Whether a field is not off. kohya writes 0 and False for off, and 1 for a reference of full size."""
    off = ("false", "0", "0.0", "{}", "[]", *(("1", "1.0") if one.name.startswith("ss_reference") else ()))
    return bool(one.value) and not _says_nothing(one.value) and str(one.value).lower() not in off
