"""From sizes and a machine to a plan: which weights stay where, what each phase takes, what is read from disk.

Pure: the same sizes, work and machine give the same plan. The ways to run are tried from the fastest to the smallest;
the first that fits is taken.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from ltxpack.runtime.codecs.tiles import FAST, OFFICIAL, Tiling, auto_tiling, tiling_within
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.weights import activations
from ltxpack.runtime.weights.activations import HIDDEN_BYTES
from ltxpack.runtime.weights.machine import Machine
from ltxpack.runtime.weights.sizes import TEXT_ENCODER, Model, Part

RESIDENT, SWAP, STREAM, AUTO = "resident", "swap", "stream", "auto"
MODES = (RESIDENT, SWAP, STREAM)

# Where a transformer's weights are when the card does not hold them all the time.
DISK = "disk"  # read to the card when their stage begins
STAGED = "staged"  # the next stage's are read into pinned memory while one runs
KEPT = "kept"  # both stages' stay in pinned memory between videos
BLOCKS = "blocks"  # the blocks that are streamed are in pinned memory for as long as their stage runs
FILE = "file"  # the blocks that are streamed are read from the file each time

# How the text encoder is on the card while it encodes.
WHOLE, LAYERS, LAYERS_FROM_FILE = "whole", "layers", "layers from file"

# Where part of the blocks held serves better: one reads of the text encoder, for each prompt, what it saves of the
# transformers; the other has room for the text encoder's layers, read once, and none for blocks that are read often.
WASTEFUL = ((KEPT, LAYERS_FROM_FILE), (FILE, LAYERS))

SLOTS = 2
# What the process has in host memory before anything is loaded, and its buffers for reading.
PROCESS = 1_500_000_000
# Three readers (what is needed now, what is loaded ahead, blocks from a file) of sixteen pinned pieces each.
READ_BUFFERS = 3 * 16 * 16 * 1024 * 1024
# On the card, beyond what is counted: kernel workspaces and the allocator's gaps.
SLACK, SLACK_SHARE = 300_000_000, 0.1
# Host memory left alone by what lies there only because there is room: blocks between videos, files in the page cache,
# hidden states.
HELD_MARGIN, CACHE_MARGIN, HIDDEN_MARGIN = 4_000_000_000, 4_000_000_000, 2_000_000_000


@dataclass(frozen=True)
class StageWork:
    """One stage: the name of its transformer, the shape it samples, how often each block is evaluated, and how many
    passes of guidance one evaluation has. Two stages may name one transformer.
    """

    transformer: str
    shape: VideoShape
    evaluations: int
    passes: int


@dataclass(frozen=True)
class Work:
    """What is asked for: a video's shape, its stages, the number of images it is conditioned on, and the tiles it is
    decoded in.

    ``prompts``: how many videos' prompts are encoded together; their contexts wait on the host. ``once``: no other
    video follows, so that nothing is kept for one.
    """

    shape: VideoShape
    stages: tuple[StageWork, ...]
    images: int = 0
    decode: str = OFFICIAL
    prompts: int = 1
    once: bool = False

    @property
    def transformers(self) -> tuple[str, ...]:
        """The names of the transformers, each once, in the order of their first stage."""
        return tuple(dict.fromkeys(stage.transformer for stage in self.stages))

    def evaluations(self, transformer: str) -> int:
        """How often each block of ``transformer`` is evaluated for one video."""
        return sum(stage.evaluations for stage in self.stages if stage.transformer == transformer)

    def resized(self, shape: VideoShape) -> Work:
        """The same for a video of ``shape``, each stage in proportion. Raises UsageError where a stage has no size."""

        def resize(stage: VideoShape) -> VideoShape:
            height, width = (
                stage.height * shape.height // self.shape.height,
                stage.width * shape.width // self.shape.width,
            )
            return VideoShape(shape.frames, height, width, shape.fps)

        return replace(self, shape=shape, stages=tuple(replace(one, shape=resize(one.shape)) for one in self.stages))


@dataclass(frozen=True)
class Setup:
    """One way to run. ``streamed``: how many of each transformer's blocks pass through the slots; the others stay.

    ``held``: how many of them stay in pinned host memory between videos where not all do, streamed ones first; the
    rest of a transformer is read again. A transformer that is not named has none.
    """

    mode: str
    keep_parts: bool = False
    weights: str = DISK
    text: str = WHOLE
    streamed: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """Bytes at the largest moment of a phase; ``card`` is ``weights`` and ``activations``."""

    name: str
    weights: int
    activations: int
    host: int

    @property
    def card(self) -> int:
        """What is allocated on the device."""
        return self.weights + self.activations

    @property
    def needed(self) -> int:
        """What must be free on the device for it."""
        return self.card + SLACK + int(SLACK_SHARE * self.activations)


@dataclass(frozen=True)
class Plan:
    """A way to run ``work`` and what it takes. ``first_read`` and ``next_read``: bytes read from disk for the first
    video, and for each further one with another prompt. ``blocks``: how many each transformer has.

    ``tiling`` is what the video is decoded in; ``hidden`` the bytes of hidden states that may wait on the host for the
    connectors, beside those of the prompts under way.
    """

    setup: Setup
    work: Work
    phases: tuple[Phase, ...]
    first_read: int
    next_read: int
    blocks: Mapping[str, int]
    tiling: Tiling
    hidden: int

    @property
    def mode(self) -> str:
        """``resident``, ``swap`` or ``stream``."""
        return self.setup.mode

    @property
    def card(self) -> int:
        """The most bytes on the device."""
        return max(phase.card for phase in self.phases)

    @property
    def host(self) -> int:
        """The most bytes of host memory."""
        return max(phase.host for phase in self.phases)


def best_plan(model: Model, work: Work, machine: Machine, mode: str = AUTO) -> Plan | None:
    """The first way to run in ``mode`` that fits ``machine``; None if there is none."""
    for setup in _setups(mode):
        filled = _filled(model, work, machine, setup) if mode == AUTO else _all(model, work, setup)
        plan = fitting_plan(model, work, machine, _holding(model, work, machine, filled))
        if plan is not None:
            return plan
    return None


def fitting_plan(model: Model, work: Work, machine: Machine, setup: Setup) -> Plan | None:
    """What ``setup`` takes, with what it leaves free used where that was asked for; None if it does not fit."""
    plan = plan_for(model, work, setup)
    if shortage(plan, machine) is not None:
        return None
    for larger in (_with_hidden_states, _with_large_tiles):
        candidate = larger(model, plan, machine)
        if shortage(candidate, machine) is None:
            plan = candidate
    return plan


def smallest_plan(model: Model, work: Work, mode: str = AUTO) -> Plan:
    """The way to run in ``mode`` that takes least."""
    *_, last = _setups(mode)
    return plan_for(model, work, _all(model, work, last))


@dataclass(frozen=True)
class Shortage:
    """A phase that does not fit: the bytes it needs of the ``card`` or the ``host``, and those that are free."""

    phase: Phase
    memory: str
    needed: int
    free: int


def shortage(plan: Plan, machine: Machine) -> Shortage | None:
    """The phase of ``plan`` that lacks most of ``machine``, the card before the host; None if all fit."""
    if machine.card is None:
        needs = [Shortage(phase, "host", phase.needed + phase.host, machine.host) for phase in plan.phases]
    else:
        card = machine.card
        needs = [Shortage(phase, "card", phase.needed + machine.context, card) for phase in plan.phases]
        if all(need.needed <= card for need in needs):
            needs = [Shortage(phase, "host", phase.host, machine.host) for phase in plan.phases]
    most = max(needs, key=lambda need: need.needed)
    return most if most.needed > most.free else None


def cacheable(plan: Plan, machine: Machine) -> int:
    """Bytes of a run's files that have room in the page cache: in the host memory that ``plan`` leaves free."""
    room = min(_host_left(phase, machine) for phase in plan.phases) - CACHE_MARGIN
    return max(0, min(plan.first_read, room))


