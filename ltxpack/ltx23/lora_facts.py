"""What a LoRA states beside its factors: alpha, rank, rslora, DoRA, what it was made for. Untrusted.

One reading for bake-lora, inspect and materialize. Statements stand in the header's metadata, flat or as JSON and under
any prefix, and in PEFT's adapter_config.json. What is clear is taken and told; what contradicts a tensor or another
statement, or can be meant in two ways, is refused (spec 02, sections 1, 2 and 7).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ltxpack.errors import AdapterError, FormatError, LtxpackError
from ltxpack.files.tensorfile import TensorFile, TensorInfo, parse_json, read_json, read_tensorfile
from ltxpack.ltx23.forms import ReadTensor
from ltxpack.ltx23.lora_bases import SUPPORTED_BASE, named_base
from ltxpack.ltx23.lora_keys import METHODS, LoraKey, belongs_elsewhere, parse_key
from ltxpack.ltx23.lora_patterns import Patterns

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# Times the largest strength, which is as large, it still fits float32.
MAX_ALPHA = 1e18
HEADER = "the header"
# More files than this beside a configuration are not looked into to find its own.
MAX_BESIDE = 50
# What PEFT's constrained OFT takes where nothing says otherwise.
PEFT_EPS = 6e-5
MAX_TERMS = 100

ALPHA, RANK, RSLORA, DORA, BASE, USE = "alpha", "rank", "rslora", "dora", "base", "use"
# Set to anything but off, these change what merging means or what base the adapter belongs to.
_UNSUPPORTED = (
    "fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora",
    "kasa_config", "monteclora_config",
)  # fmt: skip
# What these name is not among the factors.
_BESIDE = ("bias", "lora_bias", "modules_to_save", "target_parameters")
# Fact -> the fields that state it.
_SPELLED: Mapping[str, Sequence[str]] = {
    ALPHA: ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha"),
    RANK: ("r", "lora_rank", "network_dim", "ss_network_dim", "rank"),
    RSLORA: ("use_rslora", "rs_lora"),
    DORA: ("use_dora", "dora_wd"),
    BASE: (
        "model_version", "modelspec.architecture", "ss_base_model_version", "base_model_name_or_path", "base_model",
    ),
    **{
        name: (name,)
        for name in (
            "peft_type", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_cayley_neumann",
            "num_cayley_neumann_terms", "coft", "eps", *_BESIDE, *_UNSUPPORTED,
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
_METHODS, _RANKLESS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT"), ("OFT", "BOFT")
# The start values that leave the base as it is; PEFT's others (pissa, olora, corda, loftq, lora_ga) take from it.
_HARMLESS_STARTS = ("true", "false", "default", "gaussian", "eva", "orthogonal", "mica")

_SCALARS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B", "I8": "<b",
}  # fmt: skip
# How far a number stored as bfloat16 may be from the one that a text states.
_STORED = 2.0**-7


class Configuration(NamedTuple):
    """A PEFT configuration as JSON, and how messages name its file."""

    document: Any
    file: Path


@dataclass(frozen=True)
class Statement:
    """One field: its ``fact``, its value as text or JSON, its name, the prefix before that, and where it stands."""

    fact: str
    value: Any
    name: str
    prefix: str
    place: str

    def __str__(self) -> str:
        shown = ".".join(part for part in (self.prefix, self.name) if part)
        return f"{shown} {str(self.value)[:80]} ({self.place})"


@dataclass(frozen=True)
class CayleyForm:
    """How PEFT's OFT makes a rotation of a skew matrix Q: ``terms`` of the Neumann series, or 0 to solve for it.

    ``bound`` is what it keeps |Q| of all blocks together below (COFT). The defaults are PEFT's own.
    """

    terms: int = 5
    bound: float | None = None


PEFT_CAYLEY = CayleyForm()


@dataclass(frozen=True)
class Scaling:
    """What is stated for the modules of one prefix. ``rank`` and ``alpha`` hold where no pattern names a module.

    ``source``: where alpha is stated. ``corrected``: with rslora, alphas beside the factors are already multiplied by
    sqrt(rank), as LyCORIS does.
    """

    rank: int | None = None
    alpha: float | None = None
    source: str = ""
    rslora: bool = False
    corrected: bool = False
    ranks: Patterns = field(default_factory=lambda: Patterns({}))
    alphas: Patterns = field(default_factory=lambda: Patterns({}))

    @property
    def states_alpha(self) -> bool:
        """Whether any alpha is stated."""
        return self.alpha is not None or bool(self.alphas)

    def factor(self, alpha: float, rank: int, beside: bool) -> float:
        """What strength is multiplied by: alpha/rank, alpha/sqrt(rank) with rslora."""
        return alpha / math.sqrt(rank) if self.rslora and not (beside and self.corrected) else alpha / rank


@dataclass
class Judged:
    """What the tensors make of the statements: ``faults`` by kind; ``notes``, ``warnings`` are sentences."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LoraFacts:
    """All that ``file`` and its configuration state.

    ``alphas``: those stored beside factors, by module; None for what is no number, or if they are ``unread``.
    """

    file: Path
    statements: tuple[Statement, ...] = ()
    scalings: Mapping[str, Scaling] = field(default_factory=lambda: {"": Scaling()})
    alphas: Mapping[str, float | None] = field(default_factory=dict)
    unread: bool = False

    def scaling(self, key: LoraKey) -> Scaling:
        """What is stated for the module of ``key``: under the prefix that its name has, else under any."""
        return next((own for name, own in self.scalings.items() if name and _below(key, name)), self.scalings[""])

    def scale(self, key: LoraKey, rank: int) -> tuple[float | None, float]:
        """``(alpha, factor)`` of a module of ``rank``; :meth:`judge` says whether they can be believed."""
        stated, beside, names = self.scaling(key), self.alphas.get(key.module), wrapped_names(key)
        alpha = stated.alphas.find(names, stated.alpha) if beside is None else beside
        if not rank:
            # LoKr of two whole matrices: PEFT scales them by what its configuration says, LyCORIS does not scale them.
            rank = int(stated.ranks.find(names, stated.rank) or 0) if key.module not in self.alphas else 0
            alpha = alpha if rank else None
        if alpha is None or not rank:
            return alpha, 1.0
        return alpha, stated.factor(alpha, rank, beside is not None)

    def judge(self, keys: Iterable[LoraKey], tensors: Mapping[str, TensorInfo]) -> Judged:
        """Compare the statements with the factors of ``keys``. Raises AdapterError for a lost DoRA."""
        keys, judged = list(keys), Judged()
        ranks = ranks_of(keys, tensors)
        for own in dict.fromkeys(map(self.scaling, ranks)):
            self._judge_scaling(own, {key: rank for key, rank in ranks.items() if self.scaling(key) is own}, judged)
        for key in (key for key in keys if key.role == "alpha" and not self.unread):
            if self.alphas[key.module] is None:
                info = tensors[key.key]
                told = f"{info.name} is {info.dtype} {list(info.shape)}, not one number of at most {MAX_ALPHA:g}"
                judged.faults.setdefault("unreadable alpha", []).append(told)
        method = next((one for one in self.statements if one.fact == "peft_type"), None)
        if method and method.value in _METHODS[1:] and any(key.role == "down" for key in keys):
            raise AdapterError(
                "holds the factors of a LoRA", file=self.file, expected=method, found="lora_A and lora_B"
            )
        self._judge_absent(ranks, keys, tensors, judged)
        if uses := sorted({str(one) for one in self.statements if one.fact == USE and _is_set(one)}):
            judged.warnings.append(
                f"is an IC-LoRA ({', '.join(uses)}): it needs reference frames, which no recipe here gives it"
            )
        return judged

    @property
    def alpha(self) -> str:
        """The alpha that is stated for the whole file, and where; "none" if there is none."""
        told = (f"{own.alpha:g} from {own.source}" for own in self.scalings.values() if own.alpha is not None)
        patterns = (f"by {own.source}" for own in self.scalings.values() if own.alphas)
        return ", ".join(dict.fromkeys((*told, *patterns))) or "none"

    @property
    def cayley(self) -> CayleyForm:
        """How PEFT's OFT makes its rotations. Raises AdapterError."""
        stated = {one.fact: one for one in self.statements}
        numbers = {
            fact: _number(stated[fact], self.file) for fact in ("num_cayley_neumann_terms", "eps") if fact in stated
        }
        switches = {fact: _truth(stated[fact], self.file) for fact in ("use_cayley_neumann", "coft") if fact in stated}
        terms = numbers.get("num_cayley_neumann_terms") or PEFT_CAYLEY.terms
        if terms != int(terms) or not 1 < terms <= MAX_TERMS:
            expected = f"a whole number from 2 to {MAX_TERMS}"
            raise AdapterError("num_cayley_neumann_terms is none", file=self.file, expected=expected, found=terms)
        bound = (numbers.get("eps") or PEFT_EPS) if switches.get("coft") else None
        return CayleyForm(int(terms) if switches.get("use_cayley_neumann", True) else 0, bound)

    @property
    def dora_by(self) -> str | None:
        """Who says how DoRA's magnitudes are meant: LyCORIS, whose they are norms of the result; None if nobody."""
        own = next((one for one in self.statements if one.name == "dora_wd" and _truth(one, self.file)), None)
        return f"as LyCORIS writes it ({own})" if own else None

    @property
    def foreign(self) -> str | None:
        """The model that it says it was made for, and where it does, if that is not LTX-2.3."""
        found: dict[str, Statement] = {}
        for one in self.statements:
            if one.fact == BASE and isinstance(one.value, str) and (base := named_base(one.name, one.value)):
                found.setdefault(base, one)
        if found.pop(SUPPORTED_BASE, None):
            found.pop("LTX-2", None)  # the name of the family as well
        return "; ".join(f"{base}, by {one}" for base, one in found.items()) or None

    def _judge_scaling(self, own: Scaling, ranks: Mapping[LoraKey, int], judged: Judged) -> None:
        bare = {key: rank for key, rank in ranks.items() if key.module not in self.alphas}
        mixed = sorted(set(bare.values()))
        ambiguous = own.states_alpha and not own.ranks and len(mixed) > 1
        if ambiguous:
            told = ", ".join(map(str, mixed))
            judged.faults["ambiguous alpha"] = [
                f"one alpha for ranks {told}, and no rank_pattern that says which is meant"
            ]
        for key, rank in ranks.items():
            names = wrapped_names(key)
            stated = own.ranks.find(names, own.rank)
            if stated not in (None, rank) and rank not in own.ranks.values(names) and not ambiguous:
                told = f"{key.module} has rank {rank}, {self._where(RANK)} says {stated:g}"
                judged.faults.setdefault("rank mismatch", []).append(told)
            configured, beside = own.alphas.find(names, own.alpha), self.alphas.get(key.module)
            if configured is not None and beside is not None:
                expected = configured * (math.sqrt(rank) if own.corrected else 1)
                if not math.isclose(beside, expected, rel_tol=_STORED):
                    told = f"{key.module}.alpha is {beside:g}, {own.source} says {configured:g}"
                    judged.faults.setdefault("ambiguous alpha", []).append(told)
        self._tell(own, bare, judged)
        for patterns in (own.ranks, own.alphas):
            if unused := patterns.unused(map(wrapped_names, ranks)) if patterns else []:
                count = f"{len(unused)} pattern{'' if len(unused) == 1 else 's'}"
                judged.warnings.append(f"{patterns.name} has {count} matching none of its modules: {listed(unused)}")

    def _tell(self, own: Scaling, bare: Mapping[LoraKey, int], judged: Judged) -> None:
        """Say which alpha counts for the factors that have none beside them."""
        factors = sorted({self.scale(key, rank)[1] for key, rank in bare.items()})
        if own.states_alpha and factors:
            alpha = "alpha_pattern" if own.alpha is None else f"alpha {own.alpha:g}"
            span = " to ".join(f"{factor:g}" for factor in dict.fromkeys((factors[0], factors[-1])))
            effect = "the strength is used unchanged" if factors == [1] else f"the strength is multiplied by {span}"
            rslora = ", rslora" if own.rslora else ""
            shown = ", ".join(map(str, sorted(set(bare.values()))[:5]))
            judged.notes.append(f"{alpha} from {own.source}{rslora}, rank {shown}: {effect}")
        elif any(key.prefix.startswith("base_model.model") for key in bare) and not own.states_alpha:
            judged.warnings.append(
                f"its names are PEFT's, but neither its header nor an {PEFT_CONFIG} of its own states alpha: the "
                "strength is used unchanged, as if alpha were the rank"
            )

    def _judge_absent(
        self, ranked: Iterable[LoraKey], keys: Sequence[LoraKey], tensors: Collection[str], judged: Judged
    ) -> None:
        """What is stated and not there: DoRA's magnitudes (AdapterError), biases, modules, parameters."""
        magnitudes = {key.module for key in keys if key.role == "magnitude"}
        says_dora = next((one for one in self.statements if one.fact == DORA and _truth(one, self.file)), None)
        if says_dora and (lost := [key.key for key in ranked if key.module not in magnitudes]):
            raise AdapterError(
                "is a DoRA without its magnitudes", file=self.file, items=lost, found=says_dora,
                expected="a lora_magnitude_vector or dora_scale beside each pair of factors",
                next="save the adapter again, with its magnitudes",
            )  # fmt: skip
        for one in self.statements:
            if one.fact in _BESIDE and _is_set(one) and (lost := _lost(one, tensors)):
                judged.warnings.append(
                    f"{one.name} in {one.place} names what the file does not hold ({listed(lost)}): what was trained "
                    "there is not baked"
                )

    def _where(self, fact: str) -> str:
        """Where ``fact`` is stated."""
        return next((f"{one.place} ({one.name})" for one in self.statements if one.fact == fact), "a pattern")


