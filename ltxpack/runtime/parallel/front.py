"""The transformer of one of several ranks: makes its share of the passes of a step, and of the tokens of a pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltxpack.runtime.model.model import DiT, Pass
from ltxpack.runtime.parallel.exchange import Exchange
from ltxpack.runtime.parallel.schemes import Split
from ltxpack.runtime.parallel.sequence import OwnTokens
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
