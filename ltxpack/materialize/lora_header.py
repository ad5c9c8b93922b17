"""What a LoRA file's header says: naming style, targets, ranks, alpha. No tensor is read.

Whether it fits a transformer is decided where it is baked; here it only must be a LoRA (spec 02, section 1).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ltxpack.files.tensorfile import TensorFile

# (suffix of the down factor, suffix of the up factor)
_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A", ".lora_B"),
)
_PREFIXES = (
    ("kohya", "lora_unet_"),
    ("peft", "base_model.model."),
    ("diffusers", "transformer."),
    ("diffusers", "connectors."),
    ("official", "model.diffusion_model."),
    ("official", "diffusion_model."),
)
_DORA = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_DELTA = (".diff", ".diff_b")
_BLOCK = re.compile(r"(?<=blocks[._])\d+")


@dataclass
class LoraHeader:
    """A LoRA by its header. ``targets``: module -> rank; ``unpaired``: factors whose partner is missing."""

    style: str
    targets: dict[str, int] = field(default_factory=dict)
    unpaired: list[str] = field(default_factory=list)
    alphas: int = 0
    dora: int = 0
    deltas: int = 0
    others: list[str] = field(default_factory=list)

    @property
    def is_lora(self) -> bool:
        """Whether anything in it changes a weight."""
        return bool(self.targets or self.deltas)

    def ranks(self) -> dict[int, int]:
        """rank -> number of targets."""
        return dict(sorted(Counter(self.targets.values()).items()))

    def kinds(self) -> dict[str, int]:
        """Module path with the block number dropped -> number of targets."""
        return dict(sorted(Counter(_BLOCK.sub("*", module) for module in self.targets).items()))


def read_lora_header(file: TensorFile) -> LoraHeader:
    """The LoRA in ``file``; ``is_lora`` is False if there is none."""
    header = LoraHeader(style=_style(file.tensors))
    for name, info in file.tensors.items():
        module, partner = _pair(name)
        if name.endswith(".alpha"):
            header.alphas += 1
        elif name.endswith(_DORA):
            header.dora += 1
        elif name.endswith(_DELTA):
            header.deltas += 1
        elif module is None:
            header.others.append(name)
        elif partner not in file.tensors:
            header.unpaired.append(name)
        elif _is_down(name):
            header.targets[module] = info.shape[0] if info.shape else 0
    return header


def _style(names: Mapping[str, object]) -> str:
    counts = Counter(next((style for style, prefix in _PREFIXES if name.startswith(prefix)), "bare") for name in names)
    style = counts.most_common(1)[0][0] if counts else "bare"
    dotted = any(".lora_down." in name for name in names)
    return "comfy" if style == "official" and dotted else style


def _is_down(name: str) -> bool:
    return any(name.endswith(down) for down, _ in _PAIRS)


def _pair(name: str) -> tuple[str | None, str]:
    """(module, the partner's name) of a factor, or (None, "")."""
    for down, up in _PAIRS:
        for own, other in ((down, up), (up, down)):
            if name.endswith(own):
                module = name[: -len(own)]
                return _stripped(module), module + other
    return None, ""


def _stripped(module: str) -> str:
    return next((module[len(prefix) :] for _, prefix in _PREFIXES if module.startswith(prefix)), module)