def read_facts(file: TensorFile, configuration: Configuration | None, read: ReadTensor | None) -> LoraFacts:
    """All that a LoRA states. ``read`` gives a tensor's bytes; without it alphas beside the factors are not known.

    Raises AdapterError for statements that contradict one another, cannot be read, or name what cannot be merged, and
    FormatError for broken JSON.
    """
    found = tuple(_statements(file, configuration))
    where = configuration.file if configuration else file.path
    _refuse_other_methods(found, where)
    keys = list(filter(None, map(parse_key, file.tensors)))
    alphas = {key.module: key.key for key in keys if key.role == "alpha"}
    return LoraFacts(
        file.path,
        found,
        {
            name: _scaling([one for one in found if one.prefix in fields], where)
            for name, fields in _prefixes(found, keys).items()
        },
        {module: read and scalar(file.tensors[name], read) for module, name in alphas.items()},
        unread=read is None,
    )


def configuration_beside(weights: Path) -> Path | None:
    """The adapter_config.json that belongs to a file of weights; None if there is none, or it may be another file's."""
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
    """Whether an adapter_config.json in a folder of ``names`` is that of ``weights``: PEFT's name, or no other file."""
    others = (name for name in names if name != weights and not name.startswith("."))
    return weights == PEFT_WEIGHTS or not any(name.lower().endswith(".safetensors") for name in others)


