"""An adapter file in any naming -> ``{transformer weight: LoraTarget}``; finds every fault before a byte is written.

It reads only headers and the alpha scalars. The factors stay in the file, as byte ranges, until the bake fuses them.
Spec 02, sections 1, 2 and 7. Knows no arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ltxpack.errors import AdapterError, SourceError, listed, one_line
from ltxpack.files.tensorfile import TensorFile, TensorInfo, read_tensorfile, tensor_reader
from ltxpack.lora_bake.methods import FORMULAS
from ltxpack.ltx23.contents import described
from ltxpack.ltx23.lora_facts import PEFT_CAYLEY, CayleyForm, LoraFacts, read_facts
from ltxpack.ltx23.lora_keys import (
    METHODS,
    SCALE,
    LoraKey,
    Method,
    ModuleNames,
    belongs_elsewhere,
    parse_key,
    unread_method,
)
from ltxpack.ltx23.lora_statements import PEFT_CONFIG, PEFT_WEIGHTS, configuration_beside, read_configuration
from ltxpack.ltx23.text_keys import names_of
from ltxpack.manifest import BakedLora
from ltxpack.materialize.checkpoint import read_lora
from ltxpack.strength import Strength

FACTOR_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# With more different prefixes of names than this, the file belongs to another model.
MAX_RESTS = 2
# The roles of tensors that change the module's bias, not its weight.
_BIAS_ROLES = frozenset({"up_b", "diff_b", "bias"})
_SCALED = frozenset(method.name for method in METHODS if method.rank)
# Methods that also change norms and tables.
_ANY_SHAPE = ("diff", "weight")

Shapes = Mapping[str, tuple[int, ...]]


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
        if {"magnitude", "rescale", "boft_s"}.intersection(self.tensors) or "weight" in self.methods:
            return False
        own = [method for method in METHODS if method.name in self.methods]
        # One factor of zeros makes a product zero; zeros make a rotation the identity.
        return all(
            (method.rank and self.factor == 0)
            or any(info.name in zero for role, info in self.tensors.items() if role.removesuffix(SCALE) in method.roles)
            for method in own
        )

    @property
    def beyond_official(self) -> str | None:
        """The method that the official rule does not know; None for a product of two factors or a difference."""
        if "magnitude" in self.tensors:
            return "DoRA"
        return next((name for name in self.methods if name not in ("lora", "diff")), None)


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the transformer. ``skipped`` are modules that the caller allowed to leave out.

    ``foreign``: another model for which the file says it was made. ``dora_by``: the statement of what its magnitudes
    mean. ``notes``, ``warnings``: sentences for the user.
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

    def within(self, shapes: Shapes) -> Adapter:
        """The part of it that changes the tensors in ``shapes``."""
        return replace(self, targets={name: target for name, target in self.targets.items() if name in shapes})

    @property
    def plain_bf16(self) -> bool:
        """Whether every target is a bf16 product and nothing else."""
        targets = self.targets.values()
        return all(
            target.tensors.keys() == {"down", "up"} and all(info.dtype == "BF16" for info in target.tensors.values())
            for target in targets
        )


@dataclass(frozen=True)
class LoraUse:
    """One LoRA of a bake: its fitted adapter, and its entry in the manifest."""

    adapter: Adapter
    baked: BakedLora

    @classmethod
    def of(cls, adapter: Adapter, strength: float | Strength, digest: str, rule: str) -> LoraUse:
        """``adapter`` at ``strength``; ``digest`` is its content's hash."""
        factor, by = 1.0 if rule == "official" else adapter.factor, Strength.of(strength)
        scale = None if factor is None or by.blocks else by.value * factor
        file = (adapter.name, one_line(adapter.path.name), adapter.size, digest)
        return cls(adapter, BakedLora(*file, by.value, scale, by.blocks))


AdapterFiles = tuple[Path, Path | None]
"""The weights of an adapter, and the PEFT configuration that belongs to them."""


def open_adapter(
    path: Path,
    shapes: Shapes,
    *,
    name: str | None = None,
    allow_unmatched: bool = False,
    files: AdapterFiles | None = None,
) -> Adapter:
    """The adapter at ``path`` (a safetensors file or a PEFT folder), fitted to a transformer.

    ``files``: its weights and configuration, if known already. ``shapes`` maps the transformer's tensor
    names (diffusers spelling) to their shapes. Raises SourceError or FormatError for a file that cannot be read,
    AdapterError listing everything that does not fit.
    """
    weights, config = files or adapter_files(path)
    file = read_tensorfile(weights)
    with tensor_reader(weights) as read:
        facts = read_facts(file, read_configuration(config), read)
        adapter = fit_adapter(file, shapes, facts, allow_unmatched)
    return replace(adapter, name=name or path.stem, config=config)


