"""All spellings of the modules of one transformer, so that a LoRA key finds its module (spec 02, section 1).

Nothing about the 22B model is written here: the aliases of every module are derived from the names in the
transformer's own shard headers and the rename table. Flattened (kohya) names are looked up whole, never split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ltxpack.ltx23.lora_keys import LoraKey
from ltxpack.ltx23.renames import TRANSFORMER

FUSED = {"to_qkv": "qkv", "qkv": "qkv", "to_kv": "kv", "kv": "kv"}

_OFFICIAL_ROOT = "model.diffusion_model."
_TO_OFFICIAL = TRANSFORMER.reverse()


@dataclass(frozen=True)
class Match:
    """The modules a key stands for, in row order: one, or two or three for a fused kv or qkv."""

    modules: tuple[str, ...]


class ModuleNames:
    """All spellings of the modules of one transformer.

    ``shapes`` maps every tensor name of the transformer (diffusers spelling) to its shape.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        modules = {name.rpartition(".")[0] for name in shapes if name.endswith((".weight", ".bias"))}
        self.linears = linear_modules(shapes)
        self._dotted: dict[str, Match | None] = {}
        self._flat: dict[str, Match | None] = {}
        for module in sorted(modules):
            self._add(Match((module,)), _spellings(module))
        for parent in sorted({module.rpartition(".")[0] for module in self.linears}):
            self._add_fused(parent)

    def find(self, key: LoraKey) -> Match | None:
        """What ``key`` stands for, or None. Raises KeyError if the name could mean two modules."""
        table = self._flat if key.flat else self._dotted
        match = table.get(key.module)
        if match is None and key.module in table:
            raise KeyError(key.module)
        return match

    def _add_fused(self, parent: str) -> None:
        wanted = {"q": f"{parent}.to_q", "k": f"{parent}.to_k", "v": f"{parent}.to_v"}
        if all(module in self.linears for module in wanted.values()):
            for name, letters in FUSED.items():
                match = Match(tuple(wanted[letter] for letter in letters))
                self._add(match, _spellings(f"{parent}.{name}"))

    def _add(self, match: Match, spellings: Iterable[str]) -> None:
        for spelling in spellings:
            for table, alias in ((self._dotted, spelling), (self._flat, spelling.replace(".", "_"))):
                known = table.setdefault(alias, match)
                if known != match:
                    table[alias] = None


def linear_modules(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """The linears: every module with a two-dimensional ``weight`` (spec 02, section 6)."""
    return frozenset(
        name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2
    )


def _spellings(module: str) -> set[str]:
    """``module`` in diffusers and official spelling, and each without the ``.0`` of ``to_out.0``."""
    official = _TO_OFFICIAL.rename(module).removeprefix(_OFFICIAL_ROOT)
    both = {module, official}
    return both | {name.removesuffix(".0") for name in both if name.endswith(".to_out.0")}
