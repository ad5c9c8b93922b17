"""The facts that a LoRA states beside its factors: alpha, rank, rslora, DoRA, its base model. Untrusted.

bake-lora, inspect and materialize share this reading. It accepts clear statements and tells them. It refuses statements
that contradict a tensor or one another, or that have two meanings (spec 02, sections 1, 2 and 7).
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ltxpack.errors import AdapterError, listed
from ltxpack.files.tensorfile import TensorFile, TensorInfo
from ltxpack.ltx23.forms import ReadTensor
from ltxpack.ltx23.lora_keys import METHODS, LoraKey, belongs_elsewhere, parse_key
from ltxpack.ltx23.lora_statements import (
    BESIDE,
    MAX_ALPHA,
    PEFT_CONFIG,
    PEFT_METHODS,
    RANKLESS,
    Configuration,
    Patterns,
    Statement,
    is_set,
    number_of,
    patterns_of,
    refuse_other_methods,
    statements_of,
    truth_of,
)
from ltxpack.ltx23.releases import SUPPORTED, parse_version

# PEFT's default bound for constrained OFT.
PEFT_EPS = 6e-5
MAX_TERMS = 100
# The most statements of a file; PEFT writes some twenty. Each is compared with every module.
MAX_STATEMENTS = 200

_SCALARS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B", "I8": "<b",
}  # fmt: skip
# The relative difference that storing a number as bfloat16 may make.
_STORED = 2.0**-7
# The parts of a tensor's name that follow its module's name.
_BEHIND_MODULE = re.compile(r"\.base_layer\b|\.lora_|\.modules_to_save\b|\.(?:weight|bias)\Z")


Faults = defaultdict[str, list[str]]
"""Kind of fault -> the words for each fault, so that one error lists them all."""


@dataclass(frozen=True)
class CayleyForm:
    """PEFT's way from a skew matrix Q to a rotation: ``terms`` of the Neumann series, or 0 for an exact solution.

    ``bound``: the largest |Q| of all blocks together (COFT). The defaults are PEFT's own.
    """

    terms: int = 5
    bound: float | None = None


PEFT_CAYLEY = CayleyForm()


@dataclass(frozen=True)
class Scaling:
    """The statements for modules under one prefix. ``rank`` and ``alpha`` are for modules that no pattern names.

    ``source``: the place that states alpha. ``corrected``: with rslora, alphas beside the factors are already
    multiplied by sqrt(rank), as LyCORIS does.
    """

    rank: int | None = None
    alpha: float | None = None
    source: str = ""
    rslora: bool = False
    corrected: bool = False
    ranks: Patterns = field(default_factory=Patterns)
    alphas: Patterns = field(default_factory=Patterns)

    @property
    def states_alpha(self) -> bool:
        return self.alpha is not None or bool(self.alphas)

    def factor(self, alpha: float, rank: int, beside: bool) -> float:
        """The factor of the strength: alpha/rank, or alpha/sqrt(rank) with rslora."""
        return alpha / math.sqrt(rank) if self.rslora and not (beside and self.corrected) else alpha / rank


@dataclass
class Judged:
    """The statements compared with the tensors; ``notes``, ``warnings`` are sentences."""

    faults: Faults = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LoraFacts:
    """The statements of ``file`` and its configuration.

    ``alphas``: those stored beside factors, by module; None for one that is no number, or if they are ``unread``.
    """

    file: Path
    statements: tuple[Statement, ...] = ()
    scalings: Mapping[str, Scaling] = field(default_factory=lambda: {"": Scaling()})
    alphas: Mapping[str, float | None] = field(default_factory=dict)
    unread: bool = False

    def first(self, fact: str) -> Statement | None:
        return next((one for one in self.statements if one.fact == fact), None)

    def scaling(self, key: LoraKey) -> Scaling:
        """The statements for the module of ``key``: those under its own prefix, else those under any."""
        return next((own for name, own in self.scalings.items() if name and _below(key, name)), self.scalings[""])

    def scale(self, key: LoraKey, rank: int) -> tuple[float | None, float]:
        """``(alpha, factor)`` of a module of ``rank``; :meth:`judge` checks them."""
        stated, beside, names = self.scaling(key), self.alphas.get(key.module), wrapped_names(key)
        alpha = stated.alphas.find(names, stated.alpha) if beside is None else beside
        if not rank:
            # LoKr of two whole matrices: PEFT scales them by its configuration, LyCORIS does not scale them.
            rank = int(stated.ranks.find(names, stated.rank) or 0) if key.module not in self.alphas else 0
            alpha = alpha if rank else None
        if alpha is None or not rank:
            return alpha, 1.0
        return alpha, stated.factor(alpha, rank, beside is not None)

    def judge(self, keys: Iterable[LoraKey], tensors: Mapping[str, TensorInfo]) -> Judged:
        """Compare the statements with the factors of ``keys``. Raises AdapterError for a lost DoRA."""
        keys, judged = list(keys), Judged()
        ranks = ranks_of(keys, tensors)
        groups: dict[Scaling, dict[LoraKey, int]] = {}
        for key, rank in ranks.items():
            groups.setdefault(self.scaling(key), {})[key] = rank
        for own, group in groups.items():
            self._judge_scaling(own, group, judged)
        for key in (key for key in keys if key.role == "alpha" and not self.unread):
            if self.alphas[key.module] is None:
                info = tensors[key.key]
                told = f"{info.name} is {info.dtype} {list(info.shape)}, not one number of at most {MAX_ALPHA:g}"
                judged.faults["unreadable alpha"].append(told)
        method = self.first("peft_type")
        if method and method.value in PEFT_METHODS[1:] and any(key.role == "down" for key in keys):
            raise AdapterError(
                "holds the factors of a LoRA", file=self.file, expected=method, found="lora_A and lora_B"
            )
        self._judge_absent(ranks, keys, tensors, judged)
        if uses := sorted({str(one) for one in self.statements if one.fact == "use" and is_set(one)}):
            judged.warnings.append(
                f"is an IC-LoRA ({', '.join(uses)}): it needs reference frames, which no recipe here gives it"
            )
        return judged

    @property
    def alpha(self) -> str:
        """The alpha of the whole file, and the place that states it; "none" if there is none."""
        told = (f"{own.alpha:g} from {own.source}" for own in self.scalings.values() if own.alpha is not None)
        patterns = (f"by {own.source}" for own in self.scalings.values() if own.alphas)
        return ", ".join(dict.fromkeys((*told, *patterns))) or "none"

    @property
    def cayley(self) -> CayleyForm:
        """The stated way of PEFT's OFT. Raises AdapterError."""
        stated = {one.fact: one for one in self.statements}
        amounts, switches = ("num_cayley_neumann_terms", "eps"), ("use_cayley_neumann", "coft")
        numbers = {fact: number_of(stated[fact]) for fact in amounts if fact in stated}
        on = {fact: truth_of(stated[fact]) for fact in switches if fact in stated}
        terms = numbers.get("num_cayley_neumann_terms") or PEFT_CAYLEY.terms
        if terms != int(terms) or not 1 < terms <= MAX_TERMS:
            expected = f"a whole number from 2 to {MAX_TERMS}"
            raise AdapterError("num_cayley_neumann_terms is none", file=self.file, expected=expected, found=terms)
        bound = (numbers.get("eps") or PEFT_EPS) if on.get("coft") else None
        return CayleyForm(int(terms) if on.get("use_cayley_neumann", True) else 0, bound)

    @property
    def dora_by(self) -> str | None:
        """The statement that DoRA's magnitudes are LyCORIS's, which are norms of the result; None without it."""
        own = next((one for one in self.statements if one.name == "dora_wd" and truth_of(one)), None)
        return f"as LyCORIS writes it ({own})" if own else None

    @property
    def foreign(self) -> str | None:
        """The model for which the file says it was made, and the place that says so; None for LTX-2.3."""
        found: dict[str, Statement] = {}
        for one in self.statements:
            if one.fact == "base" and isinstance(one.value, str) and (base := named_base(one.name, one.value)):
                found.setdefault(base, one)
        if found.pop(SUPPORTED_BASE, None):
            found.pop("LTX-2", None)  # the name of the family as well
        return "; ".join(f"{base}, by {one}" for base, one in found.items()) or None

    def _judge_scaling(self, own: Scaling, ranks: Mapping[LoraKey, int], judged: Judged) -> None:
        bare = {key: rank for key, rank in ranks.items() if key.module not in self.alphas}
        mixed = sorted(set(bare.values()))
        ambiguous = own.states_alpha and not own.ranks and len(mixed) > 1
        if ambiguous:
            told = f"one alpha for ranks {', '.join(map(str, mixed))}, and no rank_pattern that says which is meant"
            judged.faults["ambiguous alpha"] = [told]
        for key, rank in ranks.items():
            names = wrapped_names(key)
            stated = own.ranks.find(names, own.rank)
            if stated not in (None, rank) and rank not in own.ranks.values(names) and not ambiguous:
                by = self.first("rank")
                where = f"{by.place} ({by.name})" if by else "a pattern"
                judged.faults["rank mismatch"].append(f"{key.module} has rank {rank}, {where} says {stated:g}")
            configured, beside = own.alphas.find(names, own.alpha), self.alphas.get(key.module)
            if configured is not None and beside is not None:
                expected = configured * (math.sqrt(rank) if own.corrected else 1)
                if not math.isclose(beside, expected, rel_tol=_STORED):
                    told = f"{key.module}.alpha is {beside:g}, {own.source} says {configured:g}"
                    judged.faults["ambiguous alpha"].append(told)
        self._tell(own, bare, judged)
        for patterns in (own.ranks, own.alphas):
            if unused := patterns.unused(map(wrapped_names, ranks)) if patterns else []:
                count = f"{len(unused)} pattern{'' if len(unused) == 1 else 's'}"
                judged.warnings.append(f"{patterns.name} has {count} matching none of its modules: {listed(unused)}")

    def _tell(self, own: Scaling, bare: Mapping[LoraKey, int], judged: Judged) -> None:
        """Tell the alpha of the factors that have none beside them."""
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
        """Find tensors that are stated but absent: DoRA's magnitudes (AdapterError), biases, modules, parameters."""
        magnitudes = {key.module for key in keys if key.role == "magnitude"}
        says_dora = next((one for one in self.statements if one.fact == "dora" and truth_of(one)), None)
        if says_dora and (lost := [key.key for key in ranked if key.module not in magnitudes]):
            raise AdapterError(
                "is a DoRA without its magnitudes", file=self.file, items=lost, found=says_dora,
                expected="a lora_magnitude_vector or dora_scale beside each pair of factors",
                next="save the adapter again, with its magnitudes",
            )  # fmt: skip
        stated = [one for one in self.statements if one.fact in BESIDE and is_set(one)]
        beside = _Beside(tensors if stated else ())
        for one in stated:
            if lost := beside.lacks(one):
                judged.warnings.append(
                    f"{one.name} in {one.place} names what the file does not hold ({listed(lost)}): what was trained "
                    "there is not baked"
                )


