"""The operations of guided evaluations and whole stages, for rates; what a forward takes is the runtime's to count."""

from __future__ import annotations

from collections.abc import Mapping

from ltxpack.ltx23.expected import FEED_FORWARD
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.parallel.schemes import Lengths, forward_flops, forward_parts, linear


def shared_flops(config: DiTConfig, lengths: Lengths) -> int:
    """FLOP that a conditional and an isolated pass need once if they go together.

    The keys and values of the text in every block, and block 0 up to a2v.
    """
    parts = forward_parts(config, lengths)
    text = sum(
        2 * linear(lengths.text, stream.dim, stream.dim) for stream in (config.streams.video, config.streams.audio)
    )
    audio_feed_forward = 2 * linear(lengths.audio, config.streams.audio.dim, FEED_FORWARD * config.streams.audio.dim)
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
