"""An adapter file in any naming -> ``{transformer weight: LoraTarget}``; every fault is found before a byte is written.

Only headers are read here, and the alpha scalars. The factors stay in the file, as byte ranges, until they are fused.
Spec 02, sections 1, 2 and 7. Knows nothing of arithmetic.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ltxpack.errors import AdapterError, SourceError
from ltxpack.files.tensorfile import TensorFile, TensorInfo, read_json, read_tensorfile
from ltxpack.lora_bake import peft
from ltxpack.lora_bake.peft import MAX_ALPHA, PeftConfig
from ltxpack.ltx23.forms import described
from ltxpack.ltx23.lora_keys import LoraKey, ModuleNames, belongs_elsewhere, parse_key
from ltxpack.manifest import BakedLora
from ltxpack.materialize.checkpoint import read_lora

FACTOR_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

_SCALARS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B", "I8": "<b",
}  # fmt: skip
_FACTOR_ROLES = ("down", "up", "magnitude", "diff", "diff_b")

Shapes = Mapping[str, tuple[int, ...]]
ReadTensor = Callable[[TensorInfo], bytes]


@dataclass(frozen=True)
class LoraTarget:
    """What an adapter does to one weight (or bias): a low-rank product, a full difference, or both.

    ``down`` is A [rank, in], ``up`` is B [out, rank]. ``factor`` is what the strength is multiplied by for B·A:
    alpha/rank, alpha/sqrt(rank) with rslora, or 1; a full difference is scaled by the strength alone. The tensors are
    byte ranges of the adapter file; of a fused projection each target has its own rows.
    """

    weight: str
    rank: int = 0
    factor: float = 1.0
    alpha: float | None = None
    down: TensorInfo | None = None
    up: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    diff: TensorInfo | None = None

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """All the byte ranges this target needs."""
        return tuple(info for info in (self.down, self.up, self.magnitude, self.diff) if info is not None)


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the transformer. ``skipped`` are modules left out because the caller allowed it."""

    name: str
    path: Path
    size: int
    targets: Mapping[str, LoraTarget]
    styles: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    config: Path | None = None
    warnings: tuple[str, ...] = ()

    @property
    def factor(self) -> float | None:
        """The factor if it is the same for all low-rank targets, else None."""
        factors = {target.factor for target in self.targets.values() if target.down is not None} or {1.0}
        return factors.pop() if len(factors) == 1 else None

    @property
    def dora(self) -> list[str]:
        """The weights whose rows have a magnitude."""
        return [target.weight for target in self.targets.values() if target.magnitude is not None]

    @property
    def plain_bf16(self) -> bool:
        """Whether every target is a bf16 product and nothing else."""
        targets = self.targets.values()
        products = not self.dora and all(target.diff is None for target in targets)
        return products and all(info.dtype == "BF16" for target in targets for info in target.tensors)


@dataclass(frozen=True)
class LoraUse:
    """One LoRA of a bake: what it fits, and how the manifest lists it."""

    adapter: Adapter
    baked: BakedLora

    @classmethod
    def of(cls, adapter: Adapter, strength: float, digest: str, rule: str) -> LoraUse:
        """``adapter`` at ``strength``; ``digest`` is its content's hash."""
        factor = 1.0 if rule == "official" else adapter.factor
        scale = None if factor is None else strength * factor
        return cls(adapter, BakedLora(adapter.name, adapter.path.name, adapter.size, digest, strength, scale))


def open_adapter(path: Path, shapes: Shapes, *, name: str | None = None, allow_unmatched: bool = False) -> Adapter:
    """The adapter at ``path`` (a safetensors file or a PEFT folder), fitted to a transformer.

    ``shapes`` maps the transformer's tensor names (diffusers spelling) to their shapes. Raises SourceError or
    FormatError for a file that cannot be read, AdapterError listing everything that does not fit.
    """
    weights, config = adapter_files(path)
    file = read_tensorfile(weights)
    with weights.open("rb") as stream:

        def read(info: TensorInfo) -> bytes:
            stream.seek(info.start)
            return stream.read(info.nbytes)

        stated = peft.from_document(read_json(config), config) if config else peft.from_metadata(file.metadata, weights)
        adapter = fit_adapter(file, shapes, stated, read, allow_unmatched)
    return replace(adapter, name=name or path.stem, config=config)


