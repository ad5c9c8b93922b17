"""From sizes and a machine to a plan: which weights stay where, what each phase takes, what is read from disk.

Pure: the same sizes, work and machine give the same plan. The ways to run are tried from the fastest to the smallest;
the first that fits is taken.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from ltxpack.runtime.large_tiles import FAST, OFFICIAL, tiling_within
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.tiles import Tiling, auto_tiling
from ltxpack.runtime.weights import activations
from ltxpack.runtime.weights.activations import HIDDEN_BYTES
from ltxpack.runtime.weights.machine import Machine
from ltxpack.runtime.weights.sizes import TEXT_ENCODER, Model

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
STAGE2_STEPS = 3


@dataclass(frozen=True)
class Work:
    """What is asked for: a video's shape, the steps of stage 1, the number of images it is conditioned on, and the
    tiles it is decoded in.

    ``prompts``: how many videos' prompts are encoded together, their contexts waiting on the host. ``once``: no other
    video follows, so that nothing is kept for one.
    """

    shape: VideoShape
    steps: int = 15
    images: int = 0
    decode: str = OFFICIAL
    prompts: int = 1
    once: bool = False

    @property
    def stages(self) -> tuple[VideoShape, VideoShape]:
        """The shape of each stage."""
        return self.shape.half(), self.shape

    @property
    def evaluations(self) -> tuple[int, int]:
        """How often each stage's blocks are passed through; all passes of guidance go together."""
        return 2 * self.steps + 1, 2 * STAGE2_STEPS + 1


@dataclass(frozen=True)
class Setup:
    """One way to run. ``streamed``: how many of each stage's blocks pass through the slots; the others stay.

    ``held``: how many of them stay in pinned host memory between videos where not all do, streamed ones first; the
    rest of a transformer is read again.
    """

    mode: str
    keep_parts: bool = False
    weights: str = DISK
    text: str = WHOLE
    streamed: tuple[int, int] = (0, 0)
    held: tuple[int, int] = (0, 0)


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
    video, and for each further one with another prompt.

    ``tiling`` is what the video is decoded in; ``hidden`` the bytes of hidden states that may wait on the host for the
    connectors, beside those of the prompts under way.
    """

    setup: Setup
    work: Work
    phases: tuple[Phase, ...]
    first_read: int
    next_read: int
    stages: tuple[str, str]
    blocks: tuple[int, int]
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
        filled = _filled(model, work, machine, setup) if mode == AUTO else _all(model, setup)
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
    return plan_for(model, work, _all(model, last))


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
    blocks = tuple(len(model.transformer(stage).blocks) for stage in (0, 1))
    tiling = tiling or auto_tiling(*work.shape.grid[1:])
    phases = tuple(_phases(model, work, setup, tiling, hidden))
    return Plan(setup, work, phases, first, following, model.stages, (blocks[0], blocks[1]), tiling, hidden)


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


def _all(model: Model, setup: Setup) -> Setup:
    """``setup`` with every block streamed, if it streams."""
    if setup.mode != STREAM:
        return setup
    return replace(setup, streamed=(len(model.transformer(0).blocks), len(model.transformer(1).blocks)))


def _filled(model: Model, work: Work, machine: Machine, setup: Setup) -> Setup:
    """``setup`` with as few blocks streamed as the card allows, if it streams."""
    if setup.mode != STREAM or machine.card is None:
        return _all(model, setup)
    first, second = (_fewest(model, work, machine, stage) for stage in (0, 1))
    if model.stages[0] == model.stages[1]:
        first = second = max(first, second)
    return replace(setup, streamed=(first, second))


def _fewest(model: Model, work: Work, machine: Machine, stage: int) -> int:
    total = len(model.transformer(stage).blocks)
    room = (machine.card or 0) - machine.context
    # No fewer than three: two would lie in the two slots for good.
    for count in range(min(SLOTS + 1, total), total):
        phase = _stage(model, work, Setup(STREAM, streamed=(count, count)), stage, host=0)
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
        return shortage(plan_for(model, work, replace(setup, held=_shared_out(model, setup, count))), left) is None

    blocks = {name: len(part.blocks) for name, part in model.transformers.items()}
    most = sum((dict(zip(model.stages, setup.streamed, strict=True)) if work.once else blocks).values())
    count = bisect_left(range(1, most + 1), True, key=lambda count: not fits(count))
    return replace(setup, held=_shared_out(model, setup, count))


def _shared_out(model: Model, setup: Setup, count: int) -> tuple[int, int]:
    """``count`` blocks of both stages: those streamed first, and of these stage 1's, which are asked for most often."""
    if model.stages[0] == model.stages[1]:
        return count, count
    found = [0, 0]
    others = [len(model.transformer(stage).blocks) - setup.streamed[stage] for stage in (0, 1)]
    for stage, most in ((0, setup.streamed[0]), (1, setup.streamed[1]), (0, others[0]), (1, others[1])):
        taken = min(count, most)
        found[stage] += taken
        count -= taken
    return found[0], found[1]


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
    kept = _kept(model, setup)
    waiting = (work.prompts - 1) * activations.contexts(widths, itemsize)
    host = PROCESS + READ_BUFFERS + _host_copies(model, setup) + waiting
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
    yield _stage(model, work, setup, 0, host)
    yield phase("upsample", part("latent_upsampler"), activations.upsampling, work.shape)
    yield _stage(model, work, setup, 1, host)
    sound = kept + (0 if setup.keep_parts else model.parts["audio_vae"].total + model.parts["vocoder"].total)
    yield phase("sound", sound, activations.sound_decoding, work.shape)
    frames = activations.frames_on_host(work.shape, tiling)
    decoding = activations.video_decoding(widths, work.shape, itemsize, tiling)
    yield Phase("video", part("vae"), decoding, host + frames)


