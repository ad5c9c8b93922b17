"""What the DiT needs to know of ``transformer/config.json`` (diffusers' fields, spec 01 section 5).

It knows no weights. A value that would need another computation than the one written in this room is
refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ltxpack.errors import UnsupportedError
from ltxpack.runtime.sampling.shape import AV

T = TypeVar("T")
# Every table below: field -> what diffusers takes when the field is absent.
_SIZES: dict[str, int] = {
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
}
_NUMBERS: dict[str, float] = {
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "timestep_scale_multiplier": 1000,
    "cross_attn_timestep_scale_multiplier": 1000,
}
_SWITCHES: dict[str, bool] = {
    "attention_bias": True,
    "attention_out_bias": True,
    "ff_bias": True,
    "audio_ff_bias": True,
}
# One value is implemented; diffusers' default is another one for some.
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
_UNUSED |= {"caption_channels", "perturbed_attn"}


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
    """Everything ``DiT`` is built from."""

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
        known = _SIZES.keys() | _NUMBERS.keys() | _SWITCHES.keys() | _FIXED.keys() | _UNUSED
        unknown = sorted(field for field in config if field not in known and not field.startswith("_"))
        if unknown:
            raise UnsupportedError("transformer config: fields this version does not know", items=unknown)
        for field, (implemented, default) in _FIXED.items():
            _expect(field, implemented, config.get(field, default))
        sizes = _with_channels(config)
        numbers = _values(config, _NUMBERS, "a positive number", _is_number)
        switches = _values(config, _SWITCHES, "true or false", lambda value: isinstance(value, bool))
        streams = AV(
            _stream(sizes, "", ("pos_embed_max_pos", "base_height", "base_width"), switches),
            _stream(sizes, "audio_", ("audio_pos_embed_max_pos",), switches),
        )
        _expect("cross_attention_dim", streams.video.dim, sizes["cross_attention_dim"])
        _expect("audio_cross_attention_dim", streams.audio.dim, sizes["audio_cross_attention_dim"])
        return cls(
            streams=streams,
            num_layers=sizes["num_layers"],
            attention_bias=switches["attention_bias"],
            attention_out_bias=switches["attention_out_bias"],
            norm_eps=numbers["norm_eps"],
            rope_theta=numbers["rope_theta"],
            timestep_scale=numbers["timestep_scale_multiplier"],
            cross_gate_timestep_scale=numbers["cross_attn_timestep_scale_multiplier"],
        )


def _stream(sizes: Mapping[str, int], prefix: str, axes: tuple[str, ...], switches: Mapping[str, bool]) -> StreamConfig:
    head_dim = sizes[f"{prefix}attention_head_dim"]
    if head_dim % 2:
        raise _unsupported(f"{prefix}attention_head_dim", "an even number (rotary embedding turns pairs)", head_dim)
    return StreamConfig(
        in_channels=sizes[f"{prefix}in_channels"],
        out_channels=sizes[f"{prefix}out_channels"],
        heads=sizes[f"{prefix}num_attention_heads"],
        head_dim=head_dim,
        max_positions=tuple(sizes[axis] for axis in axes),
        ff_bias=switches[f"{prefix}ff_bias"],
    )


def _with_channels(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes; diffusers lets ``out_channels`` be null, which means as many as go in."""
    given = dict(config)
    for prefix in ("", "audio_"):
        if f"{prefix}out_channels" in given and given[f"{prefix}out_channels"] is None:
            given[f"{prefix}out_channels"] = given.get(f"{prefix}in_channels", _SIZES[f"{prefix}in_channels"])
    return _values(given, _SIZES, "a positive integer", lambda value: _is_number(value) and isinstance(value, int))


def _values(
    config: Mapping[str, Any], table: Mapping[str, T], wanted: str, sound: Callable[[Any], bool]
) -> dict[str, T]:
    """The fields of ``table``. Raises UnsupportedError for a value that is not ``wanted``."""
    found = {field: config.get(field, default) for field, default in table.items()}
    for field, value in found.items():
        if not sound(value):
            raise _unsupported(field, wanted, value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


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
