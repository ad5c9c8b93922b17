"""Reads the header of a checkpoint, an upsampler or a LoRA: its configs, and the new name of every tensor.

Pure: it sees names, shapes, dtypes and metadata. It refuses all tensors that do not match by name, in one error. Only
the bake decides whether a LoRA fits a transformer.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltxpack.errors import LtxpackError, UnsupportedError
from ltxpack.files.tensorfile import TensorFile, TensorInfo, parse_json
from ltxpack.ltx23 import releases
from ltxpack.ltx23.configs import NEXT_RELEASE, Config, checkpoint_configs, upsampler_config
from ltxpack.ltx23.contents import UPSAMPLER_MARK, described
from ltxpack.ltx23.expected import Shape, inventory
from ltxpack.ltx23.forms import MADE_FROM, refuse_quantised
from ltxpack.ltx23.lora_keys import METHODS, LoraKey, parse_key
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, DROPPED, LATENT_UPSAMPLER, RenameTable, component_of
from ltxpack.strength import format_strength

STORED_DTYPE = "BF16"
# The start of a ``next`` that adds a flag.
AGAIN = "the same command with "
OTHER_UPSAMPLER = f"{AGAIN}--upsampler {releases.OFFICIAL_REPO}/{releases.DEFAULT_FILES[releases.UPSAMPLER]}"
MADE_OF = "overlays and bakes are made from"
FLOATS = frozenset({"BF16", "F16", "F32", "F64"})


# New name -> tensor of a component, in order of the names in the source.
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Checkpoint:
    """The parsed header of a whole checkpoint. ``tensors``: by component.

    Of a checkpoint in parts: ``places``, the file of each tensor; ``doubled``, the tensors that two files hold.
    """

    file: TensorFile
    metadata: releases.Metadata
    configs: Mapping[str, Config]
    tensors: Mapping[str, Tensors]
    dropped: tuple[str, ...]
    places: Mapping[str, Path] = field(default_factory=dict)
    doubled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Upsampler:
    """The parsed header of a latent upsampler's file."""

    config: Config
    tensors: Tensors

    @property
    def as_is(self) -> bool:
        """Whether the overlay can hold the file unchanged."""
        return all(info.dtype == STORED_DTYPE and target == info.name for target, info in self.tensors.items())


def says_distilled(file: TensorFile) -> bool:
    """Whether a checkpoint's header says that it is distilled: in its title, or in the source of our export."""
    titles = [file.metadata.get(key, "") for key in ("modelspec.title", "title", "name", "model_name")]
    with contextlib.suppress(LtxpackError, KeyError, TypeError):
        stated = parse_json(file.metadata.get(MADE_FROM, "null"), file.path)
        titles += [one["name"] for one in stated["source"] if one["role"] == releases.CHECKPOINT]
        titles.append(stated["kind"])
    return any("distilled" in str(title).lower() for title in (*titles, *merged_loras(file)))


def merged_loras(file: TensorFile) -> list[str]:
    """The LoRAs merged into an export of ours and their strengths, in words; none for other files."""
    strengths = [(lora["file"], lora["strength"]) for lora in stated_loras(file.metadata)]
    return [f"{file} at {by if isinstance(by, str) else format_strength(by)}" for file, by in strengths]


