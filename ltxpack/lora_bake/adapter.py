"""An adapter file in any naming -> ``{transformer weight: Target}`` with every fault found before a byte is written.

Only headers are read here (and the alpha scalars); the factors stay in the file, as byte ranges, until they are fused.
Spec 02, sections 1, 2 and 7. Knows nothing of arithmetic.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ltxpack.errors import AdapterError, SourceError
from ltxpack.files.tensorfile import TensorFile, TensorInfo, read_tensorfile
from ltxpack.lora_bake import peft
from ltxpack.lora_bake.naming import Match, ModuleNames
from ltxpack.lora_bake.peft import MAX_ALPHA, PeftConfig
from ltxpack.ltx23.lora_keys import LoraKey, belongs_elsewhere, parse_key

FACTOR_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B", "I8": "<b"}
_FACTOR_ROLES = ("down", "up", "magnitude", "diff", "diff_b")


@dataclass(frozen=True)
class Part:
    """Bytes of a tensor, or of some of its rows, in an adapter file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def rows(self, first: int, count: int) -> Part:
        """``count`` rows from ``first``: still one run of bytes."""
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return replace(self, shape=(count, *self.shape[1:]), start=self.start + first * row, nbytes=count * row)


@dataclass(frozen=True)
class Target:
    """What an adapter does to one weight (or bias): a low-rank product, a full difference, or both.

    ``down`` is A [rank, in], ``up`` is B [out, rank]. ``factor`` is what the strength is multiplied by for B·A:
    alpha/rank, alpha/sqrt(rank) with rslora, or 1; a full difference is scaled by the strength alone.
    """

    weight: str
    rank: int = 0
    factor: float = 1.0
    alpha: float | None = None
    down: Part | None = None
    up: Part | None = None
    magnitude: Part | None = None
    diff: Part | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All the byte ranges this target needs."""
        return tuple(part for part in (self.down, self.up, self.magnitude, self.diff) if part is not None)


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the transformer. ``skipped`` are modules left out because the caller allowed it."""

    name: str
    path: Path
    size: int
    targets: Mapping[str, Target]
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
    def plain_bf16(self) -> bool:
        """Whether every target is a bf16 product and nothing else."""
        return all(
            target.diff is None and target.magnitude is None and all(part.dtype == "BF16" for part in target.parts)
            for target in self.targets.values()
        )


@dataclass
class _Group:
    """The keys of one module, or of one fused kv or qkv, before they are judged."""

    match: Match
    module: str
    path: str
    found: dict[str, TensorInfo] = field(default_factory=dict)


@dataclass
class _Faults:
    """Everything wrong with an adapter, by kind, so that one error can list all of it."""

    kinds: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, item: str) -> None:
        self.kinds.setdefault(kind, []).append(item)

    def raise_if_any(self, path: Path) -> None:
        if not self.kinds:
            return
        problem = "does not fit this transformer: " + ", ".join(
            f"{len(items)} {kind}{'' if len(items) == 1 else 's'}" for kind, items in self.kinds.items()
        )
        skippable = set(self.kinds) <= {"unmatched target", "target outside the transformer"}
        raise AdapterError(
            problem,
            file=path,
            items=[f"{kind}: {item}" for kind, items in self.kinds.items() for item in items],
            next="the same command with --allow-unmatched leaves these targets out" if skippable else None,
        )


def open_adapter(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, name: str | None = None, allow_unmatched: bool = False
) -> Adapter:
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

        stated = peft.from_config_file(config) if config else peft.from_metadata(file.metadata, weights)
        adapter = fit_adapter(file, shapes, stated, read, allow_unmatched)
    return replace(adapter, name=name or path.stem, config=config)


def fit_adapter(
    file: TensorFile,
    shapes: Mapping[str, tuple[int, ...]],
    stated: PeftConfig,
    read: Callable[[TensorInfo], bytes] | None,
    allow_unmatched: bool = False,
) -> Adapter:
    """The adapter whose header is ``file``. ``read`` gives a tensor's bytes; None if only the header is to be had, in
    which case alphas stored as tensors are not known. Raises AdapterError listing everything that does not fit.
    """
    keys, unknown = _parse_keys(file)
    if not any(key.role in ("down", "up", "diff", "diff_b") for key in keys):
        raise AdapterError("holds no LoRA", file=file.path, items=sorted(file.tensors)[:5])
    names, faults = ModuleNames(shapes), _Faults()
    groups, unmatched = _group(keys, file, names, faults)
    if not groups:
        raise _other_model(file.path, unmatched, shapes)
    if not allow_unmatched:
        for module in unmatched:
            kind = "target outside the transformer" if belongs_elsewhere(module) else "unmatched target"
            faults.add(kind, module)
    for key in unknown:
        faults.add("unknown key", key)
    _check_mixed_alpha(groups, stated, faults)
    targets = _targets(groups, shapes, _Alphas(read, stated), faults)
    if not targets and set(faults.kinds) == {"shape mismatch"}:
        raise _other_shapes(file.path, faults.kinds["shape mismatch"])
    faults.raise_if_any(file.path)
    return Adapter(
        name=file.path.stem,
        path=file.path,
        size=file.size,
        targets=dict(sorted(targets.items())),
        styles=tuple(sorted({key.style for key in keys if key.role != "alpha"})),
        skipped=tuple(unmatched),
        warnings=(*_warnings(file, keys, unmatched), *stated.unused_patterns((k.path, k.module) for k in keys)),
    )


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


