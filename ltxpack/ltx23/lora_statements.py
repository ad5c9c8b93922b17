"""The statements that a LoRA makes beside its factors: fields of its header and its configuration. Untrusted.

Fields are in the header's metadata, flat or as JSON and under any prefix, and in PEFT's adapter_config.json. A table
says which spelling states which fact; lora_facts.py combines the statements of one LoRA.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ltxpack.errors import AdapterError, FormatError, LtxpackError
from ltxpack.files.tensorfile import TensorFile, parse_json, read_json, read_tensorfile
from ltxpack.ltx23.lora_keys import METHODS, parse_key

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
    """One field of ``file``: its ``fact``, its name, the prefix of the name, and its ``place`` in words.

    ``value``: text or JSON; None for a field that states nothing.
    """

    fact: str
    value: Any
    name: str
    prefix: str
    place: str
    file: Path

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
        others = [path for path in weights.parent.iterdir() if not _belongs(weights.name, [path.name])]
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


def configuration_among(files: Collection[str], weights: str) -> str:
    """The name among ``files`` of a repo that the adapter_config.json of ``weights`` must have; "" if it has none."""
    place = PurePosixPath(weights)
    others = [path.name for path in map(PurePosixPath, files) if path.parent == place.parent]
    return str(place.with_name(PEFT_CONFIG)) if _belongs(place.name, others) else ""


def _belongs(weights: str, names: Iterable[str]) -> bool:
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
        yield from _fields(configuration.document, configuration.file.name, configuration.file, deepest=0)
    yield from _fields(file.metadata, HEADER, file.path, deepest=0)
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
        found = list(_fields(document, f"{HEADER}'s {key}", file.path))
        if known or any(one.name in _DISTINCT or one.fact == "use" for one in found):
            yield from found


def _fields(
    document: Mapping[str, Any], place: str, file: Path, prefix: str = "", deepest: int = _DEEPEST
) -> Iterator[Statement]:
    """The fields of a document that state a fact. Fields of an object in it have the object's name as a prefix."""
    for key, value in document.items():
        head, _, name = ("", "", key) if key in _FIELDS else key.rpartition(".")
        fact = _FIELDS.get(name) or ("use" if _IC_LORA.fullmatch(name) else None)
        below = ".".join(part for part in (prefix, head) if part)
        if fact is not None:
            yield Statement(fact, _stated(value), name, below, place, file)
        elif isinstance(value, dict) and deepest and not name.endswith(("_config", "_pattern")):
            yield from _fields(value, place, file, ".".join(part for part in (prefix, key) if part), deepest - 1)


def _stated(value: Any) -> Any:
    """A field's value, text without quotes; None for a word that states nothing."""
    if not isinstance(value, str):
        return value
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = value[1:-1].strip()
    return None if value.lower() in _NOTHING else value


def number_of(one: Statement) -> float | None:
    """The number of a statement; None if it states nothing. Raises AdapterError."""
    value = one.value
    if isinstance(value, str) and one.place != PEFT_CONFIG:
        try:
            value = float(value)
        except ValueError:
            value = None if one.fact == "rank" else value
    zero_is_rank = value == 0 and one.name in _ZERO_IS_RANK
    return None if value is None or zero_is_rank else _checked(value, one)


