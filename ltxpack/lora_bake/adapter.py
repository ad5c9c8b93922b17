"""An adapter file in any naming -> ``{transformer weight: LoraTarget}``; finds every fault before a byte is written.

It reads only headers and the alpha scalars. The factors stay in the file, as byte ranges, until the bake fuses them.
Spec 02, sections 1, 2 and 7. Knows no arithmetic.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ltxpack.errors import AdapterError, listed
from ltxpack.files.tensorfile import Stamp, TensorFile, TensorInfo, read_tensorfile, tensor_reader
from ltxpack.lora_bake.methods import FORMULAS
from ltxpack.ltx23.contents import described
from ltxpack.ltx23.lora_facts import PEFT_CAYLEY, CayleyForm, Faults, LoraFacts, listed_faults, read_facts
from ltxpack.ltx23.lora_keys import (
    METHODS,
    SCALE,
    LoraKey,
    Method,
    ModuleNames,
    belongs_elsewhere,
    names_of,
    parse_key,
    unread_method,
)
from ltxpack.ltx23.lora_statements import read_configuration
from ltxpack.manifest import RULES, BakedLora, printed_name
from ltxpack.materialize.access import InputFile
from ltxpack.materialize.checkpoint import read_lora
from ltxpack.strength import Strength

FACTOR_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# With more different prefixes of names than this, the file belongs to another model.
MAX_RESTS = 2
# The roles of tensors that change the module's bias, not its weight.
_BIAS_ROLES = frozenset({"up_b", "diff_b", "bias"})
# The roles of tensors that multiply the whole weight, or take its place.
_WHOLE_ROLES = frozenset({"magnitude", "rescale", "boft_s", "weight"})
_SCALED = frozenset(method.name for method in METHODS if method.rank)
# Methods that also change norms and tables.
_ANY_SHAPE = ("diff", "weight")

Shapes = Mapping[str, tuple[int, ...]]
Found = list[tuple[LoraKey, tuple[str, ...] | None]]
"""Each key with the modules that it means, None for an unknown name."""


@dataclass(frozen=True)
class LoraTarget:
    """The methods and tensors with which an adapter changes one weight (or bias).

    ``methods`` are names of :data:`.lora_keys.METHODS`. ``tensors`` maps roles to byte ranges of the adapter file; each
    target in a fused projection has its own rows. ``factor`` multiplies the strength of a method with a rank:
    alpha/rank, alpha/sqrt(rank) with rslora, or 1. ``alpha`` is the stated one; it bounds the rotations of LyCORIS,
    and ``cayley`` says how PEFT makes its rotations. ``over_base``: DoRA divides its magnitudes by the norms before the
    change.
    """

    weight: str
    methods: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    rank: int = 0
    factor: float = 1.0
    alpha: float | None = None
    cayley: CayleyForm = PEFT_CAYLEY
    over_base: bool = False

    def is_idle(self, zero: Collection[str]) -> bool:
        """Whether the target changes nothing if the tensors named ``zero`` are all zero."""
        if not _WHOLE_ROLES.isdisjoint(self.tensors) or "bias" in self.tensors:
            return False
        own = [method for method in METHODS if method.name in self.methods]
        # One factor of zeros makes a product zero; zeros make a rotation the identity.
        return all(
            (method.rank and self.factor == 0)
            or any(info.name in zero for role, info in self.tensors.items() if role.removesuffix(SCALE) in method.roles)
            for method in own
        )

    def erases(self, zero: Collection[str]) -> bool:
        """Whether the target makes its weight zero if the tensors named ``zero`` are all zero."""
        return any(role in _WHOLE_ROLES and info.name in zero for role, info in self.tensors.items())

    @property
    def needs_whole(self) -> bool:
        """Whether a row of the changed weight depends on its other rows, as it does under magnitudes [1, in]."""
        return "oft" in self.methods or ("magnitude" in self.tensors and len(self.tensors["magnitude"].shape) == 2)

    @property
    def beyond_official(self) -> str | None:
        """The method that the official rule does not know; None for a product of two factors or a difference."""
        if "magnitude" in self.tensors:
            return "DoRA"
        if "up_b" in self.tensors:
            return "lora_B.bias"
        return next((name for name in self.methods if name not in ("lora", "diff")), None)


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the transformer. ``skipped`` are modules that the caller allowed to leave out.

    ``foreign``: another model for which the file says it was made. ``dora_by``: the statement of what its magnitudes
    mean. ``notes``, ``warnings``: sentences for the user. ``stamp``: that of the file, see :class:`.TensorFile`.
    """

    name: str
    path: Path
    size: int
    targets: Mapping[str, LoraTarget]
    styles: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    config: Path | None = None
    foreign: str | None = None
    dora_by: str | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    stamp: Stamp | None = None

    @property
    def factor(self) -> float | None:
        """The factor if all targets that alpha scales have the same, else None."""
        factors = {target.factor for target in self.targets.values() if not _SCALED.isdisjoint(target.methods)} or {1.0}
        return factors.pop() if len(factors) == 1 else None

    @property
    def dora(self) -> list[str]:
        """The weights whose rows have a magnitude."""
        return [target.weight for target in self.targets.values() if "magnitude" in target.tensors]

    @property
    def flop(self) -> float:
        """FLOP of one product of the factors for every weight."""
        pairs = ((t.tensors["up"].shape, t.tensors["down"].shape) for t in self.targets.values() if "up" in t.tensors)
        return sum(2.0 * up[0] * math.prod(down) for up, down in pairs if up)

    def by(self, rule: str) -> Adapter:
        """The adapter for bakes by ``rule``. The official one never reads alpha: all its factors are 1."""
        if rule != "official":
            return replace(self, warnings=(*self.warnings, *_told_alpha(self.targets)))
        warnings = self.warnings
        if scaled := sum(target.factor != 1 for target in self.targets.values()):
            ignored = "the official rule ignores alpha and uses the strength alone"
            warnings = (*warnings, f"alpha differs from rank in {scaled} targets; {ignored}")
        targets = {name: replace(target, factor=1.0) for name, target in self.targets.items()}
        return replace(self, targets=targets, notes=(), warnings=warnings)

    def within(self, shapes: Shapes) -> Adapter:
        """The part of it that changes the tensors in ``shapes``."""
        return replace(self, targets={name: target for name, target in self.targets.items() if name in shapes})

    @property
    def plain_bf16(self) -> bool:
        """Whether every target is a bf16 product and nothing else."""
        stored = [target.tensors for target in self.targets.values()]
        return all(own.keys() == {"down", "up"} and {info.dtype for info in own.values()} == {"BF16"} for own in stored)