def adapter_files(path: Path) -> tuple[Path, Path | None]:
    """The weights and, for PEFT, the configuration. Raises SourceError."""
    if path.is_dir():
        weights = path / PEFT_WEIGHTS
        if not weights.is_file():
            raise SourceError("is a folder without a PEFT adapter", file=path, expected=PEFT_WEIGHTS)
        if not (path / PEFT_CONFIG).is_file():
            raise SourceError("is a PEFT folder without its configuration", file=path, expected=PEFT_CONFIG)
        return weights, path / PEFT_CONFIG
    config = path.with_name(PEFT_CONFIG)
    return path, config if path.name == PEFT_WEIGHTS and config.is_file() else None


def fit_adapter(
    file: TensorFile, shapes: Shapes, stated: PeftConfig, read: ReadTensor | None, allow_unmatched: bool = False
) -> Adapter:
    """The adapter whose header is ``file``. Raises AdapterError listing everything that does not fit.

    ``read`` gives a tensor's bytes; None if only the header is here, and then alphas stored as tensors are not known.
    """
    parsed = {name: parse_key(name) for name in file.tensors}
    keys = [key for key in parsed.values() if key]
    if not any(key.role in ("down", "up", "diff", "diff_b") for key in keys):
        refuse_model(file)
        raise AdapterError("holds no LoRA", file=file.path, items=sorted(file.tensors)[:5])
    fit = _Fit(file, shapes, stated, read)
    unmatched = fit.sort(keys, ModuleNames(shapes))
    if not fit.modules:
        raise _other_model(file.path, unmatched, shapes)
    if not allow_unmatched:
        for module in unmatched:
            kind = "target outside the transformer" if belongs_elsewhere(module) else "unmatched target"
            fit.fault(kind, module)
    for name in (name for name, key in parsed.items() if key is None):
        fit.fault("unknown key", name)
    targets = fit.targets()
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
        warnings=(*_warnings(file, keys, unmatched), *stated.unused_patterns((k.path, k.module) for k in keys)),
    )


def refuse_model(file: TensorFile) -> None:
    """Refuse (AdapterError) the weights of a model, a LoRA merged into them perhaps, in the place of a LoRA."""
    model = None if read_lora(file).is_lora else described(file)
    if model:
        raise AdapterError(
            f"is no LoRA but {model}",
            file=file.path,
            expected="the LoRA itself: pairs of lora_A and lora_B weights",
            next="ltxpack bake-lora OVERLAY --strength 0.5 (takes the overlay's own LoRA; --add FILE=S adds one)",
        )


@dataclass
class _ModuleKeys:
    """The keys of one module, or of one fused kv or qkv (``modules``, in row order), before they are judged."""

    modules: tuple[str, ...]
    key: LoraKey
    found: dict[str, TensorInfo] = field(default_factory=dict)


