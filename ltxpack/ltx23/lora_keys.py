"""LoRA keys in every naming seen so far: the module that a key means, and its tensor of the module (its role).

materialize, inspect and bake-lora all ask here, so that they agree on any file (spec 02, section 1). Nothing here is
about the 22B model alone.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from ltxpack.ltx23.renames import CONNECTORS, TRANSFORMER
from ltxpack.ltx23.text_encoder import PUBLISHED_ROOTS, ROOTS, UNUSED

DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
FUSED = {"to_qkv": "qkv", "qkv": "qkv", "to_kv": "kv", "kv": "kv"}
# The end of the role of a scale: the number by which a factor stored in fp8 is multiplied.
SCALE = ".scale"

_OFFICIAL_ROOT = "model.diffusion_model."
_TO_OFFICIAL = TRANSFORMER.reverse()
_ELSEWHERE = re.compile(
    r"(^|[._])(embeddings_connector|text_embedding_projection|connectors|video_connector|audio_connector"
    r"|(video|audio)_text_proj_in|aggregate_embed|text_encoders?|lora_te\d*|language_model"
    r"|layers[._]\d+[._](self_attn|mlp))([._]|$)|_embeddings_connector"
)
# Any number of them, but never the whole name.
_PREFIXES = re.compile(rf"(?:(?:{'|'.join(map(re.escape, DOTTED_PREFIXES))})(?!\Z))*")
# The same prefixes, flattened. The whole name is looked up first, because our own names begin with transformer_ too.
_FLAT_ROOTS = re.compile(r"(?:base_model_|diffusion_model_|transformer_|model_)")
# Components that torch.compile, FSDP, checkpointing, DDP and PEFT add to a name; no module of ours has such a name.
_NAMES = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module|base_layer"
_WRAPPERS = re.compile(rf"(?:\A|\.)(?:{_NAMES}|processor)(?=\.|\Z)")
_FLAT_WRAPPERS = re.compile(rf"(?:\A|_)(?:{_NAMES})(?=_|\Z)")


@dataclass(frozen=True)
class Method:
    """A way in which an adapter changes a weight, by the tensors of one module that it needs.

    ``parts``: for each part, the sets of roles of which one must be complete. ``extra``: roles that may be added.
    ``rank``: roles of which the first present has the rank as its first size; alpha does not scale a method without.
    ``alone``: no other method may change the same module.
    """

    name: str
    parts: tuple[tuple[tuple[str, ...], ...], ...]
    extra: tuple[str, ...] = ()
    rank: tuple[str, ...] = ()
    alone: bool = False

    @functools.cached_property
    def roles(self) -> frozenset[str]:
        return self.needed.union(self.extra)

    @functools.cached_property
    def needed(self) -> frozenset[str]:
        return frozenset(role for part in self.parts for way in part for role in way)

    def is_there(self, found: Iterable[str]) -> bool:
        """Whether any of its roles is in ``found``; then the others must be there too."""
        return not self.roles.isdisjoint(found)

    def missing(self, found: Iterable[str]) -> list[str]:
        """The roles that ``found`` lacks, or that do not fit the others; empty if the method is complete."""
        own = self.roles.intersection(found)
        whole = [set(way).union(*rest) for way, *rest in itertools.product(*self.parts)]
        nearest = min(whole, key=lambda wanted: len(wanted ^ (own - set(self.extra))))
        return sorted(nearest ^ (own - set(self.extra)))

    def rank_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The rank in ``shapes`` (role -> shape); 0 if there is none."""
        return next((shapes[role][0] for role in self.rank if shapes.get(role)), 0)


def _either(whole: str, *more: str) -> tuple[tuple[str, ...], ...]:
    """A matrix itself, or its two factors; ``more``: cores that may stand between the factors."""
    factors = (f"{whole}_a", f"{whole}_b")
    return ((whole,), factors, *((core, *factors) for core in more))