@dataclass(frozen=True)
class LoraUse:
    """One LoRA of a bake: its fitted adapter, and its entry in the manifest."""

    adapter: Adapter
    baked: BakedLora

    @classmethod
    def of(cls, adapter: Adapter, strength: float | Strength, digest: str) -> LoraUse:
        """``adapter`` at ``strength``; ``digest`` is its content's hash."""
        factor, by = adapter.factor, Strength.of(strength)
        scale = None if factor is None or by.blocks else by.value * factor
        file = (adapter.name, printed_name(adapter.path), adapter.size, digest)
        return cls(adapter, BakedLora(*file, by.value, scale, by.blocks))


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's ``weights`` and PEFT configuration. ``name``: its part of a bake's name.

    ``remote``: for an adapter on the hub, both files there; the paths are then their future ones.
    """

    name: str
    weights: Path
    config: Path | None = None
    remote: tuple[InputFile, InputFile | None] | None = None


def open_adapter(files: AdapterFiles, shapes: Shapes, allow_unmatched: bool = False, rule: str = RULES[0]) -> Adapter:
    """The adapter in ``files``, fitted to a transformer, for bakes by ``rule``.

    ``shapes`` maps the transformer's tensor names (diffusers spelling) to their shapes. Raises SourceError or
    FormatError for a file that cannot be read, AdapterError listing everything that does not fit.
    """
    file = read_tensorfile(files.weights)
    with tensor_reader(files.weights) as read:
        facts = read_facts(file, read_configuration(files.config), read)
    adapter = fit_adapter(file, shapes, facts, files.name, allow_unmatched).by(rule)
    return replace(adapter, config=files.config, stamp=file.stamp)


def fit_adapter(file: TensorFile, shapes: Shapes, facts: LoraFacts, name: str, allow_unmatched: bool) -> Adapter:
    """The adapter with the header ``file``, called ``name``. Raises AdapterError with the list of what does not fit."""
    parsed = {name: parse_key(name) for name, info in file.tensors.items() if not _is_marker(info)}
    keys = [key for key in parsed.values() if key]
    if not any(method.is_there([key.role for key in keys]) for method in METHODS[:-1]):
        refuse_model(file)
        raise AdapterError("holds no LoRA", file=file.path, items=sorted(file.tensors)[:5])
    faults: Faults = defaultdict(list)
    found, rests, removed = _find(keys, names_of(shapes), faults)
    unmatched = dict.fromkeys(key.module for key, names in found if not names and file.tensors[key.key].nbytes)
    modules = _by_module(found, file, faults)
    if not modules:
        raise _other_model(file.path, list(unmatched), shapes, rests)
    for module in () if allow_unmatched else unmatched:
        kind = "target outside the transformer" if belongs_elsewhere(module) else "unmatched target"
        rest = next((rest for rest in rests[:MAX_RESTS] if module.startswith(rest)), None)
        faults[kind].append(f"{module} has `{rest}` before our name" if rest else module)
    for unknown in (tensor for tensor, key in parsed.items() if key is None):
        method = unread_method(unknown)
        faults["unknown key"].append(f"{unknown} is of {method}, which is not read" if method else unknown)
    targets = _targets(modules, shapes, facts, faults)
    judged = facts.judge((key for key in keys if key.module not in unmatched), file.tensors)
    for kind, items in judged.faults.items():
        faults[kind] += items
    if not targets and set(faults) == {"shape mismatch"}:
        problem = "is a LoRA for another model: its names are in this transformer, but no shape agrees"
        raise AdapterError(problem, file=file.path, items=faults["shape mismatch"])
    if faults:
        raise _does_not_fit(file.path, faults)
    return Adapter(
        name=name,
        path=file.path,
        size=file.size,
        targets=dict(sorted(targets.items())),
        styles=tuple(sorted({key.style for key in keys if key.role != "alpha"})),
        skipped=tuple(unmatched),
        foreign=facts.foreign,
        dora_by=facts.dora_by,
        notes=tuple(judged.notes),
        warnings=(*judged.warnings, *_told(list(unmatched), rests if removed else (), targets, facts)),
    )


def refuse_model(file: TensorFile) -> None:
    """Raises AdapterError for the weights of a model, perhaps with a merged LoRA, in the place of a LoRA."""
    header = read_lora(file)
    model = None if header.is_lora or header.unpaired else described(file)
    if model:
        raise AdapterError(
            f"is no LoRA but {model}",
            file=file.path,
            expected="the LoRA itself: pairs of lora_A and lora_B weights",
            next="ltxpack bake-lora OVERLAY --strength 0.5 (takes the overlay's own LoRA; --add FILE=S adds one)",
        )


# Which modules the keys mean


def _find(keys: Sequence[LoraKey], names: ModuleNames, faults: Faults) -> tuple[Found, list[str], bool]:
    """The modules of all keys, the unknown prefixes before our names, and whether one before all keys is removed."""
    found: Found = []
    for key in keys:
        try:
            found.append((key, names.find(key)))
        except KeyError:
            faults["ambiguous name"].append(key.key)
    unknown = [key for key, modules in found if not modules]
    rests = list(dict.fromkeys(rest for key in unknown if (rest := names.rest_before(key))))
    if not rests:
        # Outside the blocks other models have modules with our names, so one strange name is enough to doubt all.
        every = dict.fromkeys(names.rest_before(key, in_block=False) for key in unknown)
        rests = [rest for rest in every if rest and len(every) == 1]
    removed = len(rests) == 1 and len(unknown) == len(found)
    if removed:
        found = [(key, names.find(key.without(rests[0]))) for key in unknown]
    return found, rests, removed


@dataclass
class _Module:
    """The tensors by role, still unchecked, of one module, or of one fused kv or qkv (``names``, in row order)."""

    names: tuple[str, ...]
    key: LoraKey
    found: dict[str, TensorInfo] = field(default_factory=dict)


def _by_module(found: Found, file: TensorFile, faults: Faults) -> list[_Module]:
    modules: dict[tuple[str, ...], _Module] = {}
    for key, names in found:
        if names is not None:
            module = modules.setdefault(names, _Module(names, key))
            own = module.found
            if key.module != module.key.module:
                faults["another name of one module"].append(f"{key.key} beside {module.key.key}")
            if key.role in own:
                faults["duplicate"].append(f"{key.key} and {own[key.role].name}")
            own.setdefault(key.role, file.tensors[key.key])
    return list(modules.values())


# How its tensors change a module


class _Misfit(Exception):
    """The first fault of a module: its kind, and the words for it."""


def _targets(modules: Iterable[_Module], shapes: Shapes, facts: LoraFacts, faults: Faults) -> dict[str, LoraTarget]:
    targets: dict[str, LoraTarget] = {}
    for module in modules:
        try:
            _check_roles(module.found)
            own = list(_targets_of(module, shapes, facts))
        except _Misfit as misfit:
            kind, words = misfit.args
            faults[kind].append(words)
            continue
        for target in own:
            if target.weight in targets:
                faults["duplicate"].append(f"{target.weight} is changed by a fused and by a separate target")
            targets[target.weight] = target
    return targets


def _check_roles(found: Mapping[str, TensorInfo]) -> None:
    """Raises _Misfit unless the tensors of a module belong together and have usable dtypes."""
    stored = {role: info for role, info in found.items() if role != "alpha"}
    for info in stored.values():
        if info.dtype not in FACTOR_DTYPES:
            raise _Misfit("unusable dtype", f"{info.name} is {info.dtype}")
    for role, info in stored.items():
        if role.removesuffix(SCALE) not in found:
            raise _Misfit("half pair", f"{info.name} has no tensor that it scales")
    there = [method for method in METHODS if method.is_there(stored)]
    if not there:
        raise _Misfit("half pair", f"{', '.join(info.name for info in found.values())} without factors")
    for method in there:
        if wrong := method.missing(stored):
            has = next(info.name for role, info in stored.items() if role in method.roles)
            lacks = " or ".join(role for role in wrong if role not in stored)
            raise _Misfit("half pair", f"{has} has no {lacks} factor" if lacks else f"{has} and {wrong[0]}")
    if "magnitude" in stored and not all(method.rank for method in there):
        raise _Misfit("half pair", f"{stored['magnitude'].name} needs both factors and no .diff beside them")
    for roles in (stored.keys() - _BIAS_ROLES, stored.keys() & _BIAS_ROLES):
        there = [method for method in METHODS if method.is_there(roles)]
        ranked = [method for method in there if method.rank]
        apart = ranked if len(ranked) > 1 else there if any(method.alone for method in there) else []
        if len(apart) > 1:
            first, second = (next(stored[role].name for role in method.roles & roles) for method in apart[:2])
            raise _Misfit("conflict", f"{first} and {second} change one module in two ways")


def _targets_of(module: _Module, shapes: Shapes, facts: LoraFacts) -> Iterator[LoraTarget]:
    """One target for each module, and one for a bias that changes too. Raises _Misfit for a wrong shape."""
    sized = _sized(module, shapes)
    scales = {role: info for role, info in module.found.items() if role.endswith(SCALE)}
    for role, info in scales.items():
        _check_scale(info, sized[role.removesuffix(SCALE)])
    methods = [method for method in METHODS if method.is_there(sized)]
    cut = {"magnitude"}.union(*(FORMULAS[method.name].rows or () for method in methods))
    rank, factor, alpha = _scaling(module, methods, facts)
    count = len(module.names)
    for i, name in enumerate(module.names):
        own: dict[str, dict[str, TensorInfo]] = {"weight": {}, "bias": {}}
        for role, info in (sized | scales).items():
            base = role.removesuffix(SCALE)
            whole = base not in cut or math.prod(info.shape) == 1
            own["bias" if base in _BIAS_ROLES else "weight"][role] = info if whole else _rows(info, i, count)
        for kind, tensors in own.items():
            used = tuple(method.name for method in methods if method.is_there(tensors))
            if used:
                # A bias has no rank of its own.
                own_rank = rank if kind == "weight" else 0
                cayley = facts.cayley if "peft-oft" in used else PEFT_CAYLEY
                yield LoraTarget(_tensor(name, kind, shapes), used, tensors, own_rank, factor, alpha, cayley)


def _scaling(module: _Module, methods: Sequence[Method], facts: LoraFacts) -> tuple[int, float, float | None]:
    """``(rank, factor, alpha)`` of a module's targets."""
    scaled = next((method for method in methods if method.rank), None)
    if scaled is None:
        bounded = any(method.name == "oft" for method in methods)
        return 0, 1.0, facts.alphas.get(module.key.module) if bounded else None
    rank = scaled.rank_of({role: info.shape for role, info in module.found.items()})
    alpha, factor = facts.scale(module.key, rank)
    return rank, factor, alpha


