"""The fields of ``transformer/config.json`` that the DiT needs (diffusers' fields, spec 01 section 5).

It knows no weights. It refuses by name, and never ignores, a value that needs another computation than this room has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ltxpack.errors import UnsupportedError
from ltxpack.ltx23.codes import CODED
from ltxpack.runtime.sampling.shape import AV

# Field -> diffusers' default for an absent field, whose type the values must have: see _KINDS.
_VALUES: dict[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "pos_embed_max_pos": 20,
    "base_height": 2048,
    "base_width": 2048,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_pos_embed_max_pos": 20,
    "num_layers": 48,
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "timestep_scale_multiplier": 1000.0,
    "cross_attn_timestep_scale_multiplier": 1000.0,
    "attention_bias": True,
    "attention_out_bias": True,
    "ff_bias": True,
    "audio_ff_bias": True,
}
_KINDS = {int: "a positive integer", float: "a positive number", bool: "true or false"}
# Field -> the one implemented value, and diffusers' default, which differs for some.
_FIXED: dict[str, tuple[object, object]] = {
    "patch_size": (1, 1),
    "patch_size_t": (1, 1),
    "audio_patch_size": (1, 1),
    "audio_patch_size_t": (1, 1),
    "gated_attn": (True, False),
    "audio_gated_attn": (True, False),
    "cross_attn_mod": (True, False),
    "audio_cross_attn_mod": (True, False),
    "activation_fn": ("gelu-approximate", "gelu-approximate"),
    "qk_norm": ("rms_norm_across_heads", "rms_norm_across_heads"),
    "norm_elementwise_affine": (False, False),
    "rope_type": ("split", "interleaved"),
    "rope_double_precision": (True, True),
    "use_prompt_embeddings": (False, True),
    "use_prompt_adaln_single": (True, True),
    "use_keyframes_abs_pos_embedding": (False, False),
}
# Positions and the number of text channels come with each call; the STG switch is an argument of it.
_UNUSED = {"vae_scale_factors", "audio_scale_factor", "audio_sampling_rate", "audio_hop_length", "causal_offset"}
# The dtypes of the tensors say which are codes.
_UNUSED |= {"caption_channels", "perturbed_attn", CODED}


@dataclass(frozen=True)
class StreamConfig:
    """Sizes of one modality's half of the DiT. ``max_positions`` per axis: seconds, then pixels."""

    in_channels: int
    out_channels: int
    heads: int
    head_dim: int
    max_positions: tuple[int, ...]
    ff_bias: bool

    @property
    def dim(self) -> int:
        """Width of the hidden states, of the text context and of the self-attention."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class DiTConfig:
    streams: AV[StreamConfig]
    num_layers: int
    attention_bias: bool
    attention_out_bias: bool
    norm_eps: float
    rope_theta: float
    timestep_scale: float
    cross_gate_timestep_scale: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DiTConfig:
        """Read a diffusers ``LTX2VideoTransformer3DModel`` config; keys that start with ``_`` are skipped.

        Raises UnsupportedError, naming the field, for an unknown field, a value of another type, or a
        value that asks for something this DiT does not compute.
        """
        known = _VALUES.keys() | _FIXED.keys() | _UNUSED
        unknown = sorted(field for field in config if field not in known and not field.startswith("_"))
        if unknown:
            raise UnsupportedError("transformer config: fields this version does not know", items=unknown)
        for field, (implemented, default) in _FIXED.items():
            _expect(field, implemented, config.get(field, default))
        values = {field: config.get(field, default) for field, default in _VALUES.items()}
        for prefix in ("", "audio_"):
            if values[f"{prefix}out_channels"] is None:
                # In diffusers null means as many as the input channels.
                values[f"{prefix}out_channels"] = values[f"{prefix}in_channels"]
        for field, value in values.items():
            if not _is_of_kind(type(_VALUES[field]), value):
                raise _unsupported(field, _KINDS[type(_VALUES[field])], value)
        streams = AV(
            _stream(values, "", ("pos_embed_max_pos", "base_height", "base_width")),
            _stream(values, "audio_", ("audio_pos_embed_max_pos",)),
        )
        _expect("cross_attention_dim", streams.video.dim, values["cross_attention_dim"])
        _expect("audio_cross_attention_dim", streams.audio.dim, values["audio_cross_attention_dim"])
        return cls(
            streams=streams,
            num_layers=values["num_layers"],
            attention_bias=values["attention_bias"],
            attention_out_bias=values["attention_out_bias"],
            norm_eps=values["norm_eps"],
            rope_theta=values["rope_theta"],
            timestep_scale=values["timestep_scale_multiplier"],
            cross_gate_timestep_scale=values["cross_attn_timestep_scale_multiplier"],
        )


def _stream(values: Mapping[str, Any], prefix: str, axes: tuple[str, ...]) -> StreamConfig:
    head_dim = values[f"{prefix}attention_head_dim"]
    if head_dim % 2:
        raise _unsupported(f"{prefix}attention_head_dim", "an even number (rotary embedding turns pairs)", head_dim)
    return StreamConfig(
        in_channels=values[f"{prefix}in_channels"],
        out_channels=values[f"{prefix}out_channels"],
        heads=values[f"{prefix}num_attention_heads"],
        head_dim=head_dim,
        max_positions=tuple(values[axis] for axis in axes),
        ff_bias=values[f"{prefix}ff_bias"],
    )


def _is_of_kind(kind: type, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int if kind is int else int | float) and 0 < value < float("inf")


def _expect(field: str, expected: object, found: object) -> None:
    if type(found) is not type(expected) or found != expected:
        raise _unsupported(field, expected, found)


def _unsupported(field: str, expected: object, found: object) -> UnsupportedError:
    return UnsupportedError(
        f"transformer config: {field}",
        expected=expected if isinstance(expected, str) else repr(expected),
        found=repr(found),
        next="ltxpack verify OVERLAY",
    )