def read_configuration(config: Path | None) -> Configuration | None:
    """The configuration in the file ``config``. Raises SourceError or FormatError."""
    return None if config is None else Configuration(read_json(config), config)


def wrapped_names(key: LoraKey) -> Sequence[str]:
    """What a module may be called in the model that PEFT wrapped, which patterns are matched against.

    PEFT's own names say it; of others it is not known whether the prefix belonged to the model.
    """
    return (key.path,) if key.prefix.startswith("base_model.model") else tuple(dict.fromkeys((key.path, key.module)))


def scalar(info: TensorInfo, read: ReadTensor) -> float | None:
    """The one number in a tensor; None if it is not one of at most MAX_ALPHA."""
    if info.dtype not in _SCALARS or math.prod(info.shape) != 1:
        return None
    # A bfloat16 is the upper half of a float32.
    data = b"\0\0" + read(info) if info.dtype == "BF16" else read(info)
    (value,) = struct.unpack(_SCALARS[info.dtype], data)
    return float(value) if abs(value) <= MAX_ALPHA else None


def judged_keys(names: Iterable[str]) -> list[LoraKey]:
    """The keys that a bake of the transformer will judge; those of the text path where there are no others."""
    keys = [key for name in names if (key := parse_key(name))]
    return [key for key in keys if not belongs_elsewhere(key.module)] or keys


