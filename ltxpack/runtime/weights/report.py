"""A plan in words, as a table and as JSON; and what to do instead where a run does not fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ltxpack.errors import DeviceError, UsageError
from ltxpack.files.units import gigabytes
from ltxpack.ltx23.classes import SPATIAL_FACTOR, TEMPORAL_FACTOR
from ltxpack.runtime.codecs.tiles import FAST, OFFICIAL, Tiles, Tiling, auto_tiling
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.settings import AUTO, RESIDENT, STREAM, SWAP
from ltxpack.runtime.weights import plan as planner
from ltxpack.runtime.weights.machine import Machine
from ltxpack.runtime.weights.plan import CARD, FILE, HOST, Need, Placement, Plan, Work
from ltxpack.runtime.weights.sizes import SMALL_PARTS, TEXT_ENCODER, ModelSizes

# The place of a transformer that is not on the card, by its word in plan.schema.json.
WHENCE = {
    "kept": "both stages' weights stay in pinned host memory",
    "staged": "the next stage's weights are read into pinned host memory while one stage runs",
    "disk": "each stage's weights are read from disk when it begins",
    "blocks": "from pinned host memory, filled anew for each stage",
    "file": "from the file, each time again",
}
# How much of the text encoder is on the card while it encodes, by the source of its layers.
TEXT_WORDS = {"": "whole", HOST: "layers", FILE: "layers from file"}
TENTH = 10**8


@dataclass(frozen=True)
class Command:
    """A command to type; ``done``: it was already."""

    text: str
    done: bool


def described(plan: Plan) -> str:
    """What stays where, in a sentence."""
    placed = plan.placements[plan.work.transformer_parts[0]]
    if placed.home == CARD:
        stay = "both transformers stay" if len(plan.work.own_stages) > 1 else "the transformer stays"
        parts = [f"{stay} on the device"]
    elif not placed.source:
        parts = ["one transformer on the device at a time", WHENCE[_word(placed)]]
    else:
        whence = "from pinned host memory" if placed.home == HOST else WHENCE[_word(placed)]
        parts = [f"{_of_each(plan, streamed_blocks(plan), totals=True)} pass through two slots on the device", whence]
        held = held_blocks(plan)
        if any(held):
            parts.append(f"{_of_each(plan, held)} stay in pinned host memory between videos")
    if _small_parts_stay(plan):
        parts.append("the small parts stay on the device")
    text = plan.placements.get(TEXT_ENCODER, Placement())
    if text.source:
        parts.append("the text encoder layer by layer" + (" from its file" if text.source == FILE else ""))
    return ", ".join(parts)


def streamed_blocks(plan: Plan) -> list[int]:
    """How many blocks of each stage's transformer pass through the slots."""
    return [len(plan.placements[stage.part].streamed) for stage in plan.work.own_stages.values()]


def held_blocks(plan: Plan) -> list[int]:
    """How many blocks of each stage's transformer stay in pinned memory between uses."""
    return [len(plan.placements[stage.part].held) for stage in plan.work.own_stages.values()]


def _word(placed: Placement) -> str:
    if placed.home == HOST:
        return "kept"
    if placed.source:
        return "blocks" if placed.source == HOST else "file"
    return "staged" if placed.ahead else "disk"


def _small_parts_stay(plan: Plan) -> bool:
    return all(plan.placements[part].home == CARD for part in SMALL_PARTS if part in plan.placements)


def _of_each(plan: Plan, counts: Sequence[int], totals: bool = False) -> str:
    """``17 of 48 blocks of stage 1 and 27 of 48 blocks of stage 2``."""
    found: list[str] = []
    for (number, stage), count in zip(plan.work.own_stages.items(), counts, strict=True):
        of = f" of {plan.blocks[stage.part]}" if totals else ""
        blocks = "" if found and not totals else " blocks"
        found.append(f"{count}{of}{blocks} of stage {number + 1}")
    return " and ".join(found) if len(found) < 3 else ", ".join(found[:-1]) + " and " + found[-1]