def _parse_keys(file: TensorFile) -> tuple[list[LoraKey], list[str]]:
    parsed = {key: parse_key(key) for key in file.tensors}
    return [key for key in parsed.values() if key], [key for key, value in parsed.items() if value is None]


def _group(
    keys: Iterable[LoraKey], file: TensorFile, names: ModuleNames, faults: _Faults
) -> tuple[list[_Group], list[str]]:
    """Keys by the module they mean, and the modules that the transformer does not have."""
    groups: dict[Match, _Group] = {}
    unmatched: dict[str, None] = {}
    for key in keys:
        try:
            match = names.find(key)
        except KeyError:
            faults.add("ambiguous name", key.key)
            continue
        if match is None:
            unmatched[key.module] = None
            continue
        group = groups.setdefault(match, _Group(match, key.module, key.path))
        if key.role in group.found:
            faults.add("duplicate", f"{key.key} and {group.found[key.role].name}")
        else:
            group.found[key.role] = file.tensors[key.key]
    return list(groups.values()), list(unmatched)


def _targets(
    groups: Iterable[_Group], shapes: Mapping[str, tuple[int, ...]], alphas: _Alphas, faults: _Faults
) -> dict[str, Target]:
    targets: dict[str, Target] = {}
    for group in groups:
        for target in _judge(group, shapes, alphas, faults):
            if target.weight in targets:
                faults.add("duplicate", f"{target.weight} is changed by a fused and by a separate target")
            targets[target.weight] = target
    return targets


@dataclass(frozen=True)
class _Alphas:
    """Where a module's alpha comes from: a tensor beside the factors, or the adapter's configuration."""

    read: Callable[[TensorInfo], bytes] | None
    stated: PeftConfig

    def of(self, group: _Group, rank: int, faults: _Faults) -> tuple[float | None, float]:
        """``(alpha, factor)`` for ``group``; faults where the file contradicts itself."""
        self._check_rank(group, rank, faults)
        configured = self.stated.alpha_of(group.path, group.module)
        info = group.found.get("alpha")
        if info is None or self.read is None:
            return configured, self.stated.factor(configured, rank)
        alpha = _scalar(info, self.read) if math.prod(info.shape) == 1 else None
        if alpha is None:
            wanted = f"not one number of at most {MAX_ALPHA:g}"
            faults.add("unreadable alpha", f"{info.name} is {info.dtype} {list(info.shape)}, {wanted}")
            return None, 1.0
        if configured is not None and configured != alpha:
            faults.add("ambiguous alpha", f"{info.name} is {alpha:g}, the configuration says {configured:g}")
        return alpha, self.stated.factor(alpha, rank)

    def _check_rank(self, group: _Group, rank: int, faults: _Faults) -> None:
        stated = self.stated.rank_of(group.path, group.module)
        if stated is not None and stated != rank and "ambiguous alpha" not in faults.kinds:
            faults.add("rank mismatch", f"{group.module} has rank {rank}, the configuration says {stated}")


def _scalar(info: TensorInfo, read: Callable[[TensorInfo], bytes]) -> float | None:
    if info.dtype == "BF16":
        value = struct.unpack("<f", b"\0\0" + read(info))[0]
    elif info.dtype in _SCALARS:
        value = struct.unpack(_SCALARS[info.dtype], read(info))[0]
    else:
        return None
    return float(value) if abs(value) <= MAX_ALPHA else None


def _judge(group: _Group, shapes: Mapping[str, tuple[int, ...]], alphas: _Alphas, faults: _Faults) -> Iterable[Target]:
    """The targets of one group: one per module, one more where a bias changes too."""
    found = group.found
    for role in _FACTOR_ROLES:
        if role in found and found[role].dtype not in FACTOR_DTYPES:
            faults.add("unusable dtype", f"{found[role].name} is {found[role].dtype}")
            return
    if ("down" in found) != ("up" in found):
        has, lacks = ("down", "up") if "down" in found else ("up", "down")
        faults.add("half pair", f"{found[has].name} has no {lacks} factor")
        return
    if "down" not in found and "diff" not in found and "diff_b" not in found:
        faults.add("half pair", f"{', '.join(info.name for info in found.values())} without factors")
        return
    if "magnitude" in found and ("down" not in found or "diff" in found):
        faults.add("half pair", f"{found['magnitude'].name} needs both factors and no .diff beside them")
        return
    weights = [shapes.get(f"{module}.weight") for module in group.match.modules]
    biases = [shapes.get(f"{module}.bias") for module in group.match.modules]
    parts = _fit(group, weights, biases, faults)
    if parts is None:
        return
    rank, (alpha, factor) = 0, (None, 1.0)
    if "down" in found:
        rank = found["down"].shape[0]
        alpha, factor = alphas.of(group, rank, faults)
    for module, own in zip(group.match.modules, parts, strict=True):
        bias = own.pop("diff_b", None)
        if own:
            yield Target(f"{module}.weight", rank, factor, alpha, **own)
        if bias is not None:
            yield Target(f"{module}.bias", diff=bias)