_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# All methods; their arithmetic is in lora_bake/methods.py.
METHODS = (
    Method("lora", ((("down", "up"),),), ("up_b",), rank=("down",)),
    Method("loha", ((_HADA, (*_HADA, "hada_t1", "hada_t2")),), rank=("hada_w1_b",)),
    Method("lokr", (_either("lokr_w1"), _either("lokr_w2", "lokr_t2")), rank=("lokr_w2_b", "lokr_w1_b")),
    Method("oft", ((("oft_blocks",), ("oft_diag",)),), ("rescale",), alone=True),
    Method("peft-oft", ((("oft_R",),),), alone=True),
    Method("peft-boft", ((("boft_R",),),), ("boft_s",), alone=True),
    Method("diff", ((("diff",), ("diff_b",), ("diff", "diff_b")),)),
    Method("weight", ((("weight",), ("bias",), ("weight", "bias")),), alone=True),
)


def _factor(name: str) -> str:
    """The ending of a tensor called ``name``: PEFT adds the adapter's name, and some trainers add "weight"."""
    return rf"\.{name}(?:\.(?!bias\Z)[^.]+)?(?:\.weight)?\Z"


_KOHYA = r"(?:(?:\.lora_linear_layer|\.lora|_lora)\.{0}\.weight|\.lora_{0}(?:\.weight)?)\Z"
# (role, name of the ending in reports, the ending). loralib writes the bare factor.
_ENDINGS = (
    ("down", "lora_A", r"\.lora_A(?:(?:\.[^.]+)?\.weight)?\Z"),
    ("up", "lora_A", r"\.lora_B(?:(?:\.[^.]+)?\.weight)?\Z"),
    ("up_b", "lora_A", r"\.lora_B(?:\.[^.]+)?\.bias\Z"),
    ("down", "lora_down", _KOHYA.format("down")),
    ("up", "lora_down", _KOHYA.format("up")),
    ("alpha", "alpha", r"\.alpha\Z"),
    ("magnitude", "dora", r"\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)\Z"),
    *((role, method.name, _factor(role)) for method in METHODS[1:-2] for role in sorted(method.roles)),  # LoHa to BOFT
    ("diff", "diff", r"\.(?:diff|w_norm)\Z"),
    ("diff_b", "diff", r"\.(?:diff_b|b_norm)\Z"),
    # A module saved whole (PEFT's modules_to_save).
    ("weight", "weight", r"(?:\.modules_to_save(?:\.[^.]+)?)?\.weight\Z"),
    ("weight", "weight", r"\.set_weight\Z"),
    ("bias", "weight", r"(?:\.modules_to_save(?:\.[^.]+)?)?\.bias\Z"),
)
_ROLES = tuple((role, style, re.compile(ending)) for role, style, ending in _ENDINGS)
_IN_BLOCK = re.compile(r"\.\d+\.")
# Names before "weight" or "bias" that are no modules saved whole. The group is atomic and takes the last name of a
# method, because a hostile name holds hundreds of them.
_NO_MODULE = re.compile(
    r"(?>.*[._](?:lora|lokr|hada|oft|boft|ia3|vera)_)\w*\Z|.*\.(?:original_module|[ab][12]|bm[12])\Z", re.DOTALL
)
# Methods that ltxpack knows by name alone.
_UNREAD = {
    "GLoRA": r"\.(?:[ab][12]|bm[12])\.weight", "IA3": r"\.(?:on_input|ia3_l)", "Tucker LoCon": r"\.lora_mid\.weight",
    "OFT of PEFT before 0.16": r"\.oft_r", "VeRA": r"\.vera_lambda_[bd]", "HRA": r"\.hra_u",
}  # fmt: skip
_SCALED = re.compile(r"(?:\.weight)?[._](?:scale_weight|weight_scale)\Z")


