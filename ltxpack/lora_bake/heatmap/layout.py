"""The transformer's modules in the order a page shows them: by stream and by what they do, not by the alphabet.

The tables name the modules of LTX-2.3 (``runtime/model/``). A module that is in none
of them, as in a model made by someone else, is shown after the known ones under its own name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OTHER = "Other"

# Stream -> (module of a block, what it is), in the order of a block's own definition.
_BLOCK = {
    "Video": (("attn1", "self-attention"), ("attn2", "text attention"), ("ff", "feed-forward")),
    "Audio": (("audio_attn1", "self-attention"), ("audio_attn2", "text attention"), ("audio_ff", "feed-forward")),
    "Audio and video": (
        ("audio_to_video_attn", "video attends to audio"),
        ("video_to_audio_attn", "audio attends to video"),
    ),
}
_PARTS = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "out",
    "to_gate_logits": "gate",
    "norm_q": "q norm",
    "norm_k": "k norm",
    "net.0.proj": "in",
    "net.2": "out",
}
_OUTSIDE = {
    "Video": (
        "proj_in",
        "time_embed",
        "prompt_adaln",
        "av_cross_attn_video_scale_shift",
        "av_cross_attn_video_a2v_gate",
        "proj_out",
    ),
    "Audio": (
        "audio_proj_in",
        "audio_time_embed",
        "audio_prompt_adaln",
        "av_cross_attn_audio_scale_shift",
        "av_cross_attn_audio_v2a_gate",
        "audio_proj_out",
    ),
}
_BIAS = ".bias"


@dataclass(frozen=True)
class Column:
    """One kind of module (``attn1.to_q``) and its short name within its group (``q``)."""

    kind: str
    label: str


@dataclass(frozen=True)
class Group:
    """Columns that belong together: the parts of one attention or feed-forward."""

    stream: str
    module: str
    note: str
    columns: tuple[Column, ...]


def groups(kinds: Iterable[str]) -> list[Group]:
    """``kinds`` of a block in model order: weights as q, k, v, out, gate, a bias beside its weight."""
    left = set(kinds)
    made = []
    for stream, modules in _BLOCK.items():
        for module, note in modules:
            found = {kind for kind in left if kind.startswith(f"{module}.")}
            left -= found
            if found:
                made.append(Group(stream, module, note, _columns(module, found)))
    if left:
        made.append(Group(OTHER, "", "", tuple(Column(kind, kind) for kind in sorted(left))))
    return made


def outside(names: Iterable[str]) -> dict[str, list[str]]:
    """Names outside the blocks, by stream, in the order in which a forward meets them."""
    left = set(names)
    made: dict[str, list[str]] = {}
    for stream, modules in _OUTSIDE.items():
        for module in modules:
            found = sorted(name for name in left if name == module or name.startswith(f"{module}."))
            left -= set(found)
            made.setdefault(stream, []).extend(found)
    made[OTHER] = sorted(left)
    return {stream: found for stream, found in made.items() if found}


def _columns(module: str, kinds: Iterable[str]) -> tuple[Column, ...]:
    order = list(_PARTS)

    def place(kind: str) -> tuple[int, str]:
        part = kind.removeprefix(f"{module}.").removesuffix(_BIAS)
        return order.index(part) if part in _PARTS else len(order), kind

    return tuple(Column(kind, _label(kind.removeprefix(f"{module}."))) for kind in sorted(kinds, key=place))


def _label(part: str) -> str:
    name = part.removesuffix(_BIAS)
    return _PARTS.get(name, name) + (" bias" if part.endswith(_BIAS) else "")
