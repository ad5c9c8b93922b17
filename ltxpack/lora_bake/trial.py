"""Fuses a few rows of a few weights before a bake, to find the meaning of DoRA's magnitudes and idle LoRAs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ltxpack.files.tensorfile import TensorInfo
from ltxpack.lora_bake.adapter import Adapter, LoraTarget
from ltxpack.lora_bake.fuse import Term, fuse_rows
from ltxpack.lora_bake.plan import BakePlan, Base
from ltxpack.lora_bake.stream import DTYPES, FactorReader
from ltxpack.manifest import BF16
from ltxpack.reporter import Reporter

# The size of a trial: so many weights, spread over all, and the first rows of each.
WEIGHTS, ROWS = 8, 256
# Norms decide between the meanings if they are this many standard errors nearer to one.
CERTAIN = 3.0
# The number of parameters of a straight line.
FITTED = 2


def settled(plans: Sequence[BakePlan], reporter: Reporter) -> list[Adapter]:
    """The adapters of ``plans``, of one base, with the meaning of DoRA's magnitudes decided; a note says which.

    Warns of bakes that change none of the sampled weights, although their LoRAs are not zero.
    """
    adapters = [_settled(lora.adapter, plans[0].base, reporter) for lora in plans[0].loras]
    for plan in plans:
        if plan.form == BF16 and plan.touched:
            _tell_idle(plan, reporter)
    return adapters


def _tell_idle(plan: BakePlan, reporter: Reporter) -> None:
    looked_at = changed = 0
    adapters = [lora.adapter for lora in plan.loras]
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(_reader(adapter)) for adapter in adapters]
        for name, rows in _samples(sorted(plan.touched), adapters, plan.base):
            used = [
                (term.rows(0, len(rows)), strength)
                for reader, strength in zip(readers, plan.strengths_in(name), strict=True)
                if strength and (term := reader.term(name)) is not None and _is_live(term)
            ]
            if used:
                looked_at += rows.numel()
                [fused] = fuse_rows(rows, [term for term, _ in used], [[strength for _, strength in used]], "fp32")
                changed += fused.stat.changed
    if looked_at and not changed:
        reporter.warn(
            f"{plan.folder}: changes nothing: none of {looked_at:,} sampled weights changes, because the sums of "
            "its LoRAs are below what bf16 resolves"
        )


class _Spread(NamedTuple):
    """Sums over rows of ν², x·ν and x², and their number: ν = log(|W+ΔW|/|W|), x = log(dora_scale/|W|), less the means.

    If the magnitudes are norms of the result, x does not depend on ν. If they are factors of W+ΔW over |W|, x = -ν.
    """

    square: float = 0.0
    product: float = 0.0
    other: float = 0.0
    rows: float = 0.0

    def plus(self, nu: Tensor, x: Tensor) -> _Spread:
        nu, x = nu - nu.mean(), x - x.mean()
        sums = ((nu * nu).sum().item(), (x * nu).sum().item(), (x * x).sum().item(), float(len(x)))
        return _Spread(*(a + b for a, b in zip(self, sums, strict=True)))

    @property
    def over_base(self) -> tuple[bool, bool]:
        """Whether the magnitudes are factors over |W|, and whether that is certain."""
        if self.rows <= FITTED or not self.square:
            return False, False
        slope = self.product / self.square
        error = math.sqrt(max(0.0, self.other - slope * self.product) / (self.rows - FITTED) / self.square)
        return slope < -0.5, abs(slope + 0.5) > CERTAIN * error


def _settled(adapter: Adapter, base: Base, reporter: Reporter) -> Adapter:
    names = [name for name, target in sorted(adapter.targets.items()) if _is_ambiguous(target)]
    if not names:
        return adapter
    spread = _Spread()
    with _reader(adapter) as reader:
        for name, rows in _samples(names, [adapter], base):
            term, stored = reader.term(name), rows.float()
            assert term is not None
            term = term.rows(0, len(rows))
            assert term.magnitude is not None
            [fused] = fuse_rows(stored, [replace(term, magnitude=None, over_base=False)], [[1.0]], "fp32")
            before, after = (torch.linalg.vector_norm(each, dim=1).double() for each in (stored, fused.weight))
            magnitude = term.magnitude.double().reshape(-1)
            sound = (before > 0) & (after > 0) & (magnitude > 0)
            if sound.sum() > FITTED:
                nu, x = torch.log(after / before), torch.log(magnitude / before)
                spread = spread.plus(nu[sound], x[sound])
    over_base, certain = spread.over_base
    if not certain:
        over_base = False
    meaning = "factors over |W|" if over_base else "norms, over |W+ΔW|"
    by = "as the norms show" if certain else adapter.dora_by or "which the norms do not tell"
    reporter.note(f"{adapter.path.name}: its dora_scale is taken as {meaning}, {by}")
    targets = {
        name: replace(target, over_base=over_base) if _is_ambiguous(target) else target
        for name, target in adapter.targets.items()
    }
    return replace(adapter, targets=targets)


def _is_ambiguous(target: LoraTarget) -> bool:
    """Whether a target's magnitudes may be over |W| or |W+ΔW|; PEFT's, and those over inputs, are over |W+ΔW|."""
    magnitude = target.tensors.get("magnitude")
    return magnitude is not None and magnitude.name.endswith("dora_scale") and not target.needs_whole


def _is_live(term: Term) -> bool:
    """Whether a term can change anything: no factor of it is all zero."""
    sums = [tensor for tensor in (term.up, term.down, term.delta) if tensor is not None]
    added = bool(sums) and term.factor != 0 and all(tensor.float().count_nonzero() for tensor in sums)
    return added or any(each is not None for each in (term.diff, term.new, term.turn, term.magnitude))


def _reader(adapter: Adapter) -> contextlib.closing[FactorReader]:
    return contextlib.closing(FactorReader(adapter))


def _samples(names: Sequence[str], adapters: Sequence[Adapter], base: Base) -> Iterator[tuple[str, Tensor]]:
    """The first stored rows of some weights; all rows if a row of the result depends on others."""
    chosen = [names[i * len(names) // min(WEIGHTS, len(names))] for i in range(min(WEIGHTS, len(names)))]
    targets = [(name, adapter.targets[name]) for adapter in adapters for name in chosen if name in adapter.targets]
    whole = {name for name, target in targets if target.needs_whole}
    for shard in base.shards:
        with shard.file.path.open("rb") as file:
            for name in (name for name in chosen if name in shard.file.tensors):
                info: TensorInfo = shard.file.tensors[name]
                count = info.shape[0] if name in whole else min(ROWS, info.shape[0])
                file.seek(info.start)
                data = bytearray(file.read(info.nbytes // info.shape[0] * count))
                yield name, torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(count, *info.shape[1:])
