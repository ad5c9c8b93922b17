"""The transformer of one of several ranks: makes its share of the passes of a step, and of the tokens of a pass.

One pass by several ranks is DeepSpeed-Ulysses (Jacobs et al., 2023): each has some of the video's tokens, and in
attention some of the heads of all tokens. Text and sound are on every rank, so only two attentions of a block are not
local. Around the video's self-attention, queries, keys and values go from tokens to heads, and the result goes back.
The sound attends to the video head by head too, and its heads are gathered. Timesteps and rotations are cut as the
tokens are. Tokens are padded to the same number on each rank; attention leaves the padding out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ltxpack.runtime.model.model import DiT, Pass, Stream
from ltxpack.runtime.model.rope import RopeTables, Rotation
from ltxpack.runtime.parallel.exchange import Exchange
from ltxpack.runtime.parallel.schemes import Split
from ltxpack.runtime.sampling.shape import AV


class Front:
    """Shares out the passes of a step over groups of ranks, and the tokens of a pass over the ranks of its group.

    The numbers of a pass do not depend on the passes made with it: groups of one rank give the velocities of one
    device, bit for bit.
    """

    def __init__(self, model: DiT, exchange: Exchange, split: Split) -> None:
        self._model, self._exchange, self._split = model, exchange, split
        group = exchange.rank // split.shards
        self._group = group if group < split.groups else None
        self._own = OwnTokens(exchange, split) if split.shards > 1 else None

    def passes(self, passes: Sequence[Pass], /) -> list[AV[Tensor]]:
        """:meth:`.model.DiT.passes` of all ranks. Raises DeviceError if another rank has ended.

        Cards of several kinds draw different noise: each then takes rank 0's latents.
        """
        if not self._exchange.alike:
            streams = [stream for each in passes for stream in (each.streams.video, each.streams.audio)]
            for latents in {id(stream.latents): stream.latents for stream in streams}.values():
                self._exchange.broadcast(latents, 0)
        groups = [number % self._split.groups for number in range(len(passes))]
        own = [each for each, group in zip(passes, groups, strict=True) if group == self._group]
        made = iter(self._made(own) if own else [])
        return [
            self._shared(each, group, next(made) if group == self._group else None)
            for each, group in zip(passes, groups, strict=True)
        ]

    def _made(self, passes: Sequence[Pass]) -> list[AV[Tensor]]:
        """The velocities of this rank's share of ``passes``."""
        mine = self._own
        if mine is None:
            return self._model.passes(passes)
        # Passes with the same streams share work: they keep the same ones.
        cut = {id(each.streams): mine.cut(each.streams) for each in passes}
        own = [Pass(cut[id(each.streams)], each.isolated, each.perturbed) for each in passes]
        with mine.attending(self._model, passes[0].streams.video.latents.shape[1]):
            return self._model.passes(own)

    def _shared(self, each: Pass, group: int, made: AV[Tensor] | None) -> AV[Tensor]:
        """The velocities of a pass of ``group``. ``made``: this rank's share, if the group is its own."""
        video, audio = each.streams.video.latents, each.streams.audio.latents
        tokens, first = video.shape[1], group * self._split.shards
        channels = self._model.config.streams.map(lambda stream: stream.out_channels)

        def sent(part: Tensor | None, owner: int, tokens: int, channels: int) -> Tensor:
            if part is None or owner != self._exchange.rank:
                part = video.new_empty((len(video), tokens, channels))
            return self._exchange.broadcast(part.contiguous(), owner)

        pictures, sound = (None, None) if made is None else (made.video, made.audio)
        owners = range(first, first + self._split.shards)
        parts = [sent(pictures, owner, self._split.own(tokens), channels.video) for owner in owners]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)[:, :tokens]
        return AV(whole, sent(sound, first, audio.shape[1], channels.audio))