class _Fit:
    """One adapter while it is fitted. ``faults`` collects everything wrong, by kind, so that one error lists all."""

    def __init__(self, file: TensorFile, shapes: Shapes, stated: PeftConfig, read: ReadTensor | None) -> None:
        self.modules: dict[tuple[str, ...], _ModuleKeys] = {}
        self.faults: dict[str, list[str]] = {}
        self._file, self._shapes, self._stated, self._read = file, shapes, stated, read

    def fault(self, kind: str, item: str) -> None:
        """Something does not fit."""
        self.faults.setdefault(kind, []).append(item)

    def sort(self, keys: Iterable[LoraKey], names: ModuleNames) -> list[str]:
        """Put the keys to the modules they mean; returns the modules that the transformer does not have."""
        unmatched: dict[str, None] = {}
        for key in keys:
            try:
                modules = names.find(key)
            except KeyError:
                self.fault("ambiguous name", key.key)
                continue
            if modules is None:
                unmatched[key.module] = None
                continue
            found = self.modules.setdefault(modules, _ModuleKeys(modules, key)).found
            if key.role in found:
                self.fault("duplicate", f"{key.key} and {found[key.role].name}")
            else:
                found[key.role] = self._file.tensors[key.key]
        return list(unmatched)

    def targets(self) -> dict[str, LoraTarget]:
        """All targets by their weight."""
        self._check_mixed_alpha()
        targets: dict[str, LoraTarget] = {}
        for group in self.modules.values():
            for target in self._targets_of(group) if self._is_complete(group.found) else ():
                if target.weight in targets:
                    self.fault("duplicate", f"{target.weight} is changed by a fused and by a separate target")
                targets[target.weight] = target
        return targets

    def _is_complete(self, found: Mapping[str, TensorInfo]) -> bool:
        """Whether the tensors of a module belong together and have dtypes that can be used."""
        bad = next((found[r] for r in _FACTOR_ROLES if r in found and found[r].dtype not in FACTOR_DTYPES), None)
        lone = found.keys() & {"down", "up"}
        if bad is not None:
            self.fault("unusable dtype", f"{bad.name} is {bad.dtype}")
        elif len(lone) == 1:
            has, lacks = ("down", "up") if "down" in found else ("up", "down")
            self.fault("half pair", f"{found[has].name} has no {lacks} factor")
        elif not found.keys() & {"down", "diff", "diff_b"}:
            self.fault("half pair", f"{', '.join(info.name for info in found.values())} without factors")
        elif "magnitude" in found and ("down" not in found or "diff" in found):
            self.fault("half pair", f"{found['magnitude'].name} needs both factors and no .diff beside them")
        else:
            return True
        return False

    def _targets_of(self, group: _ModuleKeys) -> Iterator[LoraTarget]:
        """One target for each module, one more where a bias changes too; none where a shape disagrees."""
        wanted = self._wanted_shapes(group)
        if wanted is None or not all(self._has_shape(group.found[role], shape) for role, shape in wanted.items()):
            return
        rank, alpha, factor = 0, None, 1.0
        if "down" in group.found:
            rank = group.found["down"].shape[0]
            alpha, factor = self._alpha(group, rank)
        count = len(group.modules)
        for i, module in enumerate(group.modules):
            own = {r: group.found[r] if r == "down" else _rows(group.found[r], i, count) for r in wanted}
            bias = own.pop("diff_b", None)
            if own:
                yield LoraTarget(f"{module}.weight", rank, factor, alpha, **own)
            if bias is not None:
                yield LoraTarget(f"{module}.bias", diff=bias)

    def _wanted_shapes(self, group: _ModuleKeys) -> dict[str, tuple[int, ...] | None] | None:
        """role -> the shape its tensor must have, None if nothing is there to change; None after a fault."""
        found, count = group.found, len(group.modules)
        weights, biases = ([self._shapes.get(f"{m}.{kind}") for m in group.modules] for kind in ("weight", "bias"))
        wanted: dict[str, tuple[int, ...] | None] = {}
        if "down" in found:
            down, up = found["down"], found["up"]
            weight = weights[0]
            if weight is None or len(weight) != 2 or len(set(weights)) != 1:
                self.fault("shape mismatch", f"{group.key.module} is no linear, or its fused parts differ in shape")
                return None
            if len(down.shape) == 2 and len(up.shape) == 2 and down.shape[0] != up.shape[1]:
                self.fault("rank mismatch", f"{down.name} {list(down.shape)} and {up.name} {list(up.shape)}")
                return None
            rank, rows = down.shape[0] if down.shape else 0, count * weight[0]
            wanted |= {"down": (rank, weight[1]), "up": (rows, rank)}
            if "magnitude" in found:
                # One for each output row: [out] (PEFT) or [out, 1] (Comfy).
                wanted["magnitude"] = (rows, 1) if len(found["magnitude"].shape) == 2 else (rows,)
        for role, old in (("diff", weights), ("diff_b", biases)):
            if role in found:
                shape = old[0] if len(set(old)) == 1 else None
                wanted[role] = (count * shape[0], *shape[1:]) if shape else None
        return wanted

    def _has_shape(self, info: TensorInfo, shape: tuple[int, ...] | None) -> bool:
        if shape is not None and info.shape == shape and 0 not in shape:
            return True
        expected = "nothing to change there" if shape is None else list(shape)
        self.fault("shape mismatch", f"{info.name} {list(info.shape)}, expected {expected}")
        return False

    def _alpha(self, group: _ModuleKeys, rank: int) -> tuple[float | None, float]:
        """``(alpha, factor)``: from a tensor beside the factors, or from the configuration; a fault if they differ."""
        path, module = group.key.path, group.key.module
        stated = self._stated.ranks.find(path, module, self._stated.rank)
        if stated is not None and stated != rank and "ambiguous alpha" not in self.faults:
            self.fault("rank mismatch", f"{module} has rank {rank}, the configuration says {stated}")
        configured = self._stated.alphas.find(path, module, self._stated.alpha)
        info = group.found.get("alpha")
        if info is None or self._read is None:
            return configured, self._stated.factor(configured, rank)
        alpha = _scalar(info, self._read) if math.prod(info.shape) == 1 else None
        if alpha is None:
            wanted = f"not one number of at most {MAX_ALPHA:g}"
            self.fault("unreadable alpha", f"{info.name} is {info.dtype} {list(info.shape)}, {wanted}")
            return None, 1.0
        if configured is not None and configured != alpha:
            self.fault("ambiguous alpha", f"{info.name} is {alpha:g}, the configuration says {configured:g}")
        return alpha, self._stated.factor(alpha, rank)

    def _check_mixed_alpha(self) -> None:
        """One alpha for several ranks without a rank_pattern does not say what it is to be divided by."""
        if self._stated.ranks or (self._stated.alpha is None and not self._stated.alphas):
            return
        found = [group.found for group in self.modules.values() if "alpha" not in group.found]
        ranks = sorted({tensors["down"].shape[0] for tensors in found if "down" in tensors and tensors["down"].shape})
        if len(ranks) > 1:
            listed = ", ".join(map(str, ranks))
            self.fault("ambiguous alpha", f"one alpha for ranks {listed}, and no rank_pattern that says which is meant")


