"""A run on several devices, scheme by scheme: the memory of each device, the bytes that move, the gain.

Each device is planned as one process with its own card and a share of the host. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ltxpack.errors import DeviceError
from ltxpack.files.units import gigabytes, human_bytes
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.parallel.schemes import (
    DATA,
    OF_MANY,
    OF_ONE,
    STAGES,
    WHOLE,
    Counted,
    as_shared,
    counted,
    stage_flops,
    unused,
)
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.weights.machine import Machine
from ltxpack.runtime.weights.plan import Plan, Work
from ltxpack.runtime.weights.report import plan_or_refuse
from ltxpack.runtime.weights.sizes import ModelSizes

# The phases of the first and of the second device of a stage pipeline.
OF_STAGES = (
    frozenset({"text", "connectors", "images", stage_label(0)}),
    frozenset({"upsample", stage_label(1), "sound", "video"}),
)
# Bytes of a card for NCCL's buffers; not measured.
EXCHANGES = 1_000_000_000
NOT_COUNTED = "Counted, not measured: gains leave out text, sound and frames, and the time in which bytes move."


@dataclass(frozen=True)
class PlannedScheme:
    """A scheme on several devices. ``plans``: of each device, or of one if all are alike; none if ``problem`` says why
    the scheme cannot be used. ``why``: the sum from which the gain follows.
    """

    scheme: str
    counted: Counted | None
    plans: tuple[Plan, ...]
    why: str
    problem: str = ""

    @property
    def made_for(self) -> str:
        """For what the scheme is."""
        return "one video" if self.scheme in OF_ONE else "many videos"


@dataclass(frozen=True)
class PlannedSchemes:
    """``count`` devices, each of them a ``machine``: its card, and its share of the host's memory."""

    count: int
    machine: Machine
    work: Work
    shares: tuple[float, ...]
    schemes: tuple[PlannedScheme, ...]


def plan_schemes(
    model: ModelSizes, config: DiTConfig, work: Work, machine: Machine, devices: int, mode: str
) -> PlannedSchemes:
    """All schemes on so many devices of one host, ``machine``, which has the smallest of the cards."""
    each = replace(machine, host=machine.host // devices)
    exchanging = 0 if machine.card is None else EXCHANGES

    def planned(scheme: str) -> PlannedScheme:
        found = counted(scheme, config, work, devices, model.itemsize)
        if found is None:
            return PlannedScheme(scheme, None, (), "", unused(scheme, config, work, devices))
        own, works = each, [work]
        if scheme == STAGES:
            works = [replace(work, only=only) for only in OF_STAGES]
        if scheme in OF_ONE:
            own, works = replace(each, context=each.context + exchanging), [as_shared(work, found.splits)]
        why = _why(config, work, found)
        try:
            plans = tuple(plan_or_refuse(model, one, own, mode, "each device") for one in works)
        except DeviceError as error:
            return PlannedScheme(scheme, found, (), why, f"{error.problem}: {error.expected} needed, {error.found}")
        return PlannedScheme(scheme, found, plans, why)

    flops = [stage_flops(config, work, stage, WHOLE) for stage in work.stages]
    shares = tuple(one / sum(flops) for one in flops)
    return PlannedSchemes(devices, each, work, shares, tuple(map(planned, (*OF_ONE, *OF_MANY))))


def _why(config: DiTConfig, work: Work, found: Counted) -> str:
    """``1 / (0.68 · 0.67 + 0.32)``: each stage's share of the work, and the busiest device's share of that."""
    if found.scheme == DATA:
        return "each device makes videos of its own"
    if found.scheme == STAGES:
        return f"1 / {max(found.shares):.2f}: the other stage is made meanwhile, of the video before or after"
    terms = []
    for stage, split, share in zip(work.stages, found.splits, found.shares, strict=True):
        part = stage_flops(config, work, stage, split) / stage_flops(config, work, stage, WHOLE)
        terms.append(f"{share:.2f}" if split == WHOLE else f"{share:.2f} · {part:.2f}")
    return f"1 / ({' + '.join(terms)})"


def lines(planned: PlannedSchemes, link_rate: int) -> Iterator[str]:
    """The schemes as a table, and the sums of their gains; ``link_rate``: bytes a second between devices."""
    machine, work = planned.machine, planned.work
    card = "" if machine.card is None else f"{gigabytes(machine.card)} of card and "
    yield f"{planned.count} devices, for each {card}{gigabytes(machine.host)} of the host"
    yield "  " + "; ".join(
        f"{stage_label(number)} is {stage.evaluations * stage.passes} passes of {stage.shape.tokens} video tokens,"
        f" {share:.0%} of the work"
        for number, (stage, share) in enumerate(zip(work.stages, planned.shares, strict=True))
    )
    yield f"  {'scheme':<9} {'for':<11}  {'gain':<5}  {'mode':<8} {'card':>19} {'host':>19}  comes to a card, a video"
    for one in planned.schemes:
        row = _row(one, link_rate) if one.plans else f"-      {one.problem}"
        yield f"  {one.scheme:<9} {one.made_for:<11}  {row}"
    for one in planned.schemes:
        if one.plans:
            yield f"  {one.scheme:<9} {one.why}"
    yield f"  {NOT_COUNTED} Seconds are at {human_bytes(link_rate)}/s."


def _row(one: PlannedScheme, link_rate: int) -> str:
    assert one.counted is not None
    modes, cards, hosts = cells(one.plans)
    received = one.counted.received
    moved = f"{human_bytes(received)}, {received / link_rate:.1f} s" if received else "-"
    return f"{one.counted.gain:.2f}x  {modes:<8} {cards:>19} {hosts:>19}  {moved}"


def cells(plans: Sequence[Plan]) -> tuple[str, str, str]:
    """Modes, peaks of cards and of shares of the host, in words; of each device if they differ."""
    modes = " and ".join(dict.fromkeys(plan.mode for plan in plans))
    cards = " and ".join(gigabytes(plan.card) for plan in plans)
    return modes, cards, " and ".join(gigabytes(plan.host) for plan in plans)


def to_json(planned: PlannedSchemes, link_rate: int) -> dict[str, Any]:
    """The part ``devices`` of ``ltxpack plan --json``; schemas/plan.schema.json describes it. All sizes in bytes."""
    return {
        "count": planned.count,
        "link_rate": link_rate,
        "machine": {"card": planned.machine.card, "host": planned.machine.host},
        "work": [
            {"passes": stage.evaluations * stage.passes, "video_tokens": stage.shape.tokens, "share": share}
            for stage, share in zip(planned.work.stages, planned.shares, strict=True)
        ],
        "schemes": [
            {
                "scheme": one.scheme,
                "for": one.made_for,
                "gain": None if one.counted is None else one.counted.gain,
                "follows_from": one.why,
                "received": None if one.counted is None else _read(one.counted.received, link_rate),
                "devices": [{"mode": plan.mode, "card": plan.card, "host": plan.host} for plan in one.plans],
                "problem": one.problem or None,
            }
            for one in planned.schemes
        ],
    }


def _read(count: int, rate: int) -> dict[str, Any]:
    return {"bytes": count, "seconds": count / rate}