def ranks_of(keys: Iterable[LoraKey], tensors: Mapping[str, TensorInfo]) -> dict[LoraKey, int]:
    """The rank of every module that has one, under the key of the tensor that shows it."""
    modules: dict[str, dict[str, LoraKey]] = {}
    for key in keys:
        modules.setdefault(key.module, {})[key.role] = key
    ranks: dict[LoraKey, int] = {}
    for found in modules.values():
        shows = next((found[role] for method in METHODS for role in method.rank if role in found), None)
        shape = () if shows is None else tensors[shows.key].shape
        if shows and len(shape) > 1 and shape[0]:
            ranks[shows] = shape[0]
    return ranks


# Statements


def _statements(file: TensorFile, configuration: Configuration | None) -> Iterator[Statement]:
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
            document = parse_json(text.encode("utf-8", "surrogatepass"), f"{file.path}: metadata {key}")
        except FormatError:
            if known:
                raise
            continue
        if not isinstance(document, dict):
            raise AdapterError("adapter configuration is not a JSON object", file=file.path, found=f"metadata {key}")
        found = list(_fields(document, f"{HEADER}'s {key}"))
        if known or any(one.name in _DISTINCT or one.fact == USE for one in found):
            yield from found


def _fields(document: Mapping[str, Any], place: str, prefix: str = "", deepest: int = _DEEPEST) -> Iterator[Statement]:
    """The fields of a document that state anything, those of objects in it under the name of the object."""
    for key, value in document.items():
        head, _, name = ("", "", key) if key in _FIELDS else key.rpartition(".")
        fact = _FIELDS.get(name) or (USE if _IC_LORA.fullmatch(name) else None)
        below = ".".join(part for part in (prefix, head) if part)
        if fact is not None:
            yield Statement(fact, _unquoted(value), name, below, place)
        elif isinstance(value, dict) and deepest and not name.endswith(("_config", "_pattern")):
            yield from _fields(value, place, ".".join(part for part in (prefix, key) if part), deepest - 1)


