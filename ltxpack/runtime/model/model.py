"""The DiT: two streams of tokens and their timesteps in, two velocities out (spec 06).

It knows neither noise schedules nor guidance nor the layout of tokens in space; positions come as numbers.
Parameter names are those of diffusers' LTX2VideoTransformer3DModel, so the same shards load in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltxpack.runtime.model.block import PLAIN, BlockFunctions, Conditioning, PassState, TransformerBlock, table
from ltxpack.runtime.model.config import DiTConfig, StreamConfig
from ltxpack.runtime.model.kernels import KERNELS
from ltxpack.runtime.model.layers import AdaLayerNormSingle, Attention, Linear, Rows, modulate
from ltxpack.runtime.model.rope import RopeTables, Rotation, rotation
from ltxpack.runtime.sampling.shape import AV

HEAD_EPS = 1e-6
UNPERTURBED: AV[frozenset[int]] = AV(frozenset(), frozenset())


@dataclass(frozen=True)
class Stream:
    """One modality's input to a forward.

    ``latents`` [B, T, in_channels] in the model dtype. ``timesteps`` [B, K]: the distinct values of mask·sigma,
    unscaled, float32 or float64; ``timestep_index`` [T] int64 names the one each token uses, None means K is 1.
    ``sigma`` [B]: the unmasked sigma, likewise unscaled. ``context`` [B, S, D]: the text, without a mask.
    ``rope``: this modality's tables from ``DiT.rope``. ``off``: no block changes this modality's hidden states; the
    other one still attends to them (skip steps, spec 08 section 6).
    """

    latents: Tensor
    timesteps: Tensor
    timestep_index: Tensor | None
    sigma: Tensor
    context: Tensor
    rope: RopeTables
    off: bool = False


@dataclass(frozen=True)
class Pass:
    """One of the forwards that guidance combines; passes with the same ``streams`` object share work.

    ``isolated``: no block lets one modality see the other (modality guidance). ``perturbed``: per modality, the
    blocks whose self-attention is replaced by its values (STG).
    """

    streams: AV[Stream]
    isolated: bool = False
    perturbed: AV[frozenset[int]] = UNPERTURBED

    def before(self, block: int, hidden: AV[Tensor], conditioning: AV[Conditioning]) -> PassState:
        """The state of this pass before block number ``block``."""
        return PassState(hidden, conditioning, self.isolated, self.perturbed.map(lambda blocks: block in blocks))


class OuterModules(NamedTuple):
    """One modality's modules and tables before and after the blocks."""

    proj_in: Linear
    time_embed: AdaLayerNormSingle
    prompt_adaln: AdaLayerNormSingle
    cross: AdaLayerNormSingle
    cross_gate: AdaLayerNormSingle
    head_rows: Tensor
    proj_out: Linear


