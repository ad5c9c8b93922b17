"""Prompts to contexts: from what was encoded ahead, from the cache on disk, else through Gemma and the connectors.

A batch is the prompts encoded together, officially ``(prompt, negative prompt)``; a result never depends on which other
batches were asked for with it. Many batches pass through one load of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from torch import Tensor
from transformers import Gemma3TextModel, PreTrainedTokenizerFast

from ltxpack.errors import DeviceError, LtxpackError
from ltxpack.manifest import FileRecord
from ltxpack.reporter import Reporter
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.sampling.av import AV
from ltxpack.runtime.text import gemma as text
from ltxpack.runtime.text.prompt_cache import Contexts, PromptCache, backend, batch_key
from ltxpack.runtime.weights.activations import HIDDEN_BYTES
from ltxpack.runtime.weights.keeper import Residency

Batch = tuple[str, ...]
PARTS = ("tokenizer", "text_encoder", "connectors")


@dataclass
class PromptEncoder:
    """Contexts of batches of prompts, on ``residency.device``; ``cache`` None: nothing is kept on disk."""

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
        """Have the contexts of all ``batches`` ready on the host, until the next call of this. Raises LtxpackError."""
        self._ahead = {batch: known for batch, known in self._ahead.items() if batch in batches}
        self._ahead = self._find(batches, reporter)

    @property
    def ahead(self) -> int:
        """How many batches have their contexts ready on the host."""
        return len(self._ahead)

    def forget(self) -> None:
        """Let go of what was encoded ahead."""
        self._ahead = {}

    def _find(self, batches: Sequence[Batch], reporter: Reporter) -> dict[Batch, Contexts]:
        """The contexts of each batch, on the host."""
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
        """What the cache has; a damaged entry counts as none and is written anew."""
        if self.cache is None:
            return None
        try:
            found = self.cache.get(self._key(batch), len(batch), self.residency.dtype)
        except (LtxpackError, OSError) as error:
            told = error.render() if isinstance(error, LtxpackError) else str(error)
            reporter.detail(f"an encoded prompt in the cache cannot be used and is encoded anew: {told}")
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
        """Through Gemma, then the connectors; in several turns only where the hidden states would fill the host."""
        reporter.begin("text", sum(map(len, batches)), "prompt")
        self.overlay.check(self.overlay.records("tokenizer"))
        tokenizer = text.load_tokenizer(self.overlay.folder("tokenizer"))
        done: list[Contexts] = []
        plan = self.residency.plan
        room = HIDDEN_BYTES if plan is None else plan.hidden

        def read(encoder: Gemma3TextModel) -> list[list[text.HiddenStates]]:
            return _hidden_states(batches[len(done) :], tokenizer, encoder, room)

        def connect(connectors: LTX2TextConnectors) -> list[Contexts]:
            return [[_connect(states, connectors, reporter) for states in batch] for batch in hidden]

        while len(done) < len(batches):
            hidden = self.residency.borrow(*self._part("text_encoder"), text.load_text_encoder, read)
            done += self.residency.borrow(*self._part("connectors"), text.load_connectors, connect)
        reporter.end()
        return done

    def _part(self, component: str) -> tuple[Path, tuple[FileRecord, ...]]:
        return self.overlay.folder(component), self.overlay.records(component)


def _hidden_states(
    batches: Sequence[Batch], tokenizer: PreTrainedTokenizerFast, encoder: Gemma3TextModel, room: int
) -> list[list[text.HiddenStates]]:
    """The hidden states of the first batches: each but the last when ``room`` bytes were enough for those before it.

    On the host, without padding.
    """
    kept: list[list[text.HiddenStates]] = []
    size = 0
    for batch in batches:
        kept.append([_without_padding(hidden) for hidden in text.hidden_states(batch, tokenizer, encoder)])
        size += sum(hidden.states.nbytes for hidden in kept[-1])
        if size > room:
            break
    return kept


def _without_padding(hidden: text.HiddenStates) -> text.HiddenStates:
    """On the host. What Gemma makes of padding is dropped: the connectors put zeros there before they look at it."""
    count = int(hidden.mask.sum())
    return text.HiddenStates(hidden.states[:, -count:].to("cpu", copy=True), hidden.mask.cpu())


def _connect(hidden: text.HiddenStates, connectors: LTX2TextConnectors, reporter: Reporter) -> AV[Tensor]:
    """One prompt's contexts, on the host."""
    states = hidden.states.to(connectors.device)
    _, count, width, layers = states.shape
    padding = states.new_zeros(1, hidden.mask.shape[1] - count, width, layers)
    contexts = text.contexts(text.HiddenStates(torch.cat([padding, states], dim=1), hidden.mask), connectors)
    found = contexts.map(Tensor.cpu)
    if not all(part.isfinite().all() for part in (found.video, found.audio)):
        raise DeviceError(
            "the text encoder or the connectors give numbers that are not finite",
            found=f"{connectors.device}, torch {torch.__version__}, transformers {transformers.__version__}",
            expected="finite ones, as every sound overlay gives",
            next="ltxpack verify OVERLAY (if that finds nothing, try other versions of torch and transformers)",
        )
    reporter.advance()
    return found