def plan_for(model: Model, work: Work, setup: Setup, tiling: Tiling | None = None, hidden: int = 0) -> Plan:
    """What ``setup`` takes; with the official tiles unless ``tiling`` is given."""
    first, following = _reads(model, work, setup)
    blocks = {name: len(model.transformers[name].blocks) for name in work.transformers}
    tiling = tiling or auto_tiling(*work.shape.grid[1:])
    phases = tuple(_phases(model, work, setup, tiling, hidden))
    return Plan(setup, work, phases, first, following, blocks, tiling, hidden)


def _setups(mode: str) -> Iterator[Setup]:
    """The ways to run in ``mode``, best first."""
    texts = (WHOLE, LAYERS, LAYERS_FROM_FILE)
    if mode in (RESIDENT, AUTO):
        yield from (Setup(RESIDENT, parts, DISK, text) for parts, text in product((True, False), texts))
    if mode in (SWAP, AUTO):
        ways = product((True, False), (KEPT, STAGED, DISK), texts)
        yield from (Setup(SWAP, parts, weights, text) for parts, weights, text in ways)
    if mode in (STREAM, AUTO):
        for weights, text in product((KEPT, BLOCKS, FILE), texts):
            if (weights, text) not in WASTEFUL:
                yield Setup(STREAM, False, weights, text)