def _stage(model: Model, work: Work, setup: Setup, stage: int, host: int) -> Phase:
    part = model.transformer(stage)
    streamed = setup.streamed[stage]
    kept = _kept(model, setup)
    if setup.mode == SWAP:
        kept += part.total
    if setup.mode == STREAM:
        kept += part.rest + sum(part.blocks) - streamed * part.largest + min(SLOTS, streamed) * part.largest
    more = _not_held(setup, stage) * part.largest if setup.weights == BLOCKS else 0
    taken = activations.sampling(
        model.widths, work.stages[stage], model.itemsize, guided=stage == 0, images=work.images
    )
    return Phase(f"stage {stage + 1}", kept, taken, host + more)


def _kept(model: Model, setup: Setup) -> int:
    """Weights that are on the card through every phase."""
    parts = model.small if setup.keep_parts else 0
    return parts + (model.all_transformers if setup.mode == RESIDENT else 0)


def _host_copies(model: Model, setup: Setup) -> int:
    """Weights of transformers in pinned memory, through every phase."""
    if setup.weights == KEPT:
        return model.all_transformers
    if setup.weights == STAGED:
        return max(part.total for part in model.transformers.values())
    return sum(count * model.transformers[name].largest for name, count in _held(model, setup).items())


def _held(model: Model, setup: Setup) -> dict[str, int]:
    """Transformer -> how many of its blocks stay in host memory between videos."""
    return dict(zip(model.stages, setup.held, strict=True))


def _not_held(setup: Setup, stage: int) -> int:
    """How many of the streamed blocks of stage 0 or 1 are not in host memory before it begins."""
    return max(0, setup.streamed[stage] - setup.held[stage])


def _reads(model: Model, work: Work, setup: Setup) -> tuple[int, int]:
    """Bytes from disk for the first video and for each further one with another prompt, if no cache helps."""
    text = model.parts[TEXT_ENCODER]
    encoder = text.stored
    if setup.text == LAYERS_FROM_FILE:
        encoder += _share(text.stored, sum(text.blocks), text.total)
    stored = {name: model.parts[name].stored for name in model.parts if name != TEXT_ENCODER}
    # The video VAE is wanted for images, and to decode.
    small = sum(stored.values()) + (stored["vae"] if work.images and not setup.keep_parts else 0)
    transformers = sum(part.stored for part in model.transformers.values())
    if setup.weights == FILE:
        for stage in (0, 1):
            part, streamed = model.transformer(stage), _not_held(setup, stage)
            transformers += work.evaluations[stage] * _share(part.stored, streamed * part.largest, part.total)
    if setup.mode == RESIDENT or setup.weights == KEPT:
        again = 0
    else:
        parts = ((model.transformers[name], count) for name, count in _held(model, setup).items())
        again = transformers - sum(_share(part.stored, count * part.largest, part.total) for part, count in parts)
    return encoder + small + transformers, encoder + (0 if setup.keep_parts else small) + again


def _share(stored: int, some: int, total: int) -> int:
    return stored * some // max(total, 1)