class OwnTokens:
    """The tokens and the heads of this rank, one of the ``split.shards`` of its group."""

    # To the compiler, a kernel has tensors alone as inputs: it finds the tokens of this rank here.
    current: ClassVar[OwnTokens]

    def __init__(self, exchange: Exchange, split: Split) -> None:
        self._exchange, self._group = exchange, exchange.group(split)
        self._split, self._shards, self._place = split, split.shards, exchange.rank % split.shards
        self._tokens = 0
        self._rope: tuple[RopeTables, RopeTables] | None = None

    def cut(self, streams: AV[Stream]) -> AV[Stream]:
        """``streams`` with this rank's tokens of the video, and all of the sound."""
        video, rope = streams.video, streams.video.rope
        if self._rope is None or self._rope[0] is not rope:
            self._rope = rope, RopeTables(self._turns(rope.self_attention), self._turns(rope.cross_attention))
        index = video.timestep_index
        own = replace(
            video,
            latents=self._part(video.latents, 1),
            timestep_index=None if index is None else self._part(index, 0),
            rope=self._rope[1],
        )
        return AV(own, streams.audio)

    @contextmanager
    def attending(self, model: DiT, tokens: int) -> Iterator[None]:
        """A block in which ``model`` attends over the ranks of the group; ``tokens``: of the video, without padding."""
        blocks = model.blocks()
        plain = [(block.attn1.kernel, block.video_to_audio_attn.kernel) for block in blocks]
        self._tokens, (self._within, self._across) = tokens, plain[0]
        OwnTokens.current = self
        for block in blocks:
            block.attn1.kernel, block.video_to_audio_attn.kernel = _to_itself, _to_the_sound
        try:
            yield
        finally:
            for block, kernels in zip(blocks, plain, strict=True):
                block.attn1.kernel, block.video_to_audio_attn.kernel = kernels

    def to_itself(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """This rank's tokens [B, heads, own, head_dim] attend to all: [B, own, heads, head_dim]."""
        attended = self._within(*self._heads(query, key, value))
        padding = query.shape[2] * self._shards - self._tokens
        parts = F.pad(attended, (0, 0, 0, padding)).permute(2, 0, 1, 3).contiguous()
        got = self._exchange.all_to_all(parts.unflatten(0, (self._shards, -1)), self._group)
        return got.permute(2, 1, 0, 3, 4).flatten(2, 3).contiguous()

    def to_the_sound(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The sound's tokens [B, heads, T, head_dim] attend to those of all ranks: [B, T, heads, head_dim]."""
        own = query.unflatten(1, (self._shards, -1))[:, self._place]
        attended = self._across(own, *self._heads(key, value)).contiguous()
        got = self._exchange.all_gather(attended, self._group)
        return got.permute(1, 3, 0, 2, 4).flatten(2, 3).contiguous()

    def _heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Each [B, heads, own, head_dim] with all heads -> [B, own heads, T, head_dim] with all tokens."""
        divided = [part.unflatten(1, (self._shards, -1)).permute(1, 3, 0, 2, 4) for part in parts]
        got = self._exchange.all_to_all(torch.stack(divided, dim=2), self._group)
        return got.flatten(0, 1)[: self._tokens].permute(1, 2, 3, 0, 4).unbind()

    def _turns(self, rotation: Rotation) -> Rotation:
        return Rotation(*(self._part(part, 2).contiguous() for part in rotation))

    def _part(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's stretch of dimension ``dim``, padded with zeros."""
        count, own = whole.shape[dim], self._split.own(whole.shape[dim])
        start = min(self._place * own, count)
        part = whole.narrow(dim, start, min(own, count - start))
        return F.pad(part, (0, 0) * (whole.dim() - 1 - dim) + (0, own - part.shape[dim]))


def _attended(query: Tensor, key: Tensor, value: Tensor, sound: bool) -> Tensor:
    attend = OwnTokens.current.to_the_sound if sound else OwnTokens.current.to_itself
    return attend(query, key, value)


# One opaque node to the compiler, which need not know exchanges and numbers of tokens.
_op = torch.library.custom_op(
    "ltxpack::attend_over_ranks",
    _attended,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, bool sound) -> Tensor",
)


@_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, sound: bool) -> Tensor:
    batch, heads, tokens, width = query.shape
    return query.new_empty((batch, tokens, heads, width))


def _to_itself(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _over_ranks(query, key, value, False)


def _to_the_sound(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _over_ranks(query, key, value, True)


def _over_ranks(*arguments: Any) -> Tensor:
    # Not the op where nothing is compiled: its first call imports the compiler, which takes seconds.
    attend = _op if torch.compiler.is_compiling() else _attended
    found: Tensor = attend(*arguments)
    return found.transpose(1, 2)