def _all(model: Model, work: Work, setup: Setup) -> Setup:
    """``setup`` with every block streamed, if it streams."""
    if setup.mode != STREAM:
        return setup
    return replace(setup, streamed={name: len(model.transformers[name].blocks) for name in work.transformers})


def _filled(model: Model, work: Work, machine: Machine, setup: Setup) -> Setup:
    """``setup`` with as few blocks streamed as the card allows, if it streams."""
    if setup.mode != STREAM or machine.card is None:
        return _all(model, work, setup)
    fewest = dict.fromkeys(work.transformers, 0)
    for number, stage in enumerate(work.stages):
        fewest[stage.transformer] = max(fewest[stage.transformer], _fewest(model, work, machine, number))
    return replace(setup, streamed=fewest)


def _fewest(model: Model, work: Work, machine: Machine, number: int) -> int:
    name = work.stages[number].transformer
    total = len(model.transformers[name].blocks)
    room = (machine.card or 0) - machine.context
    # No fewer than three: two would lie in the two slots for good.
    for count in range(min(SLOTS + 1, total), total):
        phase = _stage(model, work, Setup(STREAM, streamed={name: count}), number, host=0)
        if phase.needed <= room:
            return count
    return total


def _holding(model: Model, work: Work, machine: Machine, setup: Setup) -> Setup:
    """``setup`` with as many blocks held in host memory as there is room for, where it would read them again: for the
    next video, or within one where streamed blocks come from the file.
    """
    if setup.mode != STREAM or setup.weights == KEPT or machine.card is None:
        return setup
    if work.once and setup.weights != FILE:
        return setup
    left = replace(machine, host=machine.host - HELD_MARGIN)

    def fits(count: int) -> bool:
        held = _shared_out(model, work, setup, count)
        return shortage(plan_for(model, work, replace(setup, held=held)), left) is None

    blocks = setup.streamed if work.once else _all(model, work, setup).streamed
    most = sum(blocks[name] for name in work.transformers)
    count = bisect_left(range(1, most + 1), True, key=lambda count: not fits(count))
    return replace(setup, held=_shared_out(model, work, setup, count))


def _shared_out(model: Model, work: Work, setup: Setup, count: int) -> dict[str, int]:
    """``count`` blocks of all transformers: those streamed first, and of these the ones evaluated most often."""
    found = dict.fromkeys(work.transformers, 0)
    for streamed in (True, False):
        for name in sorted(found, key=work.evaluations, reverse=True):
            most = setup.streamed[name] if streamed else len(model.transformers[name].blocks) - setup.streamed[name]
            taken = min(count, most)
            found[name] += taken
            count -= taken
    return found


def _with_hidden_states(model: Model, plan: Plan, machine: Machine) -> Plan:
    """``plan`` with as many hidden states on the host as there is room for: fewer turns of the text encoder."""
    one = activations.hidden_states(model.widths, model.itemsize)
    free = min(_host_left(phase, machine) for phase in plan.phases if phase.name in ("text", "connectors"))
    hidden = max(0, min((plan.work.prompts - 1) * one, HIDDEN_BYTES, free - HIDDEN_MARGIN))
    return plan_for(model, plan.work, plan.setup, plan.tiling, hidden)


def _with_large_tiles(model: Model, plan: Plan, machine: Machine) -> Plan:
    """``plan`` with the largest tiles its decoder has room for, if that was asked for."""
    if plan.work.decode != FAST:
        return plan
    phase = next(phase for phase in plan.phases if phase.name == "video")
    if machine.card is None:
        free = _host_left(phase, machine) + phase.needed - phase.weights
    else:
        free = machine.card - machine.context - phase.weights
    room = int((free - SLACK) / (1 + SLACK_SHARE))
    tiling = tiling_within(plan.work.shape.grid, activations.decoder_sizes(model.widths), model.itemsize, room)
    return plan_for(model, plan.work, plan.setup, tiling, plan.hidden)


def _host_left(phase: Phase, machine: Machine) -> int:
    """Bytes of the host that a phase leaves free; without a card the device's are the same."""
    return machine.host - phase.host - (phase.needed if machine.card is None else 0)