def read_facts(file: TensorFile, configuration: Configuration | None, read: ReadTensor | None) -> LoraFacts:
    """The facts that a LoRA states. ``read`` gives a tensor's bytes; without it alphas beside factors stay unknown.

    Raises AdapterError for statements that contradict one another, cannot be read, or name what cannot be merged, and
    FormatError for broken JSON.
    """
    found = tuple(itertools.islice(statements_of(file, configuration), MAX_STATEMENTS + 1))
    if len(found) > MAX_STATEMENTS:
        expected = f"at most {MAX_STATEMENTS} fields"
        raise AdapterError("states too much of itself", file=found[-1].file, expected=expected)
    refuse_other_methods(found)
    keys = list(filter(None, map(parse_key, file.tensors)))
    alphas = {key.module: key.key for key in keys if key.role == "alpha"}
    return LoraFacts(
        file.path,
        found,
        {
            name: _scaling([one for one in found if one.prefix in fields])
            for name, fields in _prefixes(found, keys).items()
        },
        {module: read and scalar(file.tensors[name], read) for module, name in alphas.items()},
        unread=read is None,
    )


def wrapped_names(key: LoraKey) -> Sequence[str]:
    """The possible names of a module in the model that PEFT wrapped, for patterns.

    PEFT's own keys show the name. In other keys the prefix may belong to the model or not.
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


def listed_faults(faults: Faults) -> list[str]:
    return [f"{kind}: {item}" for kind, items in faults.items() for item in items]


def judged_keys(names: Iterable[str]) -> list[LoraKey]:
    """The keys that a bake of the transformer will judge; those of the text path where there are no others."""
    keys = [key for name in names if (key := parse_key(name))]
    return [key for key in keys if not belongs_elsewhere(key.module)] or keys


def ranks_of(keys: Iterable[LoraKey], tensors: Mapping[str, TensorInfo]) -> dict[LoraKey, int]:
    """Key of the tensor that shows a rank -> the rank, for every module that has one."""
    roles = [role for method in METHODS for role in method.rank]
    shows: dict[str, LoraKey] = {}
    for key in sorted((key for key in keys if key.role in roles), key=lambda key: roles.index(key.role)):
        shows.setdefault(key.module, key)
    shapes = {key: tensors[key.key].shape for key in shows.values()}
    return {key: shape[0] for key, shape in shapes.items() if len(shape) > 1 and shape[0]}


def _prefixes(found: Iterable[Statement], keys: Collection[LoraKey]) -> dict[str, tuple[str, ...]]:
    """Prefix of keys -> the prefixes of the fields that apply to them; "" for keys without these prefixes.

    If no key has the prefix of any field, all fields apply to all keys, except fields of the text path.
    """
    named = sorted({one.prefix for one in found if one.prefix}, key=len, reverse=True)
    used = [name for name in named if any(_below(key, name) for key in keys)]
    rest = () if used else (name for name in named if not belongs_elsewhere(name))
    return {**{name: ("", name) for name in used}, "": ("", *rest)}


def _below(key: LoraKey, prefix: str) -> bool:
    return key.key.startswith(f"{prefix}.") or f".{prefix}." in f".{key.prefix}."


def _scaling(statements: Sequence[Statement]) -> Scaling:
    method = next((one.value for one in statements if one.fact == "peft_type"), None)
    rank, _ = _one(statements, "rank") if method not in RANKLESS else (None, None)
    alpha, source = _one(statements, "alpha")
    rslora = [one for one in statements if one.fact == "rslora" and truth_of(one)]
    patterns = {one.fact: one for one in statements if one.fact.endswith("_pattern")}
    source = source or patterns.get("alpha_pattern")
    return Scaling(
        rank=None if rank is None else int(rank),
        alpha=alpha,
        source=f"{source.place} ({source.name})" if source else "",
        rslora=bool(rslora),
        corrected=any(one.name == "rs_lora" for one in rslora),
        ranks=patterns_of(patterns.get("rank_pattern")),
        alphas=patterns_of(patterns.get("alpha_pattern")),
    )


def _one(statements: Iterable[Statement], fact: str) -> tuple[float | None, Statement | None]:
    """The number that is stated for ``fact``, and its statement. Raises AdapterError for different numbers."""
    found: dict[float, Statement] = {}
    for one in statements:
        if one.fact == fact and (value := number_of(one)) is not None:
            found.setdefault(value, one)
    if len(found) > 1:
        stated = list(found.values())
        raise AdapterError(f"states more than one {fact}", file=stated[0].file, items=stated)
    return next(iter(found.items()), (None, None))


class _Beside:
    """The modules of a file, each spelled backwards for fast look-ups, and whether it holds any bias."""

    def __init__(self, tensors: Iterable[str]) -> None:
        names = [f".{name}" for name in tensors]
        self.modules = sorted({_BEHIND_MODULE.split(name)[0][::-1] for name in names})
        self.biased = any(name.endswith(("bias", ".diff_b")) for name in names)

    def lacks(self, one: Statement) -> list[str]:
        """The tensors that a field names as trained and the file does not hold."""
        if one.fact in ("bias", "lora_bias"):
            return [] if self.biased else ["biases"]
        names = [name for name in (one.value if isinstance(one.value, list) else [one.value]) if isinstance(name, str)]
        # A parameter's factors bear the name of the module that holds it.
        return [
            name for name in names if not self.holds(name if one.fact == "modules_to_save" else name.rpartition(".")[0])
        ]

    def holds(self, module: str) -> bool:
        ending = f".{module}"[::-1]
        at = bisect.bisect_left(self.modules, ending)
        return at < len(self.modules) and self.modules[at].startswith(ending)


# The model for which a LoRA says it was made, by the names that trainers write


SUPPORTED_BASE = "LTX-" + ".".join(map(str, SUPPORTED))
LONGEST = 300

# 22b, 19b: sizes, not versions.
_SIZE = re.compile(r"(?<![\d.])\d+(?:\.\d+)?b(?![a-z0-9])")
_LTX = re.compile(r"(?<![a-z])ltx(?P<video>[-_ ]?video|v)?[-_ .]*v?(?P<major>\d+)?(?:[._-](?P<minor>\d+))?")
# Words that name other models, each alone or before a number.
_OTHERS = {
    "Wan": r"wan(?:[-_ ]?(?:ai|video))?", "Flux": r"flux", "Hunyuan": r"hunyuan(?:[-_ ]?video)?",
    "Stable Diffusion": r"sdxl|sd|stable[-_ ]?diffusion|illustrious|pony", "Qwen": r"qwen(?:[-_ ]?(?:vl|image))?",
    "Z-Image": r"z[-_ ]?image", "CogVideo": r"cogvideox?", "Mochi": r"mochi", "PixArt": r"pixart", "Sana": r"sana",
    "Chroma": r"chroma", "HiDream": r"hidream", "Lumina": r"lumina", "Kolors": r"kolors", "Cosmos": r"cosmos",
    "Kandinsky": r"kandinsky", "FramePack": r"framepack", "SkyReels": r"skyreels", "AuraFlow": r"auraflow",
    "Gemma": r"gemma", "Llama": r"llama", "Mistral": r"mistral",
}  # fmt: skip
_FAMILIES = [(name, re.compile(rf"(?<![a-z])(?:{words})(?![a-z])")) for name, words in _OTHERS.items()]
# The first folder of a name that is a path of the trainer's machine.
_PLACES = ("models", "model", "checkpoints", "ckpts", "weights", "output", "outputs", "data", "pretrained")
_PATH = re.compile(r"[/~.]|[a-z]:[\\/]|.*\\|.*/.*/|.*\.(?:safetensors|ckpt|pt|pth|gguf)\Z", re.IGNORECASE | re.DOTALL)
_HUB = re.compile(r"(?:hf://|https?://(?:www\.)?huggingface\.co/)", re.IGNORECASE)


def named_base(field: str, value: str) -> str | None:
    """The model that a field names, such as LTX-2.3, LTX-2 or Wan; None for an unknown name or a path."""
    text = _HUB.sub("", value.strip()[:LONGEST])
    if field == "model_version":
        return family(text) or _generation(parse_version(text.lstrip("vV")))
    if field.startswith("base_model") and (_PATH.match(text) or text.partition("/")[0].lower() in _PLACES):
        return None
    return family(text)


def family(text: str) -> str | None:
    """The model that a text names; None if it names none that is known here."""
    text = _SIZE.sub("", text.lower())
    found = [_generation_of(match) for match in _LTX.finditer(text)]
    if found:
        return next((name for name in found if name), None)
    return next((name for name, words in _FAMILIES if words.search(text)), None)


def _generation_of(match: re.Match[str]) -> str | None:
    major, minor = match["major"], match["minor"]
    if major is None:
        return "LTX-Video" if match["video"] else None
    if minor is None and len(major) == 2:  # ltx23
        major, minor = major[0], major[1]
    return _generation(parse_version(f"{major}.{minor or 0}"))


def _generation(version: tuple[int, ...]) -> str | None:
    """The model of a version; None for other numbers: some LoRAs count their own versions in that field, from 1 on."""
    major, minor = (*version, 0, 0)[:2]
    if (major, minor) == (0, 9):
        return "LTX-Video"
    return f"LTX-{major}" + (f".{minor}" if minor else "") if major == SUPPORTED[0] else None