def _sized(module: _Module, shapes: Shapes) -> dict[str, TensorInfo]:
    """The tensors that change something, without trailing sizes of 1. Raises _Misfit."""
    found, sizes = module.found, {role: info.shape for role, info in module.found.items()}
    weight, bias = (_whole(module.names, kind, shapes) for kind in ("weight", "bias"))
    wanted = {role: bias for role in found if role in _BIAS_ROLES}
    for method in METHODS:
        own = method.roles.intersection(found) - _BIAS_ROLES
        if own and weight is None and method.name in _ANY_SHAPE:
            wanted |= dict.fromkeys(own)
        elif own:
            _check_method(module, method, weight)
            assert weight is not None
            try:
                wanted |= FORMULAS[method.name].shapes(sizes, weight)
            except ValueError as error:
                raise _Misfit("shape mismatch", f"{module.key.module}: {error}") from None
    if "magnitude" in found and weight is not None:
        # One number for each output row, [out] (PEFT) or [out, 1]; or one for each input, [1, in] (LyCORIS).
        inputs = (1, weight[1])
        over_inputs = sizes["magnitude"] == inputs and weight[0] > 1 and len(module.names) == 1
        wanted["magnitude"] = inputs if over_inputs else weight[:1]
    return {role: _with_shape(found[role], shape) for role, shape in wanted.items()}