def _phases(model: Model, work: Work, setup: Setup, tiling: Tiling, hidden: int) -> Iterator[Phase]:
    itemsize, widths = model.itemsize, model.widths
    kept = _kept(model, work, setup)
    waiting = (work.prompts - 1) * activations.contexts(widths, itemsize)
    host = PROCESS + READ_BUFFERS + _host_copies(model, work, setup) + waiting
    hidden += activations.hidden_states(widths, itemsize)

    def part(name: str) -> int:
        return kept + (0 if setup.keep_parts else model.parts[name].total)

    def phase(name: str, weights: int, count: Callable[..., int], *given: object, more_host: int = 0) -> Phase:
        return Phase(name, weights, count(widths, *given, itemsize), host + more_host)

    text = model.parts[TEXT_ENCODER]
    on_card = text.total if setup.text == WHOLE else text.rest + SLOTS * text.largest
    copied = sum(text.blocks) if setup.text == LAYERS else 0
    yield phase("text", kept + on_card, activations.encoding, more_host=copied + hidden)
    yield phase("connectors", part("connectors"), activations.connecting, more_host=hidden)
    if work.images:
        yield phase("images", part("vae"), activations.image_encoding, work.shape)
    for number, stage in enumerate(work.stages):
        if number and stage.shape != work.stages[number - 1].shape:
            yield phase("upsample", part("latent_upsampler"), activations.upsampling, stage.shape)
        yield _stage(model, work, setup, number, host)
    sound = kept + (0 if setup.keep_parts else model.parts["audio_vae"].total + model.parts["vocoder"].total)
    yield phase("sound", sound, activations.sound_decoding, work.shape)
    frames = activations.frames_on_host(work.shape, tiling)
    decoding = activations.video_decoding(widths, work.shape, itemsize, tiling)
    yield Phase("video", part("vae"), decoding, host + frames)


def _stage(model: Model, work: Work, setup: Setup, number: int, host: int) -> Phase:
    stage = work.stages[number]
    part, streamed = model.transformers[stage.transformer], setup.streamed.get(stage.transformer, 0)
    kept = _kept(model, work, setup)
    if setup.mode == SWAP:
        kept += part.total
    if setup.mode == STREAM:
        kept += part.rest + sum(part.blocks) - streamed * part.largest + min(SLOTS, streamed) * part.largest
    more = _not_held(setup, stage.transformer) * part.largest if setup.weights == BLOCKS else 0
    taken = activations.sampling(model.widths, stage.shape, model.itemsize, passes=stage.passes, images=work.images)
    return Phase(f"stage {number + 1}", kept, taken, host + more)


def _kept(model: Model, work: Work, setup: Setup) -> int:
    """Weights that are on the card through every phase."""
    parts = model.small if setup.keep_parts else 0
    return parts + (sum(part.total for part in _transformers(model, work)) if setup.mode == RESIDENT else 0)


def _transformers(model: Model, work: Work) -> list[Part]:
    """The transformers of all stages, each once."""
    return [model.transformers[name] for name in work.transformers]


def _host_copies(model: Model, work: Work, setup: Setup) -> int:
    """Weights of transformers in pinned memory, through every phase."""
    if setup.weights == KEPT:
        return sum(part.total for part in _transformers(model, work))
    if setup.weights == STAGED:
        return max(part.total for part in _transformers(model, work))
    return sum(setup.held.get(name, 0) * model.transformers[name].largest for name in work.transformers)


def _not_held(setup: Setup, name: str) -> int:
    """How many of the streamed blocks of a transformer are not in host memory before its stage begins."""
    return max(0, setup.streamed.get(name, 0) - setup.held.get(name, 0))


def _reads(model: Model, work: Work, setup: Setup) -> tuple[int, int]:
    """Bytes from disk for the first video and for each further one with another prompt, if no cache helps."""
    text = model.parts[TEXT_ENCODER]
    encoder = text.stored
    if setup.text == LAYERS_FROM_FILE:
        encoder += _share(text.stored, sum(text.blocks), text.total)
    stored = {name: model.parts[name].stored for name in model.parts if name != TEXT_ENCODER}
    # The video VAE is wanted for images, and to decode.
    small = sum(stored.values()) + (stored["vae"] if work.images and not setup.keep_parts else 0)
    transformers = again = 0
    for name in work.transformers:
        part, read = model.transformers[name], model.transformers[name].stored
        if setup.weights == FILE:
            streamed = _not_held(setup, name) * part.largest
            read += work.evaluations(name) * _share(part.stored, streamed, part.total)
        transformers += read
        if setup.mode != RESIDENT and setup.weights != KEPT:
            again += read - _share(part.stored, setup.held.get(name, 0) * part.largest, part.total)
    return encoder + small + transformers, encoder + (0 if setup.keep_parts else small) + again


def _share(stored: int, some: int, total: int) -> int:
    return stored * some // max(total, 1)
