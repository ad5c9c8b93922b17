"""The planner: from sizes, work and a machine to the placement of each part, and the memory of each phase of a run.

Pure: the same sizes, work and machine give the same plan. :data:`TRANSFORMERS`, :data:`SMALL_PARTS_HOME` and
:data:`TEXT_ENCODERS` are the table of the ways to run; the planner tries them in order and takes the first that fits.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import TypeAlias

from ltxpack.files.reader import IN_FLIGHT, READ_BYTES, SPARE_BUFFERS
from ltxpack.runtime.codecs.tiles import FAST, OFFICIAL, Tiling, auto_tiling, tiling_within
from ltxpack.runtime.overlay import transformer_part
from ltxpack.runtime.parallel.schemes import WHOLE, Split
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.settings import AUTO, MODES, RESIDENT, STREAM, SWAP
from ltxpack.runtime.weights import activations
from ltxpack.runtime.weights.machine import UNKNOWN, Machine
from ltxpack.runtime.weights.sizes import SMALL_PARTS, TEXT_ENCODER, VOCODER, ModelSizes, PartSizes

CARD, HOST, FILE = "card", "host", "file"

# The part in use between two stages of one transformer, which stays meanwhile.
BETWEEN_STAGES = "latent_upsampler"
# The phases in which a part other than a transformer is used.
USED_IN = {
    TEXT_ENCODER: ("text",),
    "connectors": ("text", "connectors"),
    "vae": ("images", "video"),
    "audio_vae": ("sound",),
    VOCODER: ("sound",),
    BETWEEN_STAGES: ("upsample",),
}
SLOTS = 2
# Bytes of a text encoder that wait in host memory to be hashed, if layers stream in another order than in the file.
WAITING = 2_500_000_000
# Host memory of the process before it loads anything; and the buffers of three readers: of what is needed now, of what
# is loaded ahead, and of blocks from a file.
PROCESS = 1_500_000_000
READ_BUFFERS = 3 * (IN_FLIGHT + SPARE_BUFFERS) * READ_BYTES
# On the card, beyond what is counted: kernel workspaces and the allocator's gaps.
SLACK, SLACK_SHARE = 300_000_000, 0.1
# Host memory that stays free beside blocks held between videos, and beside files in the page cache.
HELD_MARGIN, CACHE_MARGIN = 4_000_000_000, 4_000_000_000
# A row of the table below for some work; part -> a number of blocks.
Way: TypeAlias = "Mapping[str, Placement]"
Blocks: TypeAlias = Mapping[str, int]
NO_BLOCKS: Blocks = MappingProxyType({})


@dataclass(frozen=True)
class Placement:
    """Where the weights of a part are.

    ``home``: their place between uses: the CARD, pinned HOST memory, or the FILE only. ``source``: the place from which
    the blocks numbered ``streamed`` come while the part is in use, HOST or FILE; all else is on the card then.
    ``held``: the numbers of the blocks that stay in pinned memory between uses while all else is read again. ``ahead``:
    the weights are read into pinned memory while the stage before computes.
    """

    home: str = FILE
    source: str = ""
    streamed: frozenset[int] = frozenset()
    held: frozenset[int] = frozenset()
    ahead: bool = False


# The ways to run in each mode. The planner varies the text encoder first, then the transformers, then the small parts,
# each in the order written here.
TRANSFORMERS = {
    RESIDENT: (Placement(CARD),),
    SWAP: (Placement(HOST), Placement(FILE, ahead=True), Placement(FILE)),
    STREAM: (Placement(HOST, source=HOST), Placement(FILE, source=HOST), Placement(FILE, source=FILE)),
}
SMALL_PARTS_HOME = {RESIDENT: (CARD, FILE), SWAP: (CARD, FILE), STREAM: (FILE,)}
TEXT_ENCODERS = (Placement(FILE), Placement(FILE, source=HOST), Placement(FILE, source=FILE))


@dataclass(frozen=True)
class StageWork:
    """One stage: the name of its transformer, the shape it samples, how often each block is evaluated, and the passes
    of one evaluation, the last of them ``isolated`` or not. ``split``: how ranks share it. Two stages may name one
    transformer.
    """

    transformer: str
    shape: VideoShape
    evaluations: int
    passes: int
    isolated: bool = False
    split: Split = WHOLE

    @property
    def part(self) -> str:
        """The part with its weights."""
        return transformer_part(self.transformer)


@dataclass(frozen=True)
class Work:
    """A video to make: its shape, its stages, the number of its images, and the tiles that decode it.

    ``prompts``: the number of videos whose prompts are encoded together; their contexts wait on the host. ``once``: no
    other video follows, so nothing is kept for one. ``only``: the phases of this device, if others have the rest.
    """

    shape: VideoShape
    stages: tuple[StageWork, ...]
    images: int = 0
    decode: str = OFFICIAL
    prompts: int = 1
    once: bool = False
    only: frozenset[str] = frozenset()

    def has(self, phase: str) -> bool:
        """Whether this device has ``phase``."""
        return not self.only or phase in self.only

    @functools.cached_property
    def own_stages(self) -> dict[int, StageWork]:
        """The stages of this device, by number."""
        return {number: stage for number, stage in enumerate(self.stages) if self.has(stage_label(number))}

    @functools.cached_property
    def transformer_parts(self) -> tuple[str, ...]:
        """The parts of its transformers, each once, in the order of their first stages."""
        return tuple(dict.fromkeys(stage.part for stage in self.own_stages.values()))

    def evaluations(self, part: str) -> int:
        """How often each block of ``part`` is evaluated for one video."""
        if part == TEXT_ENCODER:
            return self.prompts
        return sum(stage.evaluations for stage in self.stages if stage.part == part)

    def resized(self, shape: VideoShape) -> Work:
        """The same for a video of ``shape``, each stage in proportion. Raises UsageError where a stage has no size."""

        def resize(stage: VideoShape) -> VideoShape:
            height = stage.height * shape.height // self.shape.height
            width = stage.width * shape.width // self.shape.width
            return VideoShape(shape.frames, height, width, shape.fps)

        return replace(self, shape=shape, stages=tuple(replace(one, shape=resize(one.shape)) for one in self.stages))


@dataclass(frozen=True)
class Phase:
    """Bytes at the largest moment of a phase."""

    name: str
    weights: int
    activations: int
    host: int

    @property
    def card(self) -> int:
        """Bytes allocated on the device."""
        return self.weights + self.activations

    @property
    def needed(self) -> int:
        """Bytes that must be free on the device."""
        return self.card + SLACK + int(SLACK_SHARE * self.activations)


@dataclass(frozen=True)
class Plan:
    """The placement of each part for ``work``, and the memory and reads that follow.

    ``blocks``: the number of blocks of each part that has any. ``first_read``, ``next_read``: bytes read from disk for
    the first video, and for each further one with another prompt. ``tiling``: the tiles that decode the video.
    """

    mode: str
    placements: Mapping[str, Placement]
    work: Work
    phases: tuple[Phase, ...]
    first_read: int
    next_read: int
    blocks: Mapping[str, int]
    tiling: Tiling

    @property
    def card(self) -> int:
        """The most bytes on the device."""
        return max(phase.card for phase in self.phases)

    @property
    def host(self) -> int:
        """The most bytes of host memory."""
        return max(phase.host for phase in self.phases)


@dataclass(frozen=True)
class Need:
    """The bytes that a phase needs of the ``card`` or the ``host``, and those that are free there."""

    phase: Phase
    memory: str
    needed: int
    free: int


@dataclass(frozen=True)
class Use:
    """A phase without weights: its bytes of ``activations``, further bytes on the ``host``, the ``parts`` in use."""

    name: str
    activations: int
    parts: tuple[str, ...]
    host: int = 0


class Footprint:
    """The memory that ``work`` takes by the way to run. It is the same on every machine: many of them may share it."""

    def __init__(self, model: ModelSizes, work: Work) -> None:
        self.model, self.work = model, work
        self._uses = tuple(_uses(model, work, auto_tiling(*work.shape.grid[1:])))
        # By the id of a way, which stays in the value, and numbers of blocks.
        self._most: dict[tuple[int, ...], tuple[object, int, int, int]] = {}

    def fits(self, machine: Machine, way: Way, streamed: Blocks, held: Blocks = NO_BLOCKS) -> bool:
        """Whether a plan for ``way``, with so many blocks streamed and held, has no :func:`shortage`."""
        streams = streamed if way[self.work.transformer_parts[0]].source else NO_BLOCKS
        key = (id(way), *streams.values(), *held.values())
        if key not in self._most:
            phases = _phases(self.model, self.work, _placements(self.model, way, streamed, held), self._uses)
            each = ((phase.needed, phase.host, phase.needed + phase.host) for phase in phases)
            self._most[key] = way, *map(max, zip(*each, strict=True))
        _, card, host, both = self._most[key]
        if machine.card is None:
            return both <= machine.host
        return card + machine.context <= machine.card and host <= machine.host

    def streamed(self, machine: Machine) -> dict[str, int]:
        """The fewest blocks of each transformer that the card allows, whatever the host has; without a card all."""
        found = _every_block(self.model, self.work)
        if machine.card is None:
            return found
        *_, (_, way) = _ways(STREAM, self.work)
        alone = replace(machine, host=UNKNOWN)

        def fits(part: str, count: int) -> bool:
            return self.fits(alone, way, {**found, part: count})

        for part, total in found.items():
            # No fewer than three: two would lie in the two slots for good.
            counts = range(min(SLOTS + 1, total), total)
            found[part] = counts.start + bisect_left(counts, True, key=functools.partial(fits, part))
        return found


def best_plan(
    model: ModelSizes, work: Work, machine: Machine, mode: str = AUTO, footprint: Footprint | None = None
) -> Plan | None:
    """The first way to run in ``mode`` that fits ``machine``; None if there is none.

    ``footprint``: that of ``work``, if other machines have used it already.
    """
    footprint = footprint or Footprint(model, work)
    streamed = footprint.streamed(machine) if mode == AUTO else _every_block(model, work)
    for name, way in _ways(mode, work):
        if footprint.fits(machine, way, streamed):
            # Blocks that are held take memory that is left.
            held = _held(footprint, machine, way, streamed)
            plan = plan_for(model, work, name, _placements(model, way, streamed, held))
            return _with_large_tiles(model, plan, machine)
    return None


def smallest_plan(model: ModelSizes, work: Work, mode: str = AUTO) -> Plan:
    """The way to run in ``mode`` that takes the least memory."""
    *_, (name, way) = _ways(mode, work)
    return plan_for(model, work, name, _placements(model, way, _every_block(model, work), {}))


def continued(before: Plan, model: ModelSizes, work: Work, machine: Machine) -> Plan | None:
    """The plan for ``work`` with the placements of ``before``, which keeps further transformers likewise.

    None if that does not fit, or for further transformers if ``before`` keeps none between videos. Loaded weights have
    their host memory already: without further ones the host counts only for work that takes more of it than ``before``
    did, and without a card only larger work counts.
    """
    like = before.placements[before.work.transformer_parts[0]]
    placements = {**dict.fromkeys(work.transformer_parts, like), **before.placements}
    further = len(placements) > len(before.placements)
    if further and like.home == FILE:
        return None
    plan = plan_for(model, work, before.mode, placements)
    loaded = machine
    if not further and plan.host <= before.host and (machine.card is not None or plan.card <= before.card):
        loaded = replace(machine, host=UNKNOWN)
    return None if shortage(plan, loaded) is not None else _with_large_tiles(model, plan, machine)


def shortage(plan: Plan, machine: Machine) -> Need | None:
    """What ``plan`` lacks most on ``machine``, of the card before the host; None if all phases fit."""
    for needs in zip(*(_needs(phase, machine) for phase in plan.phases), strict=True):
        most = max(needs, key=lambda need: need.needed)
        if most.needed > most.free:
            return most
    return None


def _needs(phase: Phase, machine: Machine) -> tuple[Need, ...]:
    """The needs of ``phase``: of the card, then of the host; without a card, all of the host."""
    if machine.card is None:
        return (Need(phase, "host", phase.needed + phase.host, machine.host),)
    card = Need(phase, "card", phase.needed + machine.context, machine.card)
    return card, Need(phase, "host", phase.host, machine.host)


def cacheable(plan: Plan, machine: Machine) -> int:
    """Bytes of a run's files that fit in the page cache: in the host memory that ``plan`` leaves free."""
    room = min(_host_left(phase, machine) for phase in plan.phases) - CACHE_MARGIN
    return max(0, min(plan.first_read, room))