def _check_method(module: _Module, method: Method, weight: tuple[int, ...] | None) -> None:
    """Raises _Misfit if ``method`` cannot change a weight of this shape, whatever the shapes of its tensors."""
    found, name = module.found, module.key.module
    if method.name in _ANY_SHAPE:
        return
    if weight is None or len(weight) != 2:
        raise _Misfit("shape mismatch", f"{name} is no linear, or its fused parts differ in shape")
    # With a core LoHa's first factors have the outputs as columns.
    if len(module.names) > 1 and (FORMULAS[method.name].rows is None or "hada_t1" in found):
        raise _Misfit("shape mismatch", f"{name} is a fused projection, and {method.name} cannot be cut in parts")
    for role, info in found.items():
        if role in method.needed and len(info.shape) < 2:
            raise _Misfit("shape mismatch", f"{info.name} {list(info.shape)}, expected a matrix")
    if method.name == "lora" and found["up"].shape[1] != found["down"].shape[0]:
        down, up = (f"{found[role].name} {list(found[role].shape)}" for role in ("down", "up"))
        raise _Misfit("rank mismatch", f"{down} and {up}")


def _with_shape(info: TensorInfo, shape: tuple[int, ...] | None) -> TensorInfo:
    """``info`` as ``shape``. Raises _Misfit if that is None, or more than trailing sizes of 1 differ."""
    if not info.nbytes:
        raise _Misfit("empty tensor", f"{info.name} {list(info.shape)} changes nothing")
    # Some files have [rank, in, 1, 1], as for a convolution.
    if shape is None or info.shape[: len(shape)] != shape or math.prod(info.shape[len(shape) :]) != 1:
        expected = "nothing to change there" if shape is None else list(shape)
        raise _Misfit("shape mismatch", f"{info.name} {list(info.shape)}, expected {expected}")
    return replace(info, shape=shape)