class DiT(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        video, audio = config.streams.video, config.streams.audio
        self.proj_in = Linear(video.in_channels, video.dim)
        self.time_embed = AdaLayerNormSingle(video.dim, 9)
        self.prompt_adaln = AdaLayerNormSingle(video.dim, 2)
        self.av_cross_attn_video_scale_shift = AdaLayerNormSingle(video.dim, 4)
        self.av_cross_attn_video_a2v_gate = AdaLayerNormSingle(video.dim, 1)
        self.scale_shift_table = table(2, video.dim)
        self.proj_out = Linear(video.dim, video.out_channels)

        self.audio_proj_in = Linear(audio.in_channels, audio.dim)
        self.audio_time_embed = AdaLayerNormSingle(audio.dim, 9)
        self.audio_prompt_adaln = AdaLayerNormSingle(audio.dim, 2)
        self.av_cross_attn_audio_scale_shift = AdaLayerNormSingle(audio.dim, 4)
        self.av_cross_attn_audio_v2a_gate = AdaLayerNormSingle(audio.dim, 1)
        self.audio_scale_shift_table = table(2, audio.dim)
        self.audio_proj_out = Linear(audio.dim, audio.out_channels)

        self.transformer_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))

    def rope(self, positions: AV[Tensor], dtype: torch.dtype, device: torch.device | str) -> AV[RopeTables]:
        """Tables for ``positions`` [B, axes, T, 2]: float32 [start, end) bounds, seconds, then pixels (spec 04
        section 2). Computed in float32, rounded to ``dtype``; the same for every forward of a stage.
        """
        video, audio = self.config.streams.video, self.config.streams.audio
        longest = max(video.max_positions[0], audio.max_positions[0])

        def turn(where: Tensor, limits: tuple[int, ...], heads: StreamConfig) -> Rotation:
            made = rotation(where.to(device), limits, heads.heads, heads.head_dim, self.config.rope_theta)
            return Rotation(*(part.to(dtype) for part in made))

        return positions.map(
            lambda where, stream: RopeTables(
                turn(where, stream.max_positions, stream), turn(where[:, :1], (longest,), audio)
            ),
            self.config.streams,
        )

    def forward(
        self, streams: AV[Stream], *, isolated: bool = False, perturbed: AV[frozenset[int]] = UNPERTURBED
    ) -> AV[Tensor]:
        """The velocities of a single :class:`Pass`; see :meth:`passes`."""
        return self.passes([Pass(streams, isolated, perturbed)])[0]

    @torch.inference_mode()
    def passes(self, passes: Sequence[Pass]) -> list[AV[Tensor]]:
        """Velocities [B, T, out_channels] in the model dtype, for each of ``passes``.

        All passes go through a block before the next block starts, so that streamed weights come once for all of them.
        The host never waits for the device. The results are inference tensors: do not change them in place outside
        ``torch.inference_mode``.
        """
        distinct = {id(each.streams): each.streams for each in passes}
        begun = {key: (self._embed(streams), self.condition(streams)) for key, streams in distinct.items()}
        hidden = [begun[id(each.streams)][0] for each in passes]
        conditioning = [begun[id(each.streams)][1] for each in passes]
        del begun  # otherwise the first hidden states would live to the end
        for number, block in enumerate(self.transformer_blocks):
            hidden = block(
                [each.before(number, x, given) for each, x, given in zip(passes, hidden, conditioning, strict=True)]
            )
        return [x.map(self._head, given, self.outer()) for x, given in zip(hidden, conditioning, strict=True)]

    def _embed(self, streams: AV[Stream]) -> AV[Tensor]:
        return streams.map(lambda stream, outer: outer.proj_in(stream.latents), self.outer())

    def condition(self, streams: AV[Stream]) -> AV[Conditioning]:
        """All inputs of the blocks besides the hidden states.

        A modality's own timesteps drive all rows but two: its unmasked sigma drives the prompt rows, and the sigma of
        the *other* modality drives the gate of the attention to it (spec 06 section 2).
        """
        return streams.map(self._condition, AV(streams.audio.sigma, streams.video.sigma), self.outer())

    def _condition(self, stream: Stream, other_sigma: Tensor, outer: OuterModules) -> Conditioning:
        dtype, index = stream.latents.dtype, stream.timestep_index
        scale = self.config.timestep_scale
        timesteps = stream.timesteps * scale
        adaln, embedded = outer.time_embed(timesteps, dtype)
        prompt, _ = outer.prompt_adaln(stream.sigma[:, None] * scale, dtype)
        cross, _ = outer.cross(timesteps, dtype)
        gate_timestep = other_sigma[:, None] * scale * (self.config.cross_gate_timestep_scale / scale)
        cross_gate, _ = outer.cross_gate(gate_timestep, dtype)
        return Conditioning(
            adaln=Rows(adaln, index),
            prompt=Rows(prompt),
            cross=Rows(cross, index),
            cross_gate=Rows(cross_gate),
            embedded=Rows(embedded, index),
            context=stream.context,
            rope=stream.rope,
            off=stream.off,
        )

    def _head(self, x: Tensor, given: Conditioning, outer: OuterModules) -> Tensor:
        rows = given.embedded.plus(outer.head_rows)
        normed = F.layer_norm(x, x.shape[-1:], eps=HEAD_EPS)
        return outer.proj_out(modulate(normed, rows.row(1), rows.row(0)))

    def outer(self) -> AV[OuterModules]:
        """The two modalities' modules and tables under common names."""
        return AV(
            OuterModules(
                self.proj_in,
                self.time_embed,
                self.prompt_adaln,
                self.av_cross_attn_video_scale_shift,
                self.av_cross_attn_video_a2v_gate,
                self.scale_shift_table,
                self.proj_out,
            ),
            OuterModules(
                self.audio_proj_in,
                self.audio_time_embed,
                self.audio_prompt_adaln,
                self.av_cross_attn_audio_scale_shift,
                self.av_cross_attn_audio_v2a_gate,
                self.audio_scale_shift_table,
                self.audio_proj_out,
            ),
        )

    def use_attention(self, kernels: str | Mapping[str, str]) -> None:
        """Attend with this kernel of ``KERNELS``, or with one for each kind of attention, compiled or not.

        Raises KeyError for an unknown name.
        """
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = KERNELS[kernels if isinstance(kernels, str) else kernels[module.kind]]

    def blocks(self) -> list[TransformerBlock]:
        return [block for block in self.transformer_blocks if isinstance(block, TransformerBlock)]

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks; ``options`` go to ``torch.compile``.

        All blocks share the compiled functions, made for any number of tokens, so that neither the 48 blocks nor the
        second stage compile again. Hooks on a block still run outside them; weight streaming needs that.
        """
        functions = BlockFunctions(
            torch.compile(PLAIN.text, **options),
            _for_any_length(torch.compile(PLAIN.attend, **options)),
            _for_any_length(torch.compile(PLAIN.exchange, **options)),
        )
        for block in self.blocks():
            block.functions = functions


def _for_any_length(function: Callable[..., AV[Tensor]]) -> Callable[..., AV[Tensor]]:
    def marked(block: TransformerBlock, hidden: AV[Tensor], conditioning: AV[Conditioning], *others: Any) -> AV[Tensor]:
        hidden.map(_any_length, conditioning)
        return function(block, hidden, conditioning, *others)

    return marked


def _any_length(x: Tensor, given: Conditioning) -> None:
    """Tell the compiler which sizes are numbers of tokens or timesteps; all others are fixed by the model."""
    torch._dynamo.maybe_mark_dynamic(x, 1)
    for part in (*given.rope.self_attention, *given.rope.cross_attention):
        torch._dynamo.maybe_mark_dynamic(part, 2)
    for rows in (given.adaln, given.cross):
        if rows.index is not None:
            torch._dynamo.maybe_mark_dynamic(rows.index, 0)
            torch._dynamo.maybe_mark_dynamic(rows.values, 1)