def plan_for(
    model: ModelSizes, work: Work, mode: str, placements: Mapping[str, Placement], tiling: Tiling | None = None
) -> Plan:
    """The plan with ``placements``, and with the official tiles unless ``tiling`` is given."""
    blocks = {part: len(model.parts[part].blocks) for part in placements if model.parts[part].blocks}
    tiling = tiling or auto_tiling(*work.shape.grid[1:])
    phases = tuple(_phases(model, work, placements, _uses(model, work, tiling)))
    return Plan(mode, placements, work, phases, *_reads(model, work, placements), blocks, tiling)


def spread(count: int, total: int) -> frozenset[int]:
    """``count`` of ``total`` blocks, spread evenly: while a block that stays computes, a streamed one comes."""
    return frozenset(i for i in range(total) if (i + 1) * count // total > i * count // total)


def held_blocks(streamed: frozenset[int], count: int, total: int) -> frozenset[int]:
    """``count`` of ``total`` blocks: streamed ones first, spread evenly, so that others come while they compute."""
    first, others = sorted(streamed), sorted(set(range(total)) - streamed)
    chosen = {first[i] for i in spread(min(count, len(first)), len(first))}
    return frozenset(chosen | set(others[: max(0, count - len(first))]))


@functools.lru_cache(maxsize=64)
def _ways(mode: str, work: Work) -> Sequence[tuple[str, Mapping[str, Placement]]]:
    """The rows of the table for ``work`` in ``mode``, best first: a mode, and parts without block numbers."""
    found = []
    for name in MODES if mode == AUTO else (mode,):
        for home, transformer, text in product(SMALL_PARTS_HOME[name], TRANSFORMERS[name], TEXT_ENCODERS):
            # Without a next video nothing is pinned for it.
            if work.once and transformer.home == HOST:
                continue
            # Pinned layers pay only if several prompts pass through them. If a transformer's blocks are read at every
            # step, host memory holds some of these rather than layers that are read once.
            if text.source == HOST and (work.prompts == 1 or transformer.source == FILE):
                continue
            others = dict.fromkeys(SMALL_PARTS, Placement(home)) | {TEXT_ENCODER: text}
            own = {part: placed for part, placed in others.items() if any(map(work.has, USED_IN[part]))}
            found.append((name, own | dict.fromkeys(work.transformer_parts, transformer)))
    return found


def _placements(model: ModelSizes, way: Way, streamed: Blocks, held: Blocks) -> dict[str, Placement]:
    """``way`` with so many blocks of each transformer streamed and held; a text encoder streams all layers or none."""
    found = dict(way)
    for part, placed in way.items():
        if placed.source or part in held:
            total = len(model.parts[part].blocks)
            numbers = streamed.get(part, total) if placed.source else 0
            found[part] = _placement(placed, numbers, held.get(part, 0), total)
    return found


@functools.lru_cache(maxsize=4096)
def _placement(placed: Placement, streamed: int, held: int, total: int) -> Placement:
    """``placed`` with so many of ``total`` blocks streamed, and so many held."""
    numbers = spread(streamed, total)
    return replace(placed, streamed=numbers, held=held_blocks(numbers, held, total))


def _every_block(model: ModelSizes, work: Work) -> dict[str, int]:
    return {part: len(model.parts[part].blocks) for part in work.transformer_parts}


def _held(footprint: Footprint, machine: Machine, way: Way, streamed: Blocks) -> dict[str, int]:
    """The number of blocks of each transformer to hold in host memory: as many as fit, if they would be read again for
    the next video, or within one because streamed blocks come from the file.
    """
    model, work = footprint.model, footprint.work
    placed = way[work.transformer_parts[0]]
    if not placed.source or placed.home == HOST or machine.card is None or (work.once and placed.source != FILE):
        return {}
    left = replace(machine, host=machine.host - HELD_MARGIN)

    def fits(count: int) -> bool:
        return footprint.fits(left, way, streamed, _shared_out(model, work, streamed, count))

    most = sum((streamed if work.once else _every_block(model, work)).values())
    count = bisect_left(range(1, most + 1), True, key=lambda count: not fits(count))
    return _shared_out(model, work, streamed, count)


def _shared_out(model: ModelSizes, work: Work, streamed: Mapping[str, int], count: int) -> dict[str, int]:
    """``count`` blocks shared out: streamed ones first, and first those of the transformer evaluated most often."""
    found = dict.fromkeys(work.transformer_parts, 0)
    for before in (True, False):
        for part in sorted(found, key=work.evaluations, reverse=True):
            most = streamed[part] if before else len(model.parts[part].blocks) - streamed[part]
            taken = min(count, most)
            found[part] += taken
            count -= taken
    return found


def _with_large_tiles(model: ModelSizes, plan: Plan, machine: Machine) -> Plan:
    """``plan`` with the largest tiles that fit, if they were asked for."""
    if plan.work.decode != FAST or not plan.work.has("video"):
        return plan
    phase = next(phase for phase in plan.phases if phase.name == "video")
    if machine.card is None:
        free = _host_left(phase, machine) + phase.needed - phase.weights
    else:
        free = machine.card - machine.context - phase.weights
    room = int((free - SLACK) / (1 + SLACK_SHARE))
    tiling = tiling_within(plan.work.shape.grid, activations.decoder_sizes(model.widths), model.itemsize, room)
    larger = plan_for(model, plan.work, plan.mode, plan.placements, tiling)
    return plan if shortage(larger, machine) is not None else larger


def _host_left(phase: Phase, machine: Machine) -> int:
    """Bytes of the host that a phase leaves free; without a card it has the device's bytes too."""
    return machine.host - phase.host - (phase.needed if machine.card is None else 0)


def _phases(model: ModelSizes, work: Work, placements: Mapping[str, Placement], uses: Iterable[Use]) -> Iterator[Phase]:
    """Those of ``uses`` that this device has, with the weights where they are."""
    waiting = (work.prompts - 1) * activations.contexts(model.widths, model.itemsize)
    always = PROCESS + READ_BUFFERS + _pinned(model, placements) + waiting
    stays = sum(model.parts[part].total for part, placed in placements.items() if placed.home == CARD)
    for use in uses:
        if work.has(use.name):
            card, more = _in_use(model, placements, use.parts)
            yield Phase(use.name, stays + card, use.activations, always + use.host + more)


def _uses(model: ModelSizes, work: Work, tiling: Tiling) -> Iterator[Use]:
    """The phases of all devices, in their order."""
    itemsize, widths = model.itemsize, model.widths
    # With one prompt the text encoder makes room for the connectors; with several both stay until the last one.
    both = (TEXT_ENCODER, "connectors")
    yield Use("text", activations.encoding(widths, itemsize), both[: 1 + (work.prompts > 1)])
    yield Use("connectors", activations.connecting(widths, itemsize), both[work.prompts == 1 :])
    if work.images:
        yield Use("images", activations.image_encoding(widths, work.shape, itemsize), ("vae",))
    before: StageWork | None = None
    for number, stage in enumerate(work.stages):
        if before is not None and before.shape != stage.shape:
            # A transformer that the next stage uses too stays where it is.
            same = (stage.part,) if before.part == stage.part else ()
            yield Use("upsample", activations.upsampling(widths, stage.shape, itemsize), (BETWEEN_STAGES, *same))
        codes = model.parts[stage.part].codes
        ways = stage.passes, work.images, codes, stage.split, stage.isolated
        taken = activations.sampling(widths, stage.shape, itemsize, *ways)
        yield Use(stage_label(number), taken, (stage.part,))
        before = stage
    yield Use("sound", activations.sound_decoding(widths, work.shape, itemsize), ("audio_vae", VOCODER))
    frames = activations.frames_on_host(work.shape, tiling)
    yield Use("video", activations.video_decoding(widths, work.shape, itemsize, tiling), ("vae",), frames)


def _in_use(model: ModelSizes, placements: Mapping[str, Placement], parts: Sequence[str]) -> tuple[int, int]:
    """Bytes on card and host of ``parts`` in use, beside the bytes that are there all the time."""
    card = host = 0
    for part in parts:
        placed, sizes = placements[part], model.parts[part]
        if placed.home != CARD:
            card += _on_card(sizes, placed.streamed)
        if placed.home == FILE and placed.source == HOST:
            host += sizes.of(placed.streamed - placed.held)
        if part == TEXT_ENCODER and placed.source == FILE:
            host += WAITING
    return card, host


def _on_card(sizes: PartSizes, streamed: Collection[int]) -> int:
    """Bytes on the card of a part in use, with these blocks streamed."""
    return sizes.total - sizes.of(streamed) + min(SLOTS, len(streamed)) * sizes.largest(streamed)


def _pinned(model: ModelSizes, placements: Mapping[str, Placement]) -> int:
    """Bytes of weights that are in pinned memory in every phase."""
    every = [(model.parts[part], placed) for part, placed in placements.items()]
    kept = sum(sizes.total if placed.home == HOST else sizes.of(placed.held) for sizes, placed in every)
    return kept + max(sizes.total if placed.ahead else 0 for sizes, placed in every)


def _reads(model: ModelSizes, work: Work, placements: Mapping[str, Placement]) -> tuple[int, int]:
    """Bytes from disk for the first video, and for each further one with another prompt, if no cache helps."""
    first = again = 0
    for part, placed in placements.items():
        sizes = model.parts[part]
        read = sizes.stored
        # The video VAE is used for images, and to decode.
        if part == "vae" and work.images and placed.home != CARD:
            read += sizes.stored
        if placed.source == FILE:
            streamed = sizes.of(placed.streamed - placed.held)
            # The text encoder is hashed as its layers stream, a transformer before that.
            times = work.evaluations(part) - (part == TEXT_ENCODER)
            read += times * _share(sizes.stored - sizes.unused, streamed, sizes.total)
        first += read
        if placed.home == FILE:
            again += read - _share(sizes.stored, sizes.of(placed.held), sizes.total)
    return first, again


def _share(stored: int, some: int, total: int) -> int:
    return stored * some // max(total, 1)