def _fit(
    group: _Group,
    weights: list[tuple[int, ...] | None],
    biases: list[tuple[int, ...] | None],
    faults: _Faults,
) -> list[dict[str, Part]] | None:
    """Each module's share of the tensors; None, with the fault noted, where a shape disagrees."""
    found = group.found
    count = len(weights)
    linear = [shape for shape in weights if shape is not None and len(shape) == 2]
    shares: list[dict[str, Part]] = [{} for _ in range(count)]
    wanted: list[tuple[str, tuple[int, ...] | None]] = []
    if "down" in found:
        down, up = found["down"], found["up"]
        if len(linear) != count or len(set(linear)) != 1:
            faults.add("shape mismatch", f"{group.module} is no linear, or its fused parts differ in shape")
            return None
        out, columns = linear[0]
        if len(down.shape) == 2 and len(up.shape) == 2 and down.shape[0] != up.shape[1]:
            faults.add("rank mismatch", f"{down.name} {list(down.shape)} and {up.name} {list(up.shape)}")
            return None
        rank = down.shape[0] if down.shape else 0
        wanted += [("down", (rank, columns)), ("up", (count * out, rank))]
        if "magnitude" in found:
            wanted.append(("magnitude", _magnitude_shape(found["magnitude"], count * out)))
    if "diff" in found:
        wanted.append(("diff", _stacked(weights)))
    if "diff_b" in found:
        wanted.append(("diff_b", _stacked(biases)))
    for role, shape in wanted:
        info = found[role]
        if shape is None or info.shape != shape or 0 in shape:
            expected = "nothing to change there" if shape is None else list(shape)
            faults.add("shape mismatch", f"{info.name} {list(info.shape)}, expected {expected}")
            return None
        part = Part(info.name, info.dtype, info.shape, info.start, info.nbytes)
        rows = info.shape[0] // count
        for i, share in enumerate(shares):
            share[role] = part if role == "down" else part.rows(i * rows, rows)
    return shares


def _stacked(shapes: list[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """The shape of equal tensors stacked by rows; None where one is missing or differs."""
    first = shapes[0]
    if not first or any(shape != first for shape in shapes):
        return None
    return (len(shapes) * first[0], *first[1:])


def _magnitude_shape(info: TensorInfo, rows: int) -> tuple[int, ...]:
    """DoRA magnitudes stand per output row: [out] (PEFT) or [out, 1] (Comfy)."""
    return (rows, 1) if len(info.shape) == 2 else (rows,)


def _check_mixed_alpha(groups: Iterable[_Group], stated: PeftConfig, faults: _Faults) -> None:
    """One alpha for several ranks without a rank_pattern does not say what it is to be divided by."""
    if not stated.says_alpha or stated.ranks:
        return
    ranks = {
        group.found["down"].shape[0]
        for group in groups
        if "down" in group.found and group.found["down"].shape and "alpha" not in group.found
    }
    if len(ranks) > 1:
        faults.add(
            "ambiguous alpha",
            f"one alpha for ranks {', '.join(map(str, sorted(ranks)))}, and no rank_pattern that says which is meant",
        )


def _other_model(path: Path, unmatched: list[str], shapes: Mapping[str, tuple[int, ...]]) -> AdapterError:
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


def _other_shapes(path: Path, items: list[str]) -> AdapterError:
    return AdapterError(
        "is a LoRA for another model: its names are in this transformer, but no shape agrees", file=path, items=items
    )


def _warnings(file: TensorFile, keys: Iterable[LoraKey], unmatched: list[str]) -> tuple[str, ...]:
    warnings = []
    if unmatched:
        shown = ", ".join(unmatched[:5]) + (" …" if len(unmatched) > 5 else "")
        warnings.append(f"{len(unmatched)} targets are not in the transformer and are left out: {shown}")
    network_alpha = file.metadata.get("ss_network_alpha")
    if network_alpha not in (None, "None") and not any(key.role == "alpha" for key in keys):
        warnings.append(
            f"its metadata says ss_network_alpha {network_alpha[:20]}, but no alpha stands beside the factors: "
            "the strength is used unchanged"
        )
    return tuple(warnings)