def _prefixes(found: Iterable[Statement], keys: Collection[LoraKey]) -> dict[str, tuple[str, ...]]:
    """Prefix of keys -> the prefixes of the fields that hold for them; "" for keys with none of these.

    Where no key has the prefix of any field, all fields hold for all keys, but for those of the text path.
    """
    named = sorted({one.prefix for one in found if one.prefix}, key=len, reverse=True)
    used = [name for name in named if any(_below(key, name) for key in keys)]
    rest = () if used else (name for name in named if not belongs_elsewhere(name))
    return {**{name: ("", name) for name in used}, "": ("", *rest)}


def _below(key: LoraKey, prefix: str) -> bool:
    return key.key.startswith(f"{prefix}.") or f".{prefix}." in f".{key.prefix}."


# Values


def _scaling(statements: Sequence[Statement], where: Path) -> Scaling:
    method = next((one.value for one in statements if one.fact == "peft_type"), None)
    rank, _ = _one(statements, RANK, where) if method not in _RANKLESS else (None, None)
    alpha, source = _one(statements, ALPHA, where)
    rslora = [one for one in statements if one.fact == RSLORA and _truth(one, where)]
    patterns = {one.fact: one for one in statements if one.fact.endswith("_pattern")}
    source = source or patterns.get("alpha_pattern")
    return Scaling(
        rank=None if rank is None else int(rank),
        alpha=alpha,
        source=f"{source.place} ({source.name})" if source else "",
        rslora=bool(rslora),
        corrected=any(one.name == "rs_lora" for one in rslora),
        ranks=_patterns(patterns.get("rank_pattern"), where),
        alphas=_patterns(patterns.get("alpha_pattern"), where),
    )


def _one(statements: Iterable[Statement], fact: str, where: Path) -> tuple[float | None, Statement | None]:
    """The one number that is stated for ``fact``, and who states it. Raises AdapterError if they differ."""
    found: dict[float, Statement] = {}
    for one in statements:
        if one.fact == fact and (value := _number(one, where)) is not None:
            found.setdefault(value, one)
    if len(found) > 1:
        raise AdapterError(f"states more than one {fact}", file=where, items=list(found.values()))
    return next(iter(found.items()), (None, None))


def _number(one: Statement, where: Path) -> float | None:
    """The number of a statement; None where it states nothing."""
    value = None if _says_nothing(one.value) else one.value
    if isinstance(value, str) and one.place != PEFT_CONFIG:
        try:
            value = float(value)
        except ValueError:
            value = None if one.fact == RANK else value
    zero_is_rank = value == 0 and one.name in _ZERO_IS_RANK
    return None if value is None or zero_is_rank else _checked(value, one.name, where, one.fact == RANK)