def _check_scale(scale: TensorInfo, scaled: TensorInfo) -> None:
    """Raises _Misfit unless ``scale`` is one number, or one for each row of ``scaled``."""
    rows = scaled.shape[0]
    if math.prod(scale.shape) != 1 and scale.shape not in ((rows,), (rows, 1)):
        expected = f"one number, or one for each of the {rows} rows of {scaled.name}"
        raise _Misfit("shape mismatch", f"{scale.name} {list(scale.shape)}, expected {expected}")


def _whole(modules: Sequence[str], kind: str, shapes: Shapes) -> tuple[int, ...] | None:
    """The shape of a module's weight or bias, or of fused ones stacked; None if there is none."""
    shape, *others = {shapes.get(_tensor(module, kind, shapes)) for module in modules}
    return None if others or not shape else (len(modules) * shape[0], *shape[1:])


def _tensor(module: str, kind: str, shapes: Shapes) -> str:
    """The name of a module's weight or bias; a table has the module's name."""
    return module if kind == "weight" and module in shapes else f"{module}.{kind}"


def _is_marker(info: TensorInfo) -> bool:
    """Whether a tensor only marks a file: it has no elements, or is the sign of quantised weights."""
    return parse_key(info.name) is None and (not info.nbytes or info.name.rpartition(".")[2] == "scaled_fp8")


