"""The ranks that make one video together, as one of them sees them.

Every rank runs the same recipe on its own device, with all weights of its own. Rank 0 hands out requests and text
contexts. The ranks share the passes of a step and the tokens of a pass as :mod:`schemes` says. The velocities go to all
ranks, so their latents stay equal without any other exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltxpack.errors import DeviceError
from ltxpack.runtime.codecs.video import DecodeTiles, VideoVAE, decode_tile, decode_tiles, decoded_shape
from ltxpack.runtime.model import kernels, quantised
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.kernels import AttentionKind, KernelChoice
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.parallel.exchange import Exchange
from ltxpack.runtime.parallel.front import Front
from ltxpack.runtime.parallel.schemes import AUTO, WHOLE, Counted, Rates, Split, as_shared, shared
from ltxpack.runtime.sampling.guidance import Model
from ltxpack.runtime.text.prompt_cache import Contexts
from ltxpack.runtime.torch_settings import rounding
from ltxpack.runtime.weights.plan import Work


@dataclass(frozen=True)
class Numerics:
    """The choices of a device that change the rounding of a video besides its settings, and torch's own settings.

    All ranks use the choices of rank 0, whatever they would choose on their own devices. ``attention``: the kernels.
    ``faults``: dtype of codes -> why they are not multiplied, None if they are. ``rounding``: torch's settings.
    """

    attention: KernelChoice
    faults: Mapping[str, str | None]
    rounding: Mapping[str, Any]

    @classmethod
    def of(cls, attention: KernelChoice, fp8: str, device: torch.device, dtype: torch.dtype) -> Numerics:
        """The present numerics of ``device`` in ``dtype``; ``fp8``: the mode of fp8 linears."""
        return cls(attention, quantised.faults(fp8, device, dtype), rounding())

    def check(self, kinds: Sequence[AttentionKind]) -> None:
        """Raises DeviceError if the device of ``kinds`` cannot use these attention kernels; the model checks codes."""
        for kind in kinds:
            name = self.attention.kernels[kind.name]
            why = kernels.fault(kind, name)
            if why is not None:
                problem = f"{kind.device} cannot attend by {name}, which rank 0 chose"
                advice = f"the same command with --attention {kernels.DEFAULT}"
                raise DeviceError(problem, found=why, next=advice)


class Alone:
    """One process on one device: nothing is handed out."""

    def together(self, work: Work, numerics: Callable[[], Numerics], *arguments: Any) -> AbstractContextManager[None]:
        """A block in which all ranks do ``work`` by the ``numerics`` of rank 0; the other ranks get ``arguments``."""
        return nullcontext()

    def contexts(self, make: Callable[[], Contexts]) -> Contexts:
        """The text contexts that rank 0 gets from ``make``, on this rank's device."""
        return make()

    def share(self, work: Work) -> Work:
        """``work`` as this rank has it. Afterwards its device has the memory free that it has when that begins."""
        return work

    def front(self, model: DiT, stage: int) -> Model:
        """``model`` for the denoiser of stage number ``stage``."""
        return model

    def decoding(self, latents: Tensor) -> AbstractContextManager[DecodeTiles]:
        """A block in which rank 0 decodes the official tiles of ``latents`` by the function that it gets."""
        return nullcontext(decode_tiles)

    def close(self) -> None:
        """The session is over, for all ranks."""


ALONE = Alone()


class Member(Alone):
    """One of several ranks. All know the same, so all choose the same."""

    exchange: Exchange
    rates = Rates()

    def __init__(self, parallel: str, size: int, config: DiTConfig, dtype: torch.dtype) -> None:
        self._parallel, self._size, self._config, self._itemsize = parallel, size, config, dtype.itemsize
        self._splits: tuple[Split, ...] = ()

    def joined(self, exchange: Exchange, device: torch.device) -> None:
        """Keep ``exchange``; if the choice depends on it, measure with all ranks what cards and links do."""
        self.exchange = exchange
        if self._parallel == AUTO and device.type == "cuda":
            self.rates = exchange.rates()
            torch.cuda.empty_cache()

    def choose(self, work: Work) -> Counted:
        """Choose how the stages of ``work`` are shared out from now on."""
        found = self._found(work)
        self._splits = found.splits
        return found

    def share(self, work: Work) -> Work:
        return as_shared(work, self._found(work).splits)

    def _found(self, work: Work) -> Counted:
        return shared(self._parallel, self._config, work, self._size, self._itemsize, self.rates)

    @torch.no_grad()
    def tiles(self, vae: VideoVAE, tiles: Iterable[Tensor]) -> Iterator[Tensor]:
        """:func:`.decode_tiles` by all ranks in turn: rank 0 yields every tile, the others send theirs."""
        exchange = self.exchange
        for number, tile in enumerate(tiles):
            owner = number % exchange.size
            if owner == exchange.rank:
                made = decode_tile(vae, tile)
                if owner == 0:
                    yield made
                else:
                    exchange.send(made.contiguous(), 0)
            elif exchange.rank == 0:
                yield exchange.receive(tile.new_empty(decoded_shape(vae, tile)), owner)

    def front(self, model: DiT, stage: int) -> Model:
        split = self._splits[stage]
        return model if split == WHOLE else Front(model, self.exchange, split)