def adapter_files(path: Path) -> AdapterFiles:
    """The files of the adapter at ``path``. Raises SourceError."""
    if path.is_dir():
        weights = path / PEFT_WEIGHTS
        if not weights.is_file():
            raise SourceError("is a folder without a PEFT adapter", file=path, expected=PEFT_WEIGHTS)
        if not (path / PEFT_CONFIG).is_file():
            raise SourceError("is a PEFT folder without its configuration", file=path, expected=PEFT_CONFIG)
        return weights, path / PEFT_CONFIG
    return path, configuration_beside(path)


def fit_adapter(file: TensorFile, shapes: Shapes, facts: LoraFacts, allow_unmatched: bool = False) -> Adapter:
    """The adapter whose header is ``file``. Raises AdapterError listing everything that does not fit."""
    parsed = {name: parse_key(name) for name, info in file.tensors.items() if not _is_marker(info)}
    keys = [key for key in parsed.values() if key]
    if not any(method.is_there([key.role for key in keys]) for method in METHODS[:-1]):
        refuse_model(file)
        raise AdapterError("holds no LoRA", file=file.path, items=sorted(file.tensors)[:5])
    fit = _Fit(file, shapes, facts)
    unmatched = fit.sort(keys, names_of(shapes))
    if not fit.modules:
        raise _other_model(file.path, unmatched, shapes, list(fit.rests))
    if not allow_unmatched:
        for module in unmatched:
            kind = "target outside the transformer" if belongs_elsewhere(module) else "unmatched target"
            rest = next((rest for rest in fit.rests if module.startswith(rest)), None)
            fit.fault(kind, f"{module} has `{rest}` before our name" if rest else module)
    for name in (name for name, key in parsed.items() if key is None):
        method = unread_method(name)
        fit.fault("unknown key", f"{name} is of {method}, which is not read" if method else name)
    targets = fit.targets()
    judged = facts.judge((key for key in keys if key.module not in set(unmatched)), file.tensors)
    for kind, items in judged.faults.items():
        for item in items:
            fit.fault(kind, item)
    if not targets and set(fit.faults) == {"shape mismatch"}:
        problem = "is a LoRA for another model: its names are in this transformer, but no shape agrees"
        raise AdapterError(problem, file=file.path, items=fit.faults["shape mismatch"])
    if fit.faults:
        raise _misfit(file.path, fit.faults)
    return Adapter(
        name=file.path.stem,
        path=file.path,
        size=file.size,
        targets=dict(sorted(targets.items())),
        styles=tuple(sorted({key.style for key in keys if key.role != "alpha"})),
        skipped=tuple(unmatched),
        foreign=facts.foreign,
        dora_by=facts.dora_by,
        notes=tuple(judged.notes),
        warnings=(*_warnings(unmatched), *judged.warnings, *_told(fit.rests, targets, facts)),
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


@dataclass
class _ModuleKeys:
    """The unchecked keys of one module, or of one fused kv or qkv (``modules``, in row order)."""

    modules: tuple[str, ...]
    key: LoraKey
    found: dict[str, TensorInfo] = field(default_factory=dict)


class _Fit:
    """Fits one adapter. ``faults`` collects all faults by kind, so that one error lists them."""

    def __init__(self, file: TensorFile, shapes: Shapes, facts: LoraFacts) -> None:
        self.modules: dict[tuple[str, ...], _ModuleKeys] = {}
        # Unknown prefixes before our names.
        self.rests: dict[str, None] = {}
        self.faults: dict[str, list[str]] = {}
        self._file, self._shapes, self._stated = file, shapes, facts

    def fault(self, kind: str, item: str) -> None:
        """Add a fault."""
        self.faults.setdefault(kind, []).append(item)

    def sort(self, keys: Iterable[LoraKey], names: ModuleNames) -> list[str]:
        """Sort the keys by module; returns the modules that the transformer does not have."""
        unmatched: dict[str, None] = {}
        for key, modules in self._found(list(keys), names):
            if modules is None:
                unmatched |= {key.module: None} if self._file.tensors[key.key].nbytes else {}
                continue
            found = self.modules.setdefault(modules, _ModuleKeys(modules, key)).found
            if key.role in found:
                self.fault("duplicate", f"{key.key} and {found[key.role].name}")
            else:
                found[key.role] = self._file.tensors[key.key]
        return list(unmatched)

    def _found(self, keys: Sequence[LoraKey], names: ModuleNames) -> Iterator[tuple[LoraKey, tuple[str, ...] | None]]:
        """Each key with its modules. Removes an unknown prefix if all keys begin with the same one."""
        found: list[tuple[LoraKey, tuple[str, ...] | None]] = []
        for key in keys:
            try:
                found.append((key, names.find(key)))
            except KeyError:
                self.fault("ambiguous name", key.key)
        unknown = [key for key, modules in found if not modules]
        self.rests = dict.fromkeys(rest for key in unknown if (rest := names.rest_before(key)))
        if not self.rests:
            # Outside the blocks other models have modules with our names, so one strange name is enough to doubt all.
            every = dict.fromkeys(names.rest_before(key, in_block=False) for key in unknown)
            self.rests = {rest: None for rest in every if rest} if len(every) == 1 else {}
        if len(self.rests) != 1 or any(modules for _, modules in found):
            return iter(found)
        [rest] = self.rests
        return ((key, names.find(key.without(rest))) for key, _ in found)

    def targets(self) -> dict[str, LoraTarget]:
        """All targets by their weight."""
        targets: dict[str, LoraTarget] = {}
        for group in self.modules.values():
            for target in self._targets_of(group) if self._is_complete(group.found) else ():
                if target.weight in targets:
                    self.fault("duplicate", f"{target.weight} is changed by a fused and by a separate target")
                targets[target.weight] = target
        return targets

    def _is_complete(self, found: Mapping[str, TensorInfo]) -> bool:
        """Whether the tensors of a module belong together and have usable dtypes."""
        stored = {role: info for role, info in found.items() if role != "alpha"}
        bad = next((info for info in stored.values() if info.dtype not in FACTOR_DTYPES), None)
        lone = next((info for role, info in stored.items() if role.removesuffix(SCALE) not in found), None)
        there = [method for method in METHODS if method.is_there(stored)]
        apart = {method: method.missing(stored) for method in there if method.missing(stored)}
        if bad is not None:
            self.fault("unusable dtype", f"{bad.name} is {bad.dtype}")
        elif lone is not None:
            self.fault("half pair", f"{lone.name} has no tensor that it scales")
        elif not there:
            self.fault("half pair", f"{', '.join(info.name for info in found.values())} without factors")
        elif apart:
            method, wrong = next(iter(apart.items()))
            has = next(info for role, info in stored.items() if role in method.roles)
            lacks = " or ".join(role for role in wrong if role not in stored)
            self.fault("half pair", f"{has.name} has no {lacks} factor" if lacks else f"{has.name} and {wrong[0]}")
        elif "magnitude" in stored and not all(method.rank for method in there):
            self.fault("half pair", f"{stored['magnitude'].name} needs both factors and no .diff beside them")
        elif clash := _clash(stored):
            first, second = clash
            self.fault("conflict", f"{first.name} and {second.name} change one module in two ways")
        else:
            return True
        return False

    def _targets_of(self, group: _ModuleKeys) -> Iterator[LoraTarget]:
        """One target for each module, and one for a bias that changes too; none if a shape is wrong."""
        wanted = self._wanted_shapes(group)
        if wanted is None or not all(self._has_shape(group.found[role], shape) for role, shape in wanted.items()):
            return
        sized = {role: replace(group.found[role], shape=shape) for role, shape in wanted.items() if shape}
        scales = {role: info for role, info in group.found.items() if role.endswith(SCALE)}
        if not all(self._has_scale(info, sized[role.removesuffix(SCALE)]) for role, info in scales.items()):
            return
        methods = [method for method in METHODS if method.is_there(sized)]
        cut = {"magnitude"}.union(*(FORMULAS[method.name].rows or () for method in methods))
        rank, factor, alpha = self._facts(group, methods)
        count = len(group.modules)
        for i, module in enumerate(group.modules):
            own: dict[str, dict[str, TensorInfo]] = {"weight": {}, "bias": {}}
            for role, info in (sized | scales).items():
                base = role.removesuffix(SCALE)
                whole = base not in cut or math.prod(info.shape) == 1
                own["bias" if base in _BIAS_ROLES else "weight"][role] = info if whole else _rows(info, i, count)
            for kind, tensors in own.items():
                names = tuple(method.name for method in methods if method.is_there(tensors))
                if names:
                    # A bias has no rank of its own.
                    own_rank = rank if kind == "weight" else 0
                    cayley = self._stated.cayley if "peft-oft" in names else PEFT_CAYLEY
                    yield LoraTarget(self._tensor(module, kind), names, tensors, own_rank, factor, alpha, cayley)

    def _facts(self, group: _ModuleKeys, methods: Sequence[Method]) -> tuple[int, float, float | None]:
        """``(rank, factor, alpha)`` of a module's targets."""
        scaled = [method for method in methods if method.rank]
        if not scaled:
            bounded = any(method.name == "oft" for method in methods)
            return 0, 1.0, self._stated.alphas.get(group.key.module) if bounded else None
        rank = scaled[0].rank_of({role: info.shape for role, info in group.found.items()})
        alpha, factor = self._stated.scale(group.key, rank)
        return rank, factor, alpha

    def _wanted_shapes(self, group: _ModuleKeys) -> dict[str, tuple[int, ...] | None] | None:
        """Role -> the shape of its tensor, None if there is nothing to change; None after a fault."""
        found, sizes = group.found, {role: info.shape for role, info in group.found.items()}
        weight, bias = self._whole(group, "weight"), self._whole(group, "bias")
        wanted: dict[str, tuple[int, ...] | None] = {role: bias for role in found if role in _BIAS_ROLES}
        for method in METHODS:
            own = method.roles.intersection(found) - _BIAS_ROLES
            if own and weight is None and method.name in _ANY_SHAPE:
                wanted |= dict.fromkeys(own)
            elif own:
                if obstacle := _obstacle(group, method, weight):
                    self.fault(*obstacle)
                    return None
                assert weight is not None
                try:
                    wanted |= FORMULAS[method.name].shapes(sizes, weight)
                except ValueError as error:
                    self.fault("shape mismatch", f"{group.key.module}: {error}")
                    return None
        if "magnitude" in found and weight is not None:
            # One number for each output row, [out] (PEFT) or [out, 1]; or one for each input, [1, in] (LyCORIS).
            inputs = (1, weight[1])
            over_inputs = sizes["magnitude"] == inputs and weight[0] > 1 and len(group.modules) == 1
            wanted["magnitude"] = inputs if over_inputs else weight[:1]
        return wanted

    def _whole(self, group: _ModuleKeys, kind: str) -> tuple[int, ...] | None:
        """The shape of a module's weight or bias, or of fused ones stacked; None if there is none."""
        shapes = {self._shapes.get(self._tensor(module, kind)) for module in group.modules}
        shape = shapes.pop()
        return None if shapes or not shape else (len(group.modules) * shape[0], *shape[1:])

    def _tensor(self, module: str, kind: str) -> str:
        """The name of a module's weight or bias; a table has the module's name."""
        return module if kind == "weight" and module in self._shapes else f"{module}.{kind}"

    def _has_scale(self, scale: TensorInfo, scaled: TensorInfo) -> bool:
        """Whether ``scale`` is one number, or one for each row of ``scaled``."""
        if math.prod(scale.shape) == 1 or scale.shape in ((scaled.shape[0],), (scaled.shape[0], 1)):
            return True
        expected = f"one number, or one for each of the {scaled.shape[0]} rows of {scaled.name}"
        self.fault("shape mismatch", f"{scale.name} {list(scale.shape)}, expected {expected}")
        return False

    def _has_shape(self, info: TensorInfo, shape: tuple[int, ...] | None) -> bool:
        # Some files have [rank, in, 1, 1], as for a convolution.
        if shape is not None and _trimmed(info.shape, len(shape)) == shape and info.nbytes:
            return True
        if not info.nbytes:
            self.fault("empty tensor", f"{info.name} {list(info.shape)} changes nothing")
            return False
        expected = "nothing to change there" if shape is None else list(shape)
        self.fault("shape mismatch", f"{info.name} {list(info.shape)}, expected {expected}")
        return False


def _obstacle(group: _ModuleKeys, method: Method, weight: tuple[int, ...] | None) -> tuple[str, str] | None:
    """The fault if ``method`` cannot change a weight of this shape; None if its tensors' shapes decide."""
    found, module = group.found, group.key.module
    if method.name in _ANY_SHAPE:
        return None
    if weight is None or len(weight) != 2:
        return "shape mismatch", f"{module} is no linear, or its fused parts differ in shape"
    if len(group.modules) > 1 and FORMULAS[method.name].rows is None:
        return "shape mismatch", f"{module} is a fused projection, and {method.name} cannot be cut in parts"
    flat = next((info for role, info in found.items() if role in method.needed and len(info.shape) < 2), None)
    if flat is not None:
        return "shape mismatch", f"{flat.name} {list(flat.shape)}, expected a matrix"
    if method.name != "lora" or found["up"].shape[1] == found["down"].shape[0]:
        return None
    down, up = (f"{found[role].name} {list(found[role].shape)}" for role in ("down", "up"))
    return "rank mismatch", f"{down} and {up}"


def _clash(stored: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo] | None:
    """Two tensors that cannot both change a module's weight, or its bias; None if there are none."""
    for own in (stored.keys() - _BIAS_ROLES, stored.keys() & _BIAS_ROLES):
        there = [method for method in METHODS if method.is_there(own)]
        ranked = [method for method in there if method.rank]
        apart = ranked if len(ranked) > 1 else there if any(method.alone for method in there) else []
        if len(apart) > 1:
            first, second = (next(stored[role] for role in method.roles if role in own) for method in apart[:2])
            return first, second
    return None


def _is_marker(info: TensorInfo) -> bool:
    """Whether a tensor only marks a file: it has no elements, or is the sign of quantised weights."""
    return parse_key(info.name) is None and (not info.nbytes or info.name.rpartition(".")[2] == "scaled_fp8")


def _trimmed(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
    """``shape`` without trailing ones after its first ``length`` sizes."""
    return shape[:length] if all(size == 1 for size in shape[length:]) else shape


def _rows(info: TensorInfo, i: int, count: int) -> TensorInfo:
    """The ``i``-th of ``count`` equal parts of the rows, which is one run of bytes."""
    nbytes = info.nbytes // count
    shape = (info.shape[0] // count, *info.shape[1:])
    return replace(info, shape=shape, start=info.start + i * nbytes, nbytes=nbytes)


def _misfit(path: Path, faults: Mapping[str, Sequence[str]]) -> AdapterError:
    counts = (f"{len(items)} {kind if len(items) == 1 else _plural(kind)}" for kind, items in faults.items())
    skippable = set(faults) <= {"unmatched target", "target outside the transformer"}
    return AdapterError(
        f"does not fit this transformer: {', '.join(counts)}",
        file=path,
        items=[f"{kind}: {item}" for kind, items in faults.items() for item in items],
        next=_advice(faults) if skippable else None,
    )


def _plural(kind: str) -> str:
    if kind.startswith("target "):
        return kind.replace("target ", "targets ", 1)
    return f"{kind}es" if kind.endswith("ch") else f"{kind}s"


def _advice(faults: Iterable[str]) -> str:
    text = "; bake-lora --text bakes those of the text path" if "target outside the transformer" in faults else ""
    return f"the same command with --allow-unmatched leaves these targets out{text}"


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


def _told(rests: Iterable[str], targets: Mapping[str, LoraTarget], facts: LoraFacts) -> Iterator[str]:
    """Sentences about its names and methods for the user."""
    for rest in rests:
        yield f"its names have `{rest}` before ours, which ltxpack removes"
    scaled = {name: target.factor for name, target in targets.items() if target.rank}
    if still := [name for name, factor in scaled.items() if factor == 0]:
        whole = "it changes nothing" if len(still) == len(targets) else f"these change nothing: {listed(still)}"
        yield f"alpha is 0 in {len(still)} of {len(targets)} targets: {whole}"
    if turned := [name for name, factor in scaled.items() if factor < 0]:
        yield f"alpha is negative in {len(turned)} of {len(targets)} targets: they act in reverse"
    stated = any(one.fact == "use_cayley_neumann" for one in facts.statements)
    if not stated and any("peft-oft" in target.methods for target in targets.values()):
        yield "nothing says how its oft_R becomes rotations: taken as PEFT does by default (a series of 5 terms)"
    replaced = [name for name, target in targets.items() if "weight" in target.methods]
    if replaced:
        shown = ", ".join(replaced[:5]) + (" …" if len(replaced) > 5 else "")
        what = "1 tensor is" if len(replaced) == 1 else f"{len(replaced)} tensors are"
        yield f"{what} replaced whole (at strength 1; else that share of the way): {shown}"


def _warnings(unmatched: Sequence[str]) -> Iterator[str]:
    if unmatched:
        shown = ", ".join(unmatched[:5]) + (" …" if len(unmatched) > 5 else "")
        yield f"{len(unmatched)} targets are not in the transformer and are left out: {shown}"
