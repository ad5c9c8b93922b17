"""The floating-point operations of a forward of the DiT: 2 per multiply-add, as in spec 07 section 5.

Counts matrix products and attention; leaves out norms, rotations and gates, and the AdaLN layers and the projections
into and out of the model, which run once and not per block (0.01 % of a forward). Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ltxpack.ltx23.expected import FEED_FORWARD
from ltxpack.runtime.model.config import DiTConfig

# Parts that an isolated pass does not compute.
ACROSS = ("a2v and v2a linears", "a2v and v2a attention")


@dataclass(frozen=True)
class Lengths:
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
        + 2 * linear(own, video.dim, video.dim),
        "video text linears": _queries(own, video.dim, video.dim, video.heads) + 2 * linear(text, video.dim, video.dim),
        "video feed-forward": 2 * linear(own, video.dim, FEED_FORWARD * video.dim),
        "a2v and v2a linears": (
            _queries(own, video.dim, inner, audio.heads)
            + _queries(a, audio.dim, inner, audio.heads)
            + 2 * linear(a, audio.dim, inner)
            + 2 * linear(own, video.dim, inner)
        ),
        "audio linears": (
            2 * _queries(a, audio.dim, audio.dim, audio.heads)
            + 2 * linear(a, audio.dim, audio.dim)
            + 2 * linear(text, audio.dim, audio.dim)
            + 2 * linear(a, audio.dim, FEED_FORWARD * audio.dim)
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


def linear(tokens: int, fan_in: int, fan_out: int) -> int:
    """A product of ``tokens`` rows with a weight [fan_out, fan_in]."""
    return 2 * tokens * fan_in * fan_out


def _queries(tokens: int, dim: int, inner: int, heads: int) -> int:
    """Queries, the gate per head and the output projection."""
    return linear(tokens, dim, inner) + linear(tokens, dim, heads) + linear(tokens, inner, dim)


def _attention(queries: int, keys: int, inner: int) -> int:
    """Scores, and values weighted by them."""
    return 2 * 2 * queries * keys * inner
