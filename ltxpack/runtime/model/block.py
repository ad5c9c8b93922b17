"""One transformer block: both streams through their own attentions, the attentions between them, and feed-forward.

The passes of one denoising step go through a block together: the block does common work once, and its weights come to
the device once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltxpack.runtime.model.config import DiTConfig, StreamConfig
from ltxpack.runtime.model.kernels import AUDIO, TEXT, VIDEO
from ltxpack.runtime.model.layers import Attention, FeedForward, Keys, Rows, modulate
from ltxpack.runtime.model.rope import RopeTables
from ltxpack.runtime.sampling.shape import AV


@dataclass(frozen=True)
class Conditioning:
    """The inputs of every block for one modality; made once per forward.

    ``adaln`` has 9 rows (shift, scale, gate of self-attention, of feed-forward, of the text queries), ``prompt``
    2 (shift, scale), ``cross`` 4 (scale, shift for a2v, then for v2a), ``cross_gate`` 1; ``embedded``
    (1 row) drives the head. ``off``: the block leaves the modality's hidden states unchanged.
    """

    adaln: Rows
    prompt: Rows
    cross: Rows
    cross_gate: Rows
    embedded: Rows
    context: Tensor
    rope: RopeTables
    off: bool


class BlockModules(NamedTuple):
    """One modality's modules and tables in a block; ``cross_rows`` is its table for a2v and v2a (4 rows, the gate)."""

    self_attention: Attention
    text_attention: Attention
    feed_forward: FeedForward
    rows: Tensor
    prompt_rows: Tensor
    cross_rows: Tensor


@dataclass(frozen=True)
class PassState:
    """One pass between two blocks.

    ``hidden`` [B, T, D] per modality. ``isolated`` leaves out a2v and v2a; ``perturbed`` replaces that modality's
    self-attention by its values.
    """

    hidden: AV[Tensor]
    conditioning: AV[Conditioning]
    isolated: bool
    perturbed: AV[bool]


class BlockFunctions(NamedTuple):
    """A block's work in three functions of the block, each plain or compiled: ``text`` needs no hidden state,
    ``attend`` stays within a modality, ``exchange`` goes between the two.
    """

    text: Callable[..., AV[Keys]]
    attend: Callable[..., AV[Tensor]]
    exchange: Callable[..., AV[Tensor]]