@dataclass(frozen=True)
class LoraKey:
    """The parts of a key.

    ``prefix`` and ``module`` are spelled as in the file, without wrappers; ``prefix`` has no last dot, and is "" if
    there is none. ``role`` is alpha, magnitude, a method's role, or one of these with SCALE at its end. ``style`` names
    prefix and ending for reports. ``flat``: the module's dots are written as underscores (kohya).
    """

    key: str
    prefix: str
    module: str
    role: str
    style: str
    flat: bool

    @property
    def may_be_flat(self) -> bool:
        """Whether the module's name has no dot, so that it may be a flattened name after an unknown prefix."""
        return self.flat or "." not in self.module

    def without(self, rest: str) -> LoraKey:
        """The key without the unknown prefix ``rest``, see :meth:`ModuleNames.rest_before`."""
        return replace(self, module=self.module.removeprefix(rest), flat=self.may_be_flat)

    @property
    def path(self) -> str:
        """The module's name in the model that PEFT wrapped: with the model's own prefix, without PEFT's."""
        own = f"{self.prefix}.".removeprefix("base_model.model.")
        return own + self.module if self.prefix and not self.flat else self.module


@functools.lru_cache(maxsize=1 << 16)
def parse_key(key: str) -> LoraKey | None:
    """The parts of ``key``, or None if it has no ending of an adapter, or names no module."""
    if scaled := _SCALED.search(key):
        stem = key[: scaled.start()]
        found = _parse(stem) or _parse(f"{stem}.weight")
        return replace(found, key=key, role=found.role + SCALE) if found and found.role != "alpha" else None
    return _parse(key)


def _parse(key: str) -> LoraKey | None:
    for role, style, pattern in _ROLES:
        found = pattern.search(key)
        if found is None or found.start() == 0:
            continue
        path = key[: found.start()]
        if style == "weight" and _NO_MODULE.match(path):
            return None
        for prefix in FLAT_PREFIXES:
            module = path.removeprefix(prefix)
            if path.startswith(prefix) and "." not in path and module:
                return LoraKey(key, prefix, _unwrapped(module, _FLAT_WRAPPERS, "_"), role, "kohya", True)
        path = _unwrapped(path, _WRAPPERS, ".")
        module = _PREFIXES.sub("", path, count=1)
        prefix = path.removesuffix(module).removesuffix(".")
        return LoraKey(key, prefix, module, role, f"{prefix or 'bare'} {style}", False)
    return None


def _unwrapped(path: str, wrappers: re.Pattern[str], dot: str) -> str:
    inner = wrappers.sub("", path)
    return path if inner in ("", path) else inner.removeprefix(dot)


def unread_method(key: str) -> str | None:
    """The method to which ``key`` belongs if ltxpack knows it but does not read it; else None."""
    return next((name for name, ending in _UNREAD.items() if re.search(rf"{ending}\Z", key)), None)


def belongs_elsewhere(module: str) -> bool:
    """Whether ``module`` is in the text connectors, the text projections or the text encoder."""
    return _ELSEWHERE.search(module) is not None


