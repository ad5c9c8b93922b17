"""What to do instead where a run does not fit, before it is begun or after memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from ltxpack.errors import DeviceError, UsageError
from ltxpack.files.direct import READS
from ltxpack.files.units import gigabytes
from ltxpack.ltx23.classes import SPATIAL_FACTOR, TEMPORAL_FACTOR
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.weights import plan as planner
from ltxpack.runtime.weights import report
from ltxpack.runtime.weights.machine import Machine
from ltxpack.runtime.weights.plan import Plan, Shortage, Work
from ltxpack.runtime.weights.sizes import ModelSizes

TENTH = 10**8
SMALLER = "free memory there, or choose a smaller --height, --width or --num-frames"


def check_mode(mode: str) -> None:
    """Raises UsageError unless ``mode`` is ``auto`` or one of the planner."""
    known = (planner.AUTO, *planner.MODES)
    if mode not in known:
        raise UsageError("unknown residency", expected=", ".join(known), found=mode, next="choose --residency auto")


def check_reads(reads: str) -> None:
    """Raises UsageError unless ``reads`` is one of the ways to read."""
    if reads not in READS:
        raise UsageError("unknown way to read", expected=", ".join(READS), found=reads, next="choose --reads auto")


def plan_or_refuse(model: ModelSizes, work: Work, machine: Machine, mode: str, device: str = "the card") -> Plan:
    """The best plan in ``mode``. Raises DeviceError with GB needed and free, and the flags that would fit."""
    plan = planner.best_plan(model, work, machine, mode)
    if plan is not None:
        return plan
    found = planner.shortage(planner.smallest_plan(model, work, mode), machine)
    assert found is not None
    on_device = machine.card is None or found.memory == "card"
    owner = device if on_device else "the host"
    limit = report.container(machine) if machine.card is None or not on_device else ""
    wanted = "" if mode == planner.AUTO else f"--residency {mode}: "
    weights = f" ({gigabytes(found.phase.weights)} of weights)" if on_device else ""
    raise DeviceError(
        f"{owner} has too little free memory for {wanted}{found.phase.name}",
        # Rounded apart, so that what lacks a little is not told as enough.
        expected=gigabytes(-(-found.needed // TENTH) * TENTH) + weights,
        found=f"{gigabytes(max(found.free, 0) // TENTH * TENTH)} free{limit}",
        next=_instead(model, work, machine, mode, found),
    )


def after_shortage(mode: str, asked: str) -> str:
    """The flag to try after memory ran out in spite of a plan in ``mode``; ``asked`` is the mode that was asked for."""
    if mode == planner.RESIDENT:
        return "the same command with --residency swap"
    if mode == planner.SWAP or asked != planner.STREAM:
        return "the same command with --residency stream"
    return SMALLER


def smaller_work(model: ModelSizes, work: Work, machine: Machine) -> Work | None:
    """The next smaller video that fits in some way: fewer frames first, then a smaller picture too."""
    for shape in _smaller_shapes(work.shape):
        candidate = work.resized(shape)
        if planner.shortage(planner.smallest_plan(model, candidate), machine) is None:
            return candidate
    return None


def _instead(model: ModelSizes, work: Work, machine: Machine, mode: str, lacking: Shortage) -> str:
    other = planner.best_plan(model, work, machine) if mode != planner.AUTO else None
    if other is not None:
        return f"the same command with --residency {other.mode}"
    smaller = smaller_work(model, work, machine)
    if smaller is None:
        if machine.card is None:
            return "ltxpack plan --ram SIZE (free memory, or choose a smaller video or a higher --fps)"
        if lacking.memory == "host":
            return "ltxpack plan --ram SIZE (free memory of the host, or take a host with more)"
        return "ltxpack plan --vram SIZE (take a card with more memory, or the same command with --device cpu)"
    shape = smaller.shape
    sides = f"--height {shape.height} --width {shape.width} --num-frames {shape.frames}"
    return f"the same command with {sides}, or free memory"


def _smaller_shapes(shape: VideoShape) -> Iterator[VideoShape]:
    unit = 2 * SPATIAL_FACTOR
    for share in (1, 0.75, 0.5, 0.25):
        height, width = (max(unit, int(side * share) // unit * unit) for side in (shape.height, shape.width))
        for frames in range(shape.frames, TEMPORAL_FACTOR, -TEMPORAL_FACTOR):
            if (height, width, frames) == (shape.height, shape.width, shape.frames):
                continue
            with suppress(UsageError):  # too short for any sound
                yield VideoShape(frames, height, width, shape.fps)
