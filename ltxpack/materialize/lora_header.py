"""What a LoRA file's header says: naming style, targets, ranks, alpha. No tensor is read.

Whether the LoRA fits a transformer is decided where it is baked. Here the file only must be a LoRA.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ltxpack.files.tensorfile import TensorFile
from ltxpack.ltx23.lora_keys import LoraKey, parse_key

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
    parsed = {name: parse_key(name) for name in file.tensors}
    keys = [key for key in parsed.values() if key]
    roles = Counter(key.role for key in keys)
    header = LoraHeader(
        style=_style(keys),
        alphas=roles["alpha"],
        dora=roles["magnitude"],
        deltas=roles["diff"] + roles["diff_b"],
        others=[name for name, key in parsed.items() if key is None],
    )
    downs, ups = ({key.module: key.key for key in keys if key.role == role} for role in ("down", "up"))
    for module in downs | ups:
        if module in downs and module in ups:
            shape = file.tensors[downs[module]].shape
            header.targets[module] = shape[0] if shape else 0
        else:
            header.unpaired.append(downs.get(module) or ups[module])
    return header


def _style(keys: Sequence[LoraKey]) -> str:
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