def _rows(info: TensorInfo, i: int, count: int) -> TensorInfo:
    """The ``i``-th of ``count`` equal shares of the rows: still one run of bytes."""
    nbytes = info.nbytes // count
    shape = (info.shape[0] // count, *info.shape[1:])
    return replace(info, shape=shape, start=info.start + i * nbytes, nbytes=nbytes)


def _scalar(info: TensorInfo, read: ReadTensor) -> float | None:
    if info.dtype not in _SCALARS:
        return None
    # A bfloat16 is the upper half of a float32.
    data = b"\0\0" + read(info) if info.dtype == "BF16" else read(info)
    (value,) = struct.unpack(_SCALARS[info.dtype], data)
    return float(value) if abs(value) <= MAX_ALPHA else None


def _misfit(path: Path, faults: Mapping[str, Sequence[str]]) -> AdapterError:
    counts = (f"{len(items)} {kind}{'' if len(items) == 1 else 's'}" for kind, items in faults.items())
    skippable = set(faults) <= {"unmatched target", "target outside the transformer"}
    return AdapterError(
        f"does not fit this transformer: {', '.join(counts)}",
        file=path,
        items=[f"{kind}: {item}" for kind, items in faults.items() for item in items],
        next="the same command with --allow-unmatched leaves these targets out" if skippable else None,
    )


def _other_model(path: Path, unmatched: Sequence[str], shapes: Shapes) -> AdapterError:
    outside = all(belongs_elsewhere(module) for module in unmatched)
    example = next(iter(sorted(name for name in shapes if name.endswith(".to_q.weight"))), next(iter(shapes)))
    return AdapterError(
        "changes only the text path, no transformer weight"
        if outside
        else f"is a LoRA for another model: none of its {len(unmatched)} targets is in this transformer",
        file=path,
        expected=f"targets like {example.removesuffix('.weight')}",
        found=f"{', '.join(unmatched[:3])}{' …' if len(unmatched) > 3 else ''}",
    )


def _warnings(file: TensorFile, keys: Iterable[LoraKey], unmatched: Sequence[str]) -> Iterator[str]:
    if unmatched:
        shown = ", ".join(unmatched[:5]) + (" …" if len(unmatched) > 5 else "")
        yield f"{len(unmatched)} targets are not in the transformer and are left out: {shown}"
    network_alpha = file.metadata.get("ss_network_alpha")
    if network_alpha not in (None, "None") and not any(key.role == "alpha" for key in keys):
        yield (
            f"its metadata says ss_network_alpha {network_alpha[:20]}, but no alpha is stored beside the factors: "
            "the strength is used unchanged"
        )