class TransformerBlock(nn.Module):
    """Names of modules and tables are diffusers'; order of work is spec 06 section 9."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        video, audio = config.streams.video, config.streams.audio
        self.eps = config.norm_eps
        self.functions = PLAIN

        def attention(kind: str, query: StreamConfig, context: StreamConfig, heads: StreamConfig) -> Attention:
            biases = {"bias": config.attention_bias, "out_bias": config.attention_out_bias}
            widths = (query.dim, context.dim, heads.heads, heads.head_dim)
            return Attention(kind, *widths, **biases, eps=config.norm_eps)

        self.attn1 = attention(VIDEO, video, video, video)
        self.attn2 = attention(TEXT, video, video, video)
        self.ff = FeedForward(video.dim, bias=video.ff_bias)
        self.scale_shift_table = table(9, video.dim)
        self.prompt_scale_shift_table = table(2, video.dim)
        self.video_a2v_cross_attn_scale_shift_table = table(5, video.dim)

        self.audio_attn1 = attention(AUDIO, audio, audio, audio)
        self.audio_attn2 = attention(AUDIO, audio, audio, audio)
        self.audio_ff = FeedForward(audio.dim, bias=audio.ff_bias)
        self.audio_scale_shift_table = table(9, audio.dim)
        self.audio_prompt_scale_shift_table = table(2, audio.dim)
        self.audio_a2v_cross_attn_scale_shift_table = table(5, audio.dim)

        # Both run with the audio stream's heads.
        self.audio_to_video_attn = attention(AUDIO, video, audio, audio)
        self.video_to_audio_attn = attention(AUDIO, audio, video, audio)

    def forward(self, states: Sequence[PassState]) -> list[AV[Tensor]]:
        """The hidden states [B, T, D] of every pass after this block.

        Passes that hold the same objects share work: text keys and values if their conditioning is the same object,
        and everything up to a2v and v2a if their hidden states are too.
        """
        made: dict[Hashable, Any] = {}

        def once(step: Callable[..., Any], *inputs: object, flags: Hashable = None) -> Any:
            key = (step, *map(id, inputs), flags)
            if key not in made:
                made[key] = step(self, *inputs) if flags is None else step(self, *inputs, flags)
            return made[key]

        through = []
        for state in states:
            text = once(self.functions.text, state.conditioning)
            attended = once(self.functions.attend, state.hidden, state.conditioning, text, flags=state.perturbed)
            through.append(once(self.functions.exchange, attended, state.conditioning, flags=state.isolated))
        return through

    def text(self, conditioning: AV[Conditioning]) -> AV[Keys]:
        """Keys and values of both modalities' text, which depend on context and sigma alone."""
        return conditioning.map(self._text, self.by_stream())

    def attend(
        self, hidden: AV[Tensor], conditioning: AV[Conditioning], text: AV[Keys], perturbed: AV[bool]
    ) -> AV[Tensor]:
        return hidden.map(self._attend, conditioning, self.by_stream(), text, perturbed)

    def exchange(self, hidden: AV[Tensor], conditioning: AV[Conditioning], isolated: bool) -> AV[Tensor]:
        """a2v and v2a unless ``isolated``, then feed-forward."""
        layers = self.by_stream()
        if not isolated:
            hidden = self._cross(hidden, conditioning, layers)
        return hidden.map(self._feed_forward, conditioning, layers)

    def by_stream(self) -> AV[BlockModules]:
        """The two modalities' modules and tables under common names."""
        return AV(
            BlockModules(
                self.attn1,
                self.attn2,
                self.ff,
                self.scale_shift_table,
                self.prompt_scale_shift_table,
                self.video_a2v_cross_attn_scale_shift_table,
            ),
            BlockModules(
                self.audio_attn1,
                self.audio_attn2,
                self.audio_ff,
                self.audio_scale_shift_table,
                self.audio_prompt_scale_shift_table,
                self.audio_a2v_cross_attn_scale_shift_table,
            ),
        )

    def _text(self, given: Conditioning, layers: BlockModules) -> Keys:
        prompt = given.prompt.plus(layers.prompt_rows)
        return layers.text_attention.keys(modulate(given.context, prompt.row(1), prompt.row(0)))

    def _attend(self, x: Tensor, given: Conditioning, layers: BlockModules, text: Keys, perturbed: bool) -> Tensor:
        if given.off:
            return x
        rows = given.adaln.plus(layers.rows)
        own = modulate(self._norm(x), rows.row(1), rows.row(0))
        attention, turn = layers.self_attention, given.rope.self_attention
        attended = attention.values_only(own) if perturbed else attention.to_itself(own, turn)
        x = x + rows.row(2) * attended
        query = modulate(self._norm(x), rows.row(7), rows.row(6))
        return x + rows.row(8) * layers.text_attention(query, text)

    def _cross(self, hidden: AV[Tensor], conditioning: AV[Conditioning], layers: AV[BlockModules]) -> AV[Tensor]:
        """a2v and v2a; both read the states before either."""
        normed = hidden.map(self._norm)
        rows = conditioning.map(lambda given, layers: given.cross.plus(layers.cross_rows[:4]), layers)
        gates = conditioning.map(lambda given, layers: given.cross_gate.plus(layers.cross_rows[4:]), layers)
        turns = conditioning.map(lambda given: given.rope.cross_attention)
        a2v = normed.map(lambda x, row: modulate(x, row.row(0), row.row(1)), rows)
        v2a = normed.map(lambda x, row: modulate(x, row.row(2), row.row(3)), rows)
        video, audio = hidden.video, hidden.audio
        if not conditioning.video.off:
            sounds = self.audio_to_video_attn.keys(a2v.audio, turns.audio)
            video = video + gates.video.row(0) * self.audio_to_video_attn(a2v.video, sounds, turns.video)
        if not conditioning.audio.off:
            pictures = self.video_to_audio_attn.keys(v2a.video, turns.video)
            audio = audio + gates.audio.row(0) * self.video_to_audio_attn(v2a.audio, pictures, turns.audio)
        return AV(video, audio)

    def _feed_forward(self, x: Tensor, given: Conditioning, layers: BlockModules) -> Tensor:
        if given.off:
            return x
        rows = given.adaln.plus(layers.rows)
        return x + rows.row(5) * layers.feed_forward(modulate(self._norm(x), rows.row(4), rows.row(3)))

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


def table(rows: int, dim: int) -> nn.Parameter:
    """A learned scale/shift table, zero until weights are loaded."""
    return nn.Parameter(torch.zeros(rows, dim))


PLAIN = BlockFunctions(TransformerBlock.text, TransformerBlock.attend, TransformerBlock.exchange)