def stated_loras(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The entries of the LoRAs merged into an export of ours, as its ``metadata`` say; none for other files."""
    try:
        loras = parse_json(metadata.get(MADE_FROM, "null"), MADE_FROM)["loras"]
        kinds = {"file": str, "blake3": str, "strength": float | int | str}
        found = [{"blake3": "", **{field: lora[field] for field in kinds if field in lora}} for lora in loras]
        sound = all(isinstance(lora[field], kind) for lora in found for field, kind in kinds.items())
        return [lora for lora in found if lora["strength"]] if sound else []
    except (LtxpackError, KeyError, TypeError):
        return []


def read_checkpoint(file: TensorFile, label: object) -> Checkpoint:
    """Parse a checkpoint's header; messages name the file ``label``. Raises UnsupportedError or FormatError."""
    metadata = releases.read_metadata(file.metadata, file.tensors, label)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    configs = checkpoint_configs(metadata.config, shapes, label)
    dropped = tuple(name for name in file.tensors if name.startswith(DROPPED))
    owners = {name: component_of(name) for name in file.tensors}
    faults = [f"unknown: {name}" for name, owner in owners.items() if owner is None]
    tensors = {}
    for component, table in CHECKPOINT_TABLES.items():
        own = [info for name, info in file.tensors.items() if owners[name] == component and name not in dropped]
        tensors[component] = _matched(own, table, inventory(component, configs[component]), faults)
    _refuse_faults(faults, label)
    return Checkpoint(file, metadata, configs, tensors, dropped)


def read_upsampler(file: TensorFile, latent_channels: int | None, label: object) -> Upsampler:
    """Parse an upsampler's header; ``latent_channels``: the VAE's, if known. Raises UnsupportedError or FormatError."""
    refuse_quantised(file, label, MADE_OF, OTHER_UPSAMPLER)
    text = file.metadata.get("config")
    config = None if text is None else parse_json(text, f"{label}: metadata `config`")
    if not isinstance(config, Mapping):
        told = described(file) or "other tensors"
        lost = "is a latent upsampler without the `config` that says its kind"
        raise UnsupportedError(
            lost if UPSAMPLER_MARK in file.tensors else "is not a latent upsampler", file=str(label),
            expected="safetensors metadata with `config`", found=told, next=OTHER_UPSAMPLER,
        )  # fmt: skip
    try:
        done = upsampler_config(config, latent_channels, label)
    except UnsupportedError as error:
        raise UnsupportedError(**{**vars(error), "next": OTHER_UPSAMPLER}) from None
    faults: list[str] = []
    tensors = _matched(file.tensors.values(), LATENT_UPSAMPLER, inventory("latent_upsampler", done), faults)
    _refuse_faults(faults, label)
    return Upsampler(done, tensors)


def _refuse_faults(faults: Sequence[str], label: object) -> None:
    if faults:
        raise UnsupportedError(
            "does not hold the tensors that its config asks for", file=str(label), items=faults, next=NEXT_RELEASE
        )


def _matched(
    infos: Iterable[TensorInfo], table: RenameTable, expected: Mapping[str, Shape], faults: list[str]
) -> Tensors:
    """One component's tensors, in any order of the file. Adds mismatches to ``faults``."""
    found: dict[str, TensorInfo] = {}
    for info in sorted(infos, key=lambda info: info.name):
        target = table.rename(info.name)
        if target not in expected or target in found:
            faults.append(f"unknown: {info.name}")
        found.setdefault(target, info)
    back = table.reverse()
    for target, shape in expected.items():
        own = found.get(target)
        if own is None:
            faults.append(f"missing: {back.rename(target)} {list(shape)}")
        elif own.shape != shape:
            faults.append(f"shape: {own.name}: expected {list(shape)}, found {list(own.shape)}")
        elif own.dtype not in FLOATS:
            faults.append(f"dtype: {own.name}: expected {STORED_DTYPE}, found {own.dtype}")
    return found


def take_instead(label: object) -> str:
    """The command that takes the published bf16 checkpoint: the distilled one if ``label`` names a distilled one."""
    command = f"ltxpack materialize {releases.OFFICIAL_REPO} OVERLAY"
    if "distilled" in str(label).rpartition("/")[2].lower():
        return f"{command} --checkpoint {releases.DISTILLED_FILE} (takes the bf16 file)"
    return f"{command} (takes the bf16 file, {releases.DEFAULT_FILES[releases.CHECKPOINT]})"


@dataclass(frozen=True)
class LoraHeader:
    """A LoRA, or another adapter, by its header.

    ``targets``: module -> rank of the modules with factors, 0 for methods without a rank. ``unpaired``: tensors of
    modules with missing tensors. ``methods``: method -> number of modules. ``roles``: role -> number of keys.
    ``others``: names of tensors that are no part of an adapter.
    """

    style: str
    targets: Mapping[str, int]
    unpaired: Sequence[str]
    methods: Counter[str]
    roles: Counter[str]
    others: Sequence[str]

    @property
    def deltas(self) -> int:
        """Number of differences stored whole."""
        return self.roles["diff"] + self.roles["diff_b"]

    @property
    def is_lora(self) -> bool:
        """Whether the file changes any weight."""
        return bool(self.targets or self.deltas)


def read_lora(file: TensorFile) -> LoraHeader:
    """The LoRA in ``file``; ``is_lora`` is False if there is none."""
    parsed = {name: parse_key(name) for name in file.tensors}
    modules: dict[str, dict[str, str]] = {}
    for key in parsed.values():
        if key is not None and key.role != "alpha":
            modules.setdefault(key.module, {}).setdefault(key.role, key.key)
    targets: dict[str, int] = {}
    unpaired: list[str] = []
    methods = Counter[str]()
    for module, keys in modules.items():
        shapes = {role: file.tensors[key].shape for role, key in keys.items()}
        for method in (method for method in METHODS if method.is_there(keys)):
            if method.missing(keys):
                unpaired += [key for role, key in keys.items() if role in method.roles]
                continue
            methods[method.name] += 1
            if method.name not in ("diff", "weight"):
                targets[module] = targets.get(module) or method.rank_of(shapes)
    known = [key for key in parsed.values() if key]
    return LoraHeader(
        _lora_style(known),
        targets=targets,
        unpaired=unpaired,
        methods=methods,
        roles=Counter(key.role for key in known),
        others=[name for name, key in parsed.items() if key is None or not (targets or unpaired or methods["diff"])],
    )


def _lora_style(keys: Sequence[LoraKey]) -> str:
    """The naming of most keys, as ``inspect`` reports it."""
    counts = Counter(_naming(key) for key in keys)
    style = counts.most_common(1)[0][0] if counts else "bare"
    return "comfy" if style == "official" and any("lora_down" in key.style for key in keys) else style


def _naming(key: LoraKey) -> str:
    if key.flat:
        return "kohya"
    if key.prefix.startswith("base_model.model"):
        return "peft"
    if key.prefix.startswith("transformer") or key.module.startswith("connectors."):
        return "diffusers"
    return "official" if "diffusion_model" in key.prefix else "bare"
