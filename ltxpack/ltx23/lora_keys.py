"""What a LoRA key is, in every naming seen so far: which module it means, and which tensor of the module it holds.

materialize, inspect and bake-lora all ask here, so that they agree on any file (spec 02, section 1). Nothing about the
22B model is written here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ltxpack.ltx23.renames import TRANSFORMER

DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
FUSED = {"to_qkv": "qkv", "qkv": "qkv", "to_kv": "kv", "kv": "kv"}

_OFFICIAL_ROOT = "model.diffusion_model."
_TO_OFFICIAL = TRANSFORMER.reverse()
_ELSEWHERE = re.compile(
    r"(^|[._])(embeddings_connector|text_embedding_projection|connectors|video_connector|audio_connector"
    r"|(video|audio)_text_proj_in|aggregate_embed|text_encoders?|lora_te\d*)([._]|$)|_embeddings_connector"
)
# However many there are; something is always left.
_PREFIXES = re.compile(rf"(?:(?:{'|'.join(map(re.escape, DOTTED_PREFIXES))})(?!\Z))*")
# PEFT puts the adapter's name between the factor and "weight"; loralib writes the bare factor.
_ROLES = (
    ("down", "lora_A", re.compile(r"\.lora_A(?:(?:\.[^.]+)?\.weight)?\Z")),
    ("up", "lora_A", re.compile(r"\.lora_B(?:(?:\.[^.]+)?\.weight)?\Z")),
    ("down", "lora_down", re.compile(r"\.lora[_.]down\.weight\Z")),
    ("up", "lora_down", re.compile(r"\.lora[_.]up\.weight\Z")),
    ("alpha", "alpha", re.compile(r"\.alpha\Z")),
    ("magnitude", "dora", re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)\Z")),
    ("diff", "diff", re.compile(r"\.diff\Z")),
    ("diff_b", "diff", re.compile(r"\.diff_b\Z")),
)


@dataclass(frozen=True)
class LoraKey:
    """A key taken apart.

    ``prefix`` and ``module`` are as the file spells them (``prefix`` without its last dot, "" if there is none).
    ``role`` is down, up, alpha, magnitude, diff or diff_b. ``style`` names prefix and ending for reports. ``flat``
    says that the module's dots are written as underscores (kohya).
    """

    key: str
    prefix: str
    module: str
    role: str
    style: str
    flat: bool

    @property
    def path(self) -> str:
        """The module's name in the model that PEFT wrapped: with the model's own prefix, without PEFT's."""
        own = f"{self.prefix}.".removeprefix("base_model.model.")
        return own + self.module if self.prefix and not self.flat else self.module


def parse_key(key: str) -> LoraKey | None:
    """``key`` taken apart, or None if it has no ending that a LoRA uses, or names no module."""
    for role, style, pattern in _ROLES:
        found = pattern.search(key)
        if found is None or found.start() == 0:
            continue
        path = key[: found.start()]
        for prefix in FLAT_PREFIXES:
            module = path.removeprefix(prefix).removeprefix("diffusion_model_")
            if path.startswith(prefix) and "." not in path and module:
                return LoraKey(key, prefix, module, role, "kohya", True)
        module = _PREFIXES.sub("", path, count=1)
        prefix = path.removesuffix(module).removesuffix(".")
        return LoraKey(key, prefix, module, role, f"{prefix or 'bare'} {style}", False)
    return None


def belongs_elsewhere(module: str) -> bool:
    """Whether ``module`` is in the text connectors, the text projections or the text encoder."""
    return _ELSEWHERE.search(module) is not None


class ModuleNames:
    """All spellings of the modules of one transformer, derived from its own tensor names and the rename table.

    Flattened names are looked up whole, never split. ``shapes`` maps every tensor name of the transformer (diffusers
    spelling) to its shape.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        modules = {name.rpartition(".")[0] for name in shapes if name.endswith((".weight", ".bias"))}
        self.linears = linear_modules(shapes)
        self._dotted: dict[str, tuple[str, ...] | None] = {}
        self._flat: dict[str, tuple[str, ...] | None] = {}
        for module in sorted(modules):
            self._add((module,), _spellings(module))
        for parent in sorted({module.rpartition(".")[0] for module in self.linears}):
            wanted = {letter: f"{parent}.to_{letter}" for letter in "qkv"}
            for name, letters in FUSED.items() if self.linears.issuperset(wanted.values()) else ():
                self._add(tuple(wanted[letter] for letter in letters), _spellings(f"{parent}.{name}"))

    def find(self, key: LoraKey) -> tuple[str, ...] | None:
        """The modules that ``key`` means, in row order: one, or two or three for a fused kv or qkv.

        Returns None for an unknown name. Raises KeyError if the name could mean two modules.
        """
        table = self._flat if key.flat else self._dotted
        match = table.get(key.module)
        if match is None and key.module in table:
            raise KeyError(key.module)
        return match

    def _add(self, modules: tuple[str, ...], spellings: Iterable[str]) -> None:
        for spelling in spellings:
            for table, alias in ((self._dotted, spelling), (self._flat, spelling.replace(".", "_"))):
                known = table.setdefault(alias, modules)
                if known != modules:
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