def _checked(value: object, name: str, where: Path, is_rank: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        wanted = f"one of at most {MAX_ALPHA:g}"
        raise AdapterError(f"{name} is not a finite number", file=where, expected=wanted, found=value)
    if is_rank and (value != int(value) or not 0 < value < 1 << 31):
        raise AdapterError(f"{name} is not a positive whole number", file=where, found=value)
    return float(value)


def _truth(one: Statement, where: Path) -> bool:
    value = one.value.lower() if isinstance(one.value, str) else one.value
    if value in (True, "true", "1"):
        return True
    if _says_nothing(value) or value in (False, "false", "0"):
        return False
    raise AdapterError(f"{one.name} is not true or false", file=where, found=one.value)


def _patterns(one: Statement | None, where: Path) -> Patterns:
    table = {} if one is None or _says_nothing(one.value) else one.value
    if isinstance(table, str):
        table = parse_json(table.encode("utf-8", "surrogatepass"), f"{where}: {one.name if one else ''}")
    if not isinstance(table, dict):
        raise AdapterError(f"{one and one.name} is not an object", file=where, found=type(table).__name__)
    if one is None:
        return Patterns({})
    ranks = one.fact == "rank_pattern"
    numbers = {pattern: _checked(value, one.name, where, ranks) for pattern, value in table.items()}
    return Patterns(numbers, one.name, where)


def _refuse_other_methods(statements: Iterable[Statement], where: Path) -> None:
    """Refuse (AdapterError) what is no LoRA, or cannot be merged into the clean base as it is."""
    for one in statements:
        if one.fact == "peft_type" and not _says_nothing(one.value) and one.value not in _METHODS:
            raise AdapterError("is not a LoRA", file=where, expected="peft_type LORA", found=one.value)
        if one.fact in _UNSUPPORTED and _is_set(one):
            raise AdapterError("uses what cannot be merged exactly", file=where, items=[one])
        start = one.value if one.fact == "init_lora_weights" and not _says_nothing(one.value) else True
        if str(start).lower() not in _HARMLESS_STARTS:
            raise AdapterError(
                "belongs to a base changed by its initialisation, not to this one", file=where,
                expected=f"init_lora_weights {', '.join(_HARMLESS_STARTS)}", found=one,
                next="save it converted to a plain LoRA (PEFT: path_initial_model_for_weight_conversion)",
            )  # fmt: skip


def _unquoted(value: Any) -> Any:
    """A text without the blanks and quotation marks around it."""
    if not isinstance(value, str):
        return value
    value = value.strip()
    quoted = len(value) > 1 and value[0] == value[-1] == '"'
    return value[1:-1].strip() if quoted else value


def _says_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.lower() in _NOTHING)


def _is_set(one: Statement) -> bool:
    """Whether a field states more than "off": kohya writes 0 and False, and 1 for a reference of full size."""
    off = ("false", "0", "0.0", "{}", "[]", *(("1", "1.0") if one.name.startswith("ss_reference") else ()))
    return bool(one.value) and not _says_nothing(one.value) and str(one.value).lower() not in off


def _lost(one: Statement, tensors: Iterable[str]) -> list[str]:
    """What a field says was trained besides the factors, and no tensor holds."""
    if one.fact in ("bias", "lora_bias"):
        held = str(one.value).lower() == "none" or any(name.endswith(("bias", ".diff_b")) for name in tensors)
        return [] if held else ["biases"]
    names = [name for name in (one.value if isinstance(one.value, list) else [one.value]) if isinstance(name, str)]
    # A parameter's factors bear the name of the module that holds it.
    modules = [name if one.fact == "modules_to_save" else name.rpartition(".")[0] for name in names]
    beside = {
        re.split(r"\.base_layer\b|\.lora_|\.modules_to_save\b|\.(?:weight|bias)\Z", f".{name}")[0] for name in tensors
    }
    return [
        name
        for name, module in zip(names, modules, strict=True)
        if not any(own.endswith(f".{module}") for own in beside)
    ]


def listed(items: Sequence[str], most: int = 10) -> str:
    """The first of ``items``, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(item[:80] for item in items[:most]) + more