def _limit(machine: Machine) -> str:
    """What to add to the host's free memory if a container bounds it."""
    return " (the limit of a container)" if machine.container else ""


def lines(plan: Plan, machine: Machine) -> list[str]:
    """The plan as a run tells it before it loads: what stays where, and the peak of memory."""
    limit = _limit(machine)
    if machine.card is None:
        most = max(phase.card + phase.host for phase in plan.phases)
        memory = f"{gigabytes(most)} of the {gigabytes(machine.host)} of memory free{limit}"
    else:
        memory = (
            f"{gigabytes(plan.card)} of the {gigabytes(machine.card)} of the card, "
            f"{gigabytes(plan.host)} of the {gigabytes(machine.host)} of the host{limit}"
        )
    return [f"residency {plan.mode}: {described(plan)}", f"peak memory planned: {memory}"]


def reading(plan: Plan, asked: str, machine: Machine, warm: bool = False) -> str:
    """How the files are read. ``asked``: one of direct.READS; ``warm``: the page cache is filled for later."""
    found = f"reads {asked}: " + ("past the page cache, but for what is there" if asked == AUTO else "as asked for")
    if not warm:
        return found
    room, size = planner.cacheable(plan, machine), plan.first_read
    if room == 0:
        return f"{found}; the page cache has no room for more"
    some = f"all {gigabytes(size)}" if room == size else f"{gigabytes(room)} of {gigabytes(size)}"
    return f"{found}; {some} come into the page cache while the device computes, for the next run"


def decoding(plan: Plan) -> str:
    """The tiles that decode the video, and what became of a wish for larger ones."""
    official = auto_tiling(*plan.work.shape.grid[1:])
    if plan.work.decode != FAST:
        return f"decode {OFFICIAL}: {_tiles(plan, official)}"
    if plan.tiling == official:
        return f"decode {FAST}: no larger tiles than the official ones fit, which are used: {_tiles(plan, official)}"
    return f"decode {FAST}: {_tiles(plan, plan.tiling)} (official: {_tiles(plan, official)})"


def _tiles(plan: Plan, tiling: Tiling) -> str:
    """``18 tiles of at most 73 frames of 448x768 pixels``."""
    tiles = Tiles.of(plan.work.shape.grid, tiling)
    length, height, width = tiles.largest
    pixels = f"{height * SPATIAL_FACTOR}x{width * SPATIAL_FACTOR} pixels"
    size = f"{TEMPORAL_FACTOR * (length - 1) + 1} frames of {pixels}"
    return f"one tile of {size}" if tiles.count == 1 else f"{tiles.count} tiles of at most {size}"


def table(plan: Plan) -> list[str]:
    """One line a phase."""
    found = [f"{'phase':<12} {'card':>9}  {'weights':>9} {'beside':>9}   {'host':>9}"]
    for phase in plan.phases:
        numbers = [gigabytes(count) for count in (phase.card, phase.weights, phase.activations, phase.host)]
        found.append("{:<12} {:>9}  {:>9} {:>9}   {:>9}".format(phase.name, *numbers))
    return found


