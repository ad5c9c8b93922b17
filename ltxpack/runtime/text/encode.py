"""Prompts to contexts: from those encoded ahead, from the cache on disk, else through Gemma and the connectors.

A batch is the prompts that are encoded together, officially ``(prompt, negative prompt)``; its result never depends on
other batches. Many batches use one load of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltxpack.errors import DeviceError, LtxpackError
from ltxpack.reporter import Reporter
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.text import gemma as text
from ltxpack.runtime.text.prompt_cache import Contexts, PromptCache, backend, batch_key
from ltxpack.runtime.weights.keeper import Residency

if TYPE_CHECKING:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from transformers import Gemma3TextModel

Batch = tuple[str, ...]
PARTS = ("tokenizer", "text_encoder", "connectors")


@dataclass
class PromptEncoder:
    """Contexts of batches of prompts, on ``residency.device``; with ``cache`` None it keeps nothing on disk."""

    overlay: Overlay
    residency: Residency
    cache: PromptCache | None
    _ahead: dict[Batch, Contexts] = field(default_factory=dict)
    _cache_failed: bool = False

    def contexts(self, batch: Batch, reporter: Reporter) -> Contexts:
        """Video and audio context ``[1, 1024, D]`` of each prompt of ``batch``. Raises LtxpackError."""
        device = self.residency.device
        return [context.map(lambda t: t.to(device)) for context in self._find([batch], reporter)[batch]]

    def encode_ahead(self, batches: Sequence[Batch], reporter: Reporter) -> None:
        """Keep the contexts of all ``batches`` on the host until the next call. Raises LtxpackError."""
        self._ahead = {batch: known for batch, known in self._ahead.items() if batch in batches}
        self._ahead = self._find(batches, reporter)

    def held(self, batch: Batch) -> Contexts:
        """The contexts of a ``batch`` that was encoded ahead, on the host."""
        return self._ahead[batch]

    def hold(self, batch: Batch, contexts: Contexts) -> None:
        """Keep the ``contexts`` of ``batch``, in place of all others if they come from elsewhere."""
        if batch not in self._ahead:
            self._ahead = {batch: contexts}

    @property
    def ahead(self) -> int:
        """The number of batches whose contexts are on the host."""
        return len(self._ahead)

    def forget(self) -> None:
        """Drop the contexts that were encoded ahead."""
        self._ahead = {}

    def _find(self, batches: Sequence[Batch], reporter: Reporter) -> dict[Batch, Contexts]:
        found: dict[Batch, Contexts] = {}
        for batch in dict.fromkeys(batches):
            known = self._ahead.get(batch) or self._cached(batch, reporter)
            if known is not None:
                found[batch] = known
        missing = [batch for batch in dict.fromkeys(batches) if batch not in found]
        if missing:
            for batch, contexts in zip(missing, self._encode(missing, reporter), strict=True):
                found[batch] = contexts
                self._keep(batch, contexts, reporter)
        return found

    def _cached(self, batch: Batch, reporter: Reporter) -> Contexts | None:
        """The cached contexts, or None; a damaged entry counts as none and is written again."""
        if self.cache is None:
            return None
        try:
            found = self.cache.get(self._key(batch), len(batch), self.residency.dtype)
        except (LtxpackError, OSError) as error:
            told = error.render() if isinstance(error, LtxpackError) else str(error)
            reporter.detail(f"an encoded prompt in the cache cannot be used and is encoded again: {told}")
            return None
        if found is not None:
            reporter.detail(f"encoded prompts read from {self.cache.folder}")
        return found

    def _keep(self, batch: Batch, contexts: Contexts, reporter: Reporter) -> None:
        if self.cache is None or self._cache_failed:
            return
        try:
            self.cache.put(self._key(batch), contexts)
        except OSError as error:
            self._cache_failed = True
            reporter.warn(
                f"{self.cache.folder}: encoded prompts cannot be kept ({error.strerror or error}); "
                "set LTXPACK_CACHE to a folder that can be written, or give --no-cache"
            )

    def _key(self, batch: Batch) -> str:
        records = [record for part in PARTS for record in self.overlay.records(part)]
        return batch_key(batch, records, self.residency.dtype, backend(self.residency.device))

    def _encode(self, batches: Sequence[Batch], reporter: Reporter) -> list[Contexts]:
        """Each batch through Gemma and the connectors.

        For several batches both are on the device together; for a single one the connectors take Gemma's place, and
        its hidden states stay on the device.
        """
        reporter.begin("text", sum(map(len, batches)), "prompt")
        self.overlay.check(self.overlay.records("tokenizer"))
        tokenizer = text.load_tokenizer(self.overlay.folder("tokenizer"))

        def hidden(batch: Batch, encoder: Gemma3TextModel) -> list[text.HiddenStates]:
            return text.hidden_states(batch, tokenizer, encoder)

        def connect(states: list[text.HiddenStates], connectors: LTX2TextConnectors) -> Contexts:
            return [_connect(each, connectors, reporter) for each in states]

        def connect_all(connectors: LTX2TextConnectors) -> list[Contexts]:
            return with_encoder(lambda encoder: [connect(hidden(batch, encoder), connectors) for batch in batches])

        with_encoder = partial(self.residency.use, "text_encoder", text.load_text_encoder)
        with_connectors = partial(self.residency.use, "connectors", text.load_connectors)
        if len(batches) == 1:
            states = with_encoder(partial(hidden, batches[0]))
            found = [with_connectors(partial(connect, states))]
        else:
            found = with_connectors(connect_all)
        reporter.end()
        return found


def _connect(hidden: text.HiddenStates, connectors: LTX2TextConnectors, reporter: Reporter) -> AV[Tensor]:
    """The contexts of one prompt, on the host."""
    found = text.contexts(hidden, connectors).map(Tensor.cpu)
    if not all(part.isfinite().all() for part in (found.video, found.audio)):
        import transformers

        raise DeviceError(
            "the text encoder or the connectors give numbers that are not finite",
            found=f"{connectors.device}, torch {torch.__version__}, transformers {transformers.__version__}",
            expected="finite ones, as every sound overlay gives",
            next="ltxpack verify OVERLAY (if that finds nothing, try other versions of torch and transformers)",
        )
    reporter.advance()
    return found