def _rows(info: TensorInfo, i: int, count: int) -> TensorInfo:
    """The ``i``-th of ``count`` equal parts of the rows, which is one run of bytes."""
    nbytes = info.nbytes // count
    shape = (info.shape[0] // count, *info.shape[1:])
    return replace(info, shape=shape, start=info.start + i * nbytes, nbytes=nbytes)


# What is said of it


def _does_not_fit(path: Path, faults: Faults) -> AdapterError:
    counts = (f"{len(items)} {kind if len(items) == 1 else _plural(kind)}" for kind, items in faults.items())
    text = "; bake-lora --text bakes those of the text path" if "target outside the transformer" in faults else ""
    skippable = set(faults) <= {"unmatched target", "target outside the transformer"}
    return AdapterError(
        f"does not fit this transformer: {', '.join(counts)}",
        file=path,
        items=listed_faults(faults),
        next=f"the same command with --allow-unmatched leaves these targets out{text}" if skippable else None,
    )


def _plural(kind: str) -> str:
    if kind.startswith("target "):
        return kind.replace("target ", "targets ", 1)
    return f"{kind}es" if kind.endswith("ch") else f"{kind}s"


def _other_model(path: Path, unmatched: Sequence[str], shapes: Shapes, rests: Sequence[str]) -> AdapterError:
    outside = all(belongs_elsewhere(module) for module in unmatched)
    example = next(iter(sorted(name for name in shapes if name.endswith(".to_q.weight"))), next(iter(shapes)))
    problem = f"is a LoRA for another model: none of its {len(unmatched)} targets is in this transformer"
    advice = None
    if outside:
        problem = "changes only the text path, no transformer weight"
        advice = "bake-lora with --text bakes it"
    elif 0 < len(rests) <= MAX_RESTS:
        problem = f"is not read: its names have {' and '.join(f'`{rest}`' for rest in rests)} before ours"
        advice = "rename its tensors so that all of them have the same prefix, or none"
    return AdapterError(
        problem,
        file=path,
        expected=f"targets like {example.removesuffix('.weight')}",
        found=f"{', '.join(unmatched[:3])}{' …' if len(unmatched) > 3 else ''}",
        next=advice,
    )


def _told(
    unmatched: Sequence[str], rests: Iterable[str], targets: Mapping[str, LoraTarget], facts: LoraFacts
) -> Iterator[str]:
    """Sentences about its names and methods for the user."""
    if unmatched:
        yield f"{len(unmatched)} targets are not in the transformer and are left out: {listed(unmatched)}"
    for rest in rests:
        yield f"its names have `{rest}` before ours, which ltxpack removes"
    if not facts.first("use_cayley_neumann") and any("peft-oft" in target.methods for target in targets.values()):
        yield "nothing says how its oft_R becomes rotations: taken as PEFT does by default (a series of 5 terms)"
    if replaced := [name for name, target in targets.items() if "weight" in target.methods]:
        what = "1 tensor is" if len(replaced) == 1 else f"{len(replaced)} tensors are"
        yield f"{what} replaced whole (at strength 1; else that share of the way): {listed(replaced)}"


def _told_alpha(targets: Mapping[str, LoraTarget]) -> Iterator[str]:
    scaled = {name: target.factor for name, target in targets.items() if target.rank}
    if still := [name for name, factor in scaled.items() if factor == 0]:
        whole = "it changes nothing" if len(still) == len(targets) else f"these change nothing: {listed(still)}"
        yield f"alpha is 0 in {len(still)} of {len(targets)} targets: {whole}"
    if turned := [name for name, factor in scaled.items() if factor < 0]:
        yield f"alpha is negative in {len(turned)} of {len(targets)} targets: they act in reverse"