class ModuleNames:
    """All spellings of the modules of one model, derived from its own tensor names.

    Flattened names are looked up whole, never split. ``shapes`` maps every tensor name of the model (diffusers
    spelling) to its shape, ``spellings`` a module to its names (default: those of the transformer's rename table).
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], spellings: Callable[[str], set[str]] | None = None
    ) -> None:
        spelled = spellings or _spellings
        # A table counts as a module here.
        modules = {name.removesuffix(".weight").removesuffix(".bias") for name in shapes}
        self.linears = linear_modules(shapes)
        self._dotted: dict[str, tuple[str, ...] | None] = {}
        self._flat: dict[str, tuple[str, ...] | None] = {}
        for module in sorted(modules):
            self._add((module,), spelled(module))
        for parent in sorted({module.rpartition(".")[0] for module in self.linears}):
            wanted = {letter: f"{parent}.to_{letter}" for letter in "qkv"}
            for name, letters in FUSED.items() if self.linears.issuperset(wanted.values()) else ():
                self._add(tuple(wanted[letter] for letter in letters), spelled(f"{parent}.{name}"))

    def find(self, key: LoraKey) -> tuple[str, ...] | None:
        """The modules that ``key`` means, in row order: one, or two or three for a fused kv or qkv.

        Returns None for an unknown name. Raises KeyError if the name could mean two modules.
        """
        table, module = self._flat if key.flat else self._dotted, key.module
        while key.flat and module not in table and (root := _FLAT_ROOTS.match(module)):
            module = module[root.end() :]
        match = table.get(module)
        if match is None and module in table:
            raise KeyError(module)
        return match

    def rest_before(self, key: LoraKey, in_block: bool = True) -> str | None:
        """The unknown prefix before the name of a module, for a key that :meth:`find` does not know.

        ``in_block``: the module must be in a block. None if no ending of the name, or more than one, is the name of a
        module, and for modules of the text path, because its connectors have names like ours.
        """
        table, dot = (self._flat, "_") if key.may_be_flat else (self._dotted, ".")
        if belongs_elsewhere(key.module):
            return None
        ends = [i + 1 for i, letter in enumerate(key.module) if letter == dot]
        means = _IN_BLOCK.search if in_block else bool
        found = [key.module[:end] for end in ends if any(map(means, table.get(key.module[end:]) or ()))]
        return found[0] if len(found) == 1 else None

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


# The text path: text connectors, text projections, Gemma's language model

# The components of the text path; the folder of the first holds that of the second.
TEXT_COMPONENTS = ("text_encoder", "connectors")

_TO_OFFICIAL_TEXT = CONNECTORS.reverse()
# Prefixes of kohya and others before a flattened name of the text encoder.
_FLAT = re.compile(r"lora_(?:te\d*|text_encoder\d*)_")
# Diffusers writes the component before the name; parse_key knows the prefixes of a wrapped model.
_COMPONENT = re.compile(r"(?:text_encoders?|connectors)\.(?:model\.|transformer\.)?")


def names_of(shapes: Mapping[str, tuple[int, ...]]) -> ModuleNames:
    """The spellings of the modules of a transformer, and of a text path if ``shapes`` has its tensors."""
    text = {name: shape for name, shape in shapes.items() if _is_text(name)}
    rest = {name: shape for name, shape in shapes.items() if name not in text}
    return BothNames(rest, TextNames(text)) if text else ModuleNames(rest)


def _is_text(name: str) -> bool:
    return name.startswith((*CONNECTORS.roots.values(), *PUBLISHED_ROOTS)) or UNUSED.match(name) is not None


class TextNames(ModuleNames):
    """All spellings of the modules of a text encoder and its connectors, by the tensor names of both."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(shapes, _text_spellings)

    def find(self, key: LoraKey) -> tuple[str, ...] | None:
        """As in the base class; a name may begin with its component or kohya's prefix of a text encoder."""
        flat = _FLAT.match(key.module)
        if flat is not None and not key.flat and "." not in key.module:
            return self._flat.get(key.module[flat.end() :])
        return super().find(key) or self._dotted.get(_COMPONENT.sub("", key.module, count=1))


class BothNames(ModuleNames):
    """The modules of a transformer first, then those of its text path."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], text: TextNames) -> None:
        super().__init__(shapes)
        self.linears |= text.linears
        self._text = text

    def find(self, key: LoraKey) -> tuple[str, ...] | None:
        """The modules of the transformer, else those of the text path."""
        return super().find(key) or self._text.find(key)


def _text_spellings(module: str) -> set[str]:
    """The names of ``module`` in diffusers, the official code, and files of Gemma."""
    root = next((root for root in CONNECTORS.roots.values() if f"{module}.".startswith(root)), None)
    if root is not None:
        official = _TO_OFFICIAL_TEXT.rename(f"{module}.").removesuffix(".").removeprefix(_OFFICIAL_ROOT)
        both = {module, official}
        return both | {name.removesuffix(".0") for name in both if name.endswith(".to_out.0")}
    if UNUSED.match(f"{module}."):
        return {module}
    inner = module.removeprefix(next(root for root in ROOTS if f"{module}.".startswith(root)))
    return {root + inner for root in ROOTS} | {root.removeprefix("model.") + inner for root in PUBLISHED_ROOTS}