def to_json(plan: Plan, machine: Machine, disk_rate: int, commands: Sequence[Command]) -> dict[str, Any]:
    """The document of ``ltxpack plan --json``; schemas/plan.schema.json describes it. All sizes in bytes."""
    return {
        "mode": plan.mode,
        "description": described(plan),
        "stages": [stage.transformer for stage in plan.work.stages],
        "setup": {
            "small_parts_stay": _small_parts_stay(plan),
            "weights": _word(plan.placements[plan.work.transformer_parts[0]]),
            "text_encoder": TEXT_WORDS[plan.placements[TEXT_ENCODER].source],
            "blocks": [plan.blocks[stage.part] for stage in plan.work.stages],
            "streamed_blocks": streamed_blocks(plan),
            "held_blocks": held_blocks(plan),
        },
        "decode": decoding(plan),
        "machine": {"card": machine.card, "host": machine.host},
        "peak": {"card": plan.card, "host": plan.host},
        "phases": [
            {word: getattr(phase, word) for word in ("name", "card", "weights", "activations", "host")}
            for phase in plan.phases
        ],
        "loading": {
            "into_cache": planner.cacheable(plan, machine),
            "disk_rate": disk_rate,
            "first_video": {"bytes": plan.first_read, "seconds": plan.first_read / disk_rate},
            "next_video": {"bytes": plan.next_read, "seconds": plan.next_read / disk_rate},
        },
        "commands": [{"command": command.text, "done": command.done} for command in commands],
    }


def plan_or_refuse(model: ModelSizes, work: Work, machine: Machine, mode: str, device: str = "the card") -> Plan:
    """The best plan in ``mode``. Raises DeviceError with the GB needed and free, and the flags that would fit."""
    plan = planner.best_plan(model, work, machine, mode)
    if plan is not None:
        return plan
    found = planner.shortage(planner.smallest_plan(model, work, mode), machine)
    assert found is not None
    on_device = machine.card is None or found.memory == "card"
    owner = device if on_device else "the host"
    limit = _limit(machine) if machine.card is None or not on_device else ""
    wanted = "" if mode == AUTO else f"--residency {mode}: "
    weights = f" ({gigabytes(found.phase.weights)} of weights)" if on_device else ""
    raise DeviceError(
        f"{owner} has too little free memory for {wanted}{found.phase.name}",
        # Rounded apart, so that a little too little is not told as enough.
        expected=gigabytes(-(-found.needed // TENTH) * TENTH) + weights,
        found=f"{gigabytes(max(found.free, 0) // TENTH * TENTH)} free{limit}",
        next=_instead(model, work, machine, mode, found),
    )


def after_shortage(mode: str, asked: str) -> str:
    """What to try after memory ran out in spite of a plan in ``mode``; ``asked``: the mode that the user asked for."""
    if mode == RESIDENT:
        return "the same command with --residency swap"
    if mode == SWAP or asked != STREAM:
        return "the same command with --residency stream"
    return "free memory there, or choose a smaller --height, --width or --num-frames"


def smaller_work(model: ModelSizes, work: Work, machine: Machine) -> Work | None:
    """The next smaller video that fits in some way: fewer frames first, then a smaller picture too."""
    asked, unit = work.shape, 2 * SPATIAL_FACTOR

    def resized(frames: int, height: int, width: int) -> Work | None:
        with suppress(UsageError):  # too short for any sound
            return work.resized(VideoShape(frames, height, width, asked.fps))
        return None

    for share in (1, 0.75, 0.5, 0.25):
        height, width = (max(unit, int(side * share) // unit * unit) for side in (asked.height, asked.width))
        first = asked.frames - TEMPORAL_FACTOR * ((height, width) == (asked.height, asked.width))
        counts = range(first, TEMPORAL_FACTOR, -TEMPORAL_FACTOR)

        def fits(frames: int, height: int = height, width: int = width) -> bool:
            """Too short counts as fitting: memory grows with frames, so the first that fits can be bisected."""
            smaller = resized(frames, height, width)
            return smaller is None or planner.shortage(planner.smallest_plan(model, smaller), machine) is None

        found = bisect_left(counts, True, key=fits)
        smaller = resized(counts[found], height, width) if found < len(counts) else None
        if smaller is not None:
            return smaller
    return None


def _instead(model: ModelSizes, work: Work, machine: Machine, mode: str, lacking: Need) -> str:
    other = planner.best_plan(model, work, machine) if mode != AUTO else None
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
    if planner.best_plan(model, smaller, machine, mode) is None:
        sides += f" --residency {STREAM}"
    return f"the same command with {sides}, or free memory"
