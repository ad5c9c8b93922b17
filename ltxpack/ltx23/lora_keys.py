"""What a LoRA key is, in every naming seen so far: which module it means, and which tensor of the module it holds.

materialize, inspect and bake-lora all ask here, so that they agree on any file (spec 02, section 1). Whether the
transformer has such a module is not decided here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DOTTED_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "model.",
)
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")

_ELSEWHERE = re.compile(
    r"(^|[._])(embeddings_connector|text_embedding_projection|connectors|video_connector|audio_connector"
    r"|(video|audio)_text_proj_in|aggregate_embed|text_encoders?|lora_te\d*)([._]|$)|_embeddings_connector"
)
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
        prefix, module = _split_prefixes(path)
        return LoraKey(key, prefix, module, role, f"{prefix or 'bare'} {style}", False)
    return None


def belongs_elsewhere(module: str) -> bool:
    """Whether ``module`` is in the text connectors, the text projections or the text encoder."""
    return _ELSEWHERE.search(module) is not None


def _split_prefixes(path: str) -> tuple[str, str]:
    """The prefixes of ``path``, however many there are, and the rest, of which something is always left."""
    found = _PREFIXES.match(path)
    assert found is not None
    return found[0].removesuffix("."), path[found.end() :]