def _checked(value: object, one: Statement) -> float:
    """``value``, which ``one`` states, as a number. Raises AdapterError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        wanted = f"one of at most {MAX_ALPHA:g}"
        raise AdapterError(f"{one.name} is not a finite number", file=one.file, expected=wanted, found=value)
    if one.fact in ("rank", "rank_pattern") and (value != int(value) or not 0 < value < 1 << 31):
        raise AdapterError(f"{one.name} is not a positive whole number", file=one.file, found=value)
    return float(value)


def truth_of(one: Statement) -> bool:
    """Whether a statement says yes. Raises AdapterError."""
    value = one.value.lower() if isinstance(one.value, str) else one.value
    if value in (True, "true", "1"):
        return True
    if value in (None, False, "false", "0"):
        return False
    raise AdapterError(f"{one.name} is not true or false", file=one.file, found=one.value)


def patterns_of(one: Statement | None) -> Patterns:
    """The table of a statement, empty without one. Raises AdapterError or FormatError."""
    if one is None or one.value is None:
        return Patterns()
    table = parse_json(one.value, f"{one.file}: {one.name}") if isinstance(one.value, str) else one.value
    if not isinstance(table, dict):
        raise AdapterError(f"{one.name} is not an object", file=one.file, found=type(table).__name__)
    return Patterns({pattern: _checked(value, one) for pattern, value in table.items()}, one.name, one.file)


def refuse_other_methods(statements: Iterable[Statement]) -> None:
    """Raises AdapterError for an adapter that is no LoRA, or that cannot be merged into the clean base."""
    for one in statements:
        if one.fact == "peft_type" and one.value not in (None, *PEFT_METHODS):
            raise AdapterError("is not a LoRA", file=one.file, expected="peft_type LORA", found=one.value)
        if one.fact in _UNSUPPORTED and is_set(one):
            raise AdapterError("uses what cannot be merged exactly", file=one.file, items=[one])
        started = one.fact == "init_lora_weights" and one.value is not None
        if started and str(one.value).lower() not in _HARMLESS_STARTS:
            raise AdapterError(
                "belongs to a base changed by its initialisation, not to this one", file=one.file,
                expected=f"init_lora_weights {', '.join(_HARMLESS_STARTS)}", found=one,
                next="save it converted to a plain LoRA (PEFT: path_initial_model_for_weight_conversion)",
            )  # fmt: skip


def is_set(one: Statement) -> bool:
    """Whether a field is not off. kohya writes 0 and False for off, and 1 for a reference of full size."""
    off = ("false", "0", "0.0", "{}", "[]", *(("1", "1.0") if one.name.startswith("ss_reference") else ()))
    return bool(one.value) and str(one.value).lower() not in off


# Patterns

# Longer than any name of a module.
MAX_PATTERN = 512
# The most different places of dots in a file's patterns: a name is compared once for each. One pattern for each linear
# of the published transformer makes 42.
MAX_MASKS = 128
_PLAIN = re.compile(r"(\^?)([A-Za-z0-9_-]+(?:\\?\.[A-Za-z0-9_-]+)*)\$?")

Mask = tuple[int, ...]
"""The places of a pattern's unescaped dots, each of which matches any one character, as in a regular expression."""


class Patterns:
    """PEFT's rank_pattern or alpha_pattern: the value that it gives to a module.

    PEFT takes regular expressions. The first one wins that matches a module's name, or the part after one of its dots,
    to the end. Here a pattern must be a plain name, with ``^`` before a whole one, because no expression of a stranger
    is run. Raises AdapterError for any richer pattern, naming it.
    """

    def __init__(self, table: Mapping[str, float] | None = None, name: str = "", file: Path | None = None) -> None:
        self.name = name
        self._known: dict[str, list[tuple[int, str, float]]] = {}
        # (whole name only, length) -> the places of dots in such patterns
        self._masks: dict[tuple[bool, int], set[Mask]] = defaultdict(set)
        # (whole name only, places of dots, the text with dots there) -> number, pattern and value
        self._entries: dict[tuple[bool, Mask, str], tuple[int, str, float]] = {}
        for number, (pattern, value) in enumerate((table or {}).items()):
            plain = _PLAIN.fullmatch(pattern)
            if plain is None or len(pattern) > MAX_PATTERN:
                raise AdapterError(
                    f"{name} has a pattern that is no plain module name", file=file, found=pattern[:80],
                    expected="a module's name or an ending of it, such as attn1.to_q",
                    next=f"write plain module names in {name}",
                )  # fmt: skip
            text = plain[2].replace("\\.", "\0")
            mask = tuple(i for i, letter in enumerate(text) if letter == ".")
            self._masks[bool(plain[1]), len(text)].add(mask)
            self._entries.setdefault((bool(plain[1]), mask, text.replace("\0", ".")), (number, pattern, value))
        if sum(map(len, self._masks.values())) > MAX_MASKS:
            raise AdapterError(f"{name} has too many patterns of different forms", file=file, expected=MAX_MASKS)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def find(self, names: Sequence[str], default: float | None) -> float | None:
        """The value for a module that may be called any of ``names`` in the model that PEFT wrapped."""
        return min(self._matches(names), key=lambda entry: entry[0], default=(0, "", default))[2]

    def values(self, names: Sequence[str]) -> set[float | None]:
        """The values of all matching patterns: PEFT sorts patterns when it saves them, so the first may be another."""
        return {value for _, _, value in self._matches(names)}

    def unused(self, modules: Iterable[Sequence[str]]) -> list[str]:
        """The patterns that match none of ``modules``, each given by its names."""
        used = {number for names in modules for number, _, _ in self._matches(names)}
        return [pattern for number, pattern, _ in sorted(self._entries.values()) if number not in used]

    def _matches(self, names: Sequence[str]) -> Iterator[tuple[int, str, float | None]]:
        for name in names:
            if name not in self._known:
                self._known[name] = list(self._entries_of(name))
            yield from self._known[name]

    def _entries_of(self, name: str) -> Iterator[tuple[int, str, float]]:
        for at in (0, *(i + 1 for i, letter in enumerate(name) if letter == ".")):
            for whole in (True, False) if at == 0 else (False,):
                for mask in self._masks.get((whole, len(name) - at), ()):
                    text = list(name[at:])
                    for place in mask:
                        text[place] = "."
                    if (entry := self._entries.get((whole, mask, "".join(text)))) is not None:
                        yield entry
