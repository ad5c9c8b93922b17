"""The floating-point operations of a forward of the DiT: 2 per multiply-add, as in spec 07 section 5.

Counts matrix products and attention; leaves out norms, rotations and gates, and the AdaLN layers and the projections
into and out of the model, which run once and not per block (0.01 % of a forward). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ltxpack.runtime.model.config import DiTConfig

FEED_FORWARD = 4
# Parts that an isolated pass does not compute.
ACROSS = ("a2v and v2a linears", "a2v and v2a attention")


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens."""

    video: int
    audio: int
    text: int


def forward_parts(config: DiTConfig, lengths: Lengths, ranks: int = 1) -> dict[str, int]:
    """FLOP of one forward by part, over all blocks; batch 1.

    ``ranks``: FLOP of one of this many ranks that share the video's tokens; each computes audio and text.
    """
    video, audio = config.streams.video, config.streams.audio
    v, a, text = lengths.video, lengths.audio, lengths.text
    own, inner = -(-v // ranks), audio.dim
    per_block = {
        "video self-attention linears": _queries(own, video.dim, video.dim, video.heads)
        + 2 * _linear(own, video.dim, video.dim),
        "video text linears": _queries(own, video.dim, video.dim, video.heads)
        + 2 * _linear(text, video.dim, video.dim),
        "video feed-forward": 2 * _linear(own, video.dim, FEED_FORWARD * video.dim),
        "a2v and v2a linears": (
            _queries(own, video.dim, inner, audio.heads)
            + _queries(a, audio.dim, inner, audio.heads)
            + 2 * _linear(a, audio.dim, inner)
            + 2 * _linear(own, video.dim, inner)
        ),
        "audio linears": (
            2 * _queries(a, audio.dim, audio.dim, audio.heads)
            + 2 * _linear(a, audio.dim, audio.dim)
            + 2 * _linear(text, audio.dim, audio.dim)
            + 2 * _linear(a, audio.dim, FEED_FORWARD * audio.dim)
        ),
        # All tokens attend with a share of the heads, or a share of the tokens with all heads.
        "video self-attention": _attention(own, v, video.dim),
        "text attention": _attention(own, text, video.dim),
        "a2v and v2a attention": _attention(own, a, inner) + _attention(a, v, inner) // ranks,
        "audio attention": _attention(a, a + text, audio.dim),
    }
    return {part: config.num_layers * count for part, count in per_block.items()}


def forward_flops(config: DiTConfig, lengths: Lengths, ranks: int = 1, *, isolated: bool = False) -> int:
    """FLOP of one pass on one rank, or on each of ``ranks`` that share it."""
    parts = forward_parts(config, lengths, ranks)
    return sum(count for part, count in parts.items() if not (isolated and part in ACROSS))


def shared_flops(config: DiTConfig, lengths: Lengths) -> int:
    """FLOP that a conditional and an isolated pass need once if they go together.

    The keys and values of the text in every block, and block 0 up to a2v.
    """
    parts = forward_parts(config, lengths)
    text = sum(
        2 * _linear(lengths.text, stream.dim, stream.dim) for stream in (config.streams.video, config.streams.audio)
    )
    audio_feed_forward = 2 * _linear(lengths.audio, config.streams.audio.dim, FEED_FORWARD * config.streams.audio.dim)
    alone = ("video self-attention linears", "video text linears", "audio linears", "video self-attention")
    within = sum(parts[part] for part in (*alone, "text attention", "audio attention"))
    return (config.num_layers - 1) * text + within // config.num_layers - audio_feed_forward


def guided_flops(config: DiTConfig, lengths: Lengths) -> int:
    """FLOP of one guided evaluation: conditional, unconditional and isolated pass together."""
    passes = 2 * forward_flops(config, lengths) + forward_flops(config, lengths, isolated=True)
    return passes - shared_flops(config, lengths)


def run_flops(config: DiTConfig, stages: Mapping[str, tuple[Lengths, int, bool]]) -> dict[str, int]:
    """FLOP of a recipe's stages in this runtime; ``stages``: lengths, number of evaluations, whether guided."""
    return {
        name: evaluations * (guided_flops if guided else forward_flops)(config, lengths)
        for name, (lengths, evaluations, guided) in stages.items()
    }


def _linear(tokens: int, fan_in: int, fan_out: int) -> int:
    return 2 * tokens * fan_in * fan_out


def _queries(tokens: int, dim: int, inner: int, heads: int) -> int:
    """Queries, the gate per head and the output projection."""
    return _linear(tokens, dim, inner) + _linear(tokens, dim, heads) + _linear(tokens, inner, dim)


def _attention(queries: int, keys: int, inner: int) -> int:
    """Scores, and values weighted by them."""
    return 2 * 2 * queries * keys * inner
