"""From sizes and a machine to a plan: which weights stay where, what each phase takes, what is read from disk.

Pure: the same sizes, work and machine give the same plan. The ways to run are tried from the fastest to the smallest;
the first that fits is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from ltxpack.runtime.planning import activations
from ltxpack.runtime.planning.machine import Machine
from ltxpack.runtime.planning.sizes import TEXT_ENCODER, Model
from ltxpack.runtime.shape import VideoShape

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

SLOTS = 2
# What the process has in host memory before anything is loaded, and its buffers for reading.
PROCESS = 1_500_000_000
# Three readers (what is needed now, what is loaded ahead, blocks from a file) of eight pinned pieces each.
READ_BUFFERS = 3 * 8 * 32 * 1024 * 1024
# On the card, beyond what is counted: kernel workspaces and the allocator's gaps.
SLACK, SLACK_SHARE = 300_000_000, 0.1
STAGE2_STEPS = 3


@dataclass(frozen=True)
class Work:
    """What is asked for: a video's shape, the steps of stage 1, the number of images it is conditioned on."""

    shape: VideoShape
    steps: int = 15
    images: int = 0

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
    """One way to run. ``streamed``: how many of each stage's blocks pass through the slots; the others stay."""

    mode: str
    keep_parts: bool = False
    weights: str = DISK
    text: str = WHOLE
    streamed: tuple[int, int] = (0, 0)


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
    """A way to run and what it takes. ``first_read`` and ``next_read``: bytes read from disk for the first video, and
    for each further one with another prompt.
    """

    setup: Setup
    phases: tuple[Phase, ...]
    first_read: int
    next_read: int
    stages: tuple[str, str]
    blocks: tuple[int, int]

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
        plan = plan_for(model, work, _filled(model, work, machine, setup) if mode == AUTO else _all(model, setup))
        if shortage(plan, machine) is None:
            return plan
    return None


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
    """The first phase of ``plan`` that does not fit ``machine``; None if all fit."""
    for phase in plan.phases:
        if machine.card is None:
            needs = [Shortage(phase, "host", phase.needed + phase.host, machine.host)]
        else:
            needs = [
                Shortage(phase, "card", phase.needed + machine.context, machine.card),
                Shortage(phase, "host", phase.host, machine.host),
            ]
        for need in needs:
            if need.needed > need.free:
                return need
    return None


def plan_for(model: Model, work: Work, setup: Setup) -> Plan:
    """What ``setup`` takes."""
    first, following = _reads(model, work, setup)
    blocks = tuple(len(model.transformer(stage).blocks) for stage in (0, 1))
    phases = tuple(_phases(model, work, setup))
    return Plan(setup, phases, first, following, model.stages, (blocks[0], blocks[1]))


def _setups(mode: str) -> Iterator[Setup]:
    """The ways to run in ``mode``, best first."""
    texts = (WHOLE, LAYERS, LAYERS_FROM_FILE)
    if mode in (RESIDENT, AUTO):
        yield from (Setup(RESIDENT, parts, DISK, text) for parts, text in product((True, False), texts))
    if mode in (SWAP, AUTO):
        ways = product((True, False), (KEPT, STAGED, DISK), texts)
        yield from (Setup(SWAP, parts, weights, text) for parts, weights, text in ways)
    if mode in (STREAM, AUTO):
        ways_to_stream = product((KEPT, BLOCKS, FILE), texts)
        yield from (Setup(STREAM, False, weights, text) for weights, text in ways_to_stream)


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


def _phases(model: Model, work: Work, setup: Setup) -> Iterator[Phase]:
    itemsize, widths = model.itemsize, model.widths
    kept = _kept(model, setup)
    host = PROCESS + READ_BUFFERS + _host_copies(model, setup)
    hidden = activations.hidden_states(widths, itemsize)

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
    frames = activations.frames_on_host(work.shape)
    yield phase("video", part("vae"), activations.video_decoding, work.shape, more_host=frames)


def _stage(model: Model, work: Work, setup: Setup, stage: int, host: int) -> Phase:
    part = model.transformer(stage)
    streamed = setup.streamed[stage]
    kept = _kept(model, setup)
    if setup.mode == SWAP:
        kept += part.total
    if setup.mode == STREAM:
        kept += part.rest + sum(part.blocks) - streamed * part.largest + min(SLOTS, streamed) * part.largest
    more = streamed * part.largest if setup.weights == BLOCKS else 0
    taken = activations.sampling(
        model.widths, work.stages[stage], model.itemsize, guided=stage == 0, images=work.images
    )
    return Phase(f"stage {stage + 1}", kept, taken, host + more)


def _kept(model: Model, setup: Setup) -> int:
    """Weights that are on the card through every phase."""
    parts = model.small if setup.keep_parts else 0
    return parts + (model.all_transformers if setup.mode == RESIDENT else 0)


def _host_copies(model: Model, setup: Setup) -> int:
    """Transformers in pinned memory, through every phase."""
    if setup.weights == KEPT:
        return model.all_transformers
    if setup.weights == STAGED:
        return max(part.total for part in model.transformers.values())
    return 0


def _reads(model: Model, work: Work, setup: Setup) -> tuple[int, int]:
    """Bytes from disk for the first video and for each further one with another prompt, if no cache helps."""
    text = model.parts[TEXT_ENCODER]
    encoder = text.stored
    if setup.text == LAYERS_FROM_FILE:
        encoder += _share(text.stored, sum(text.blocks), text.total)
    stored = {name: model.parts[name].stored for name in model.parts if name != TEXT_ENCODER}
    # The video VAE is wanted for images, for its latent statistics, and to decode.
    again = 0 if setup.keep_parts else stored["vae"] * (2 if work.images else 1)
    small = sum(stored.values()) + again
    transformers = sum(part.stored for part in model.transformers.values())
    if setup.weights == FILE:
        for stage in (0, 1):
            part, streamed = model.transformer(stage), setup.streamed[stage]
            transformers += work.evaluations[stage] * _share(part.stored, streamed * part.largest, part.total)
    stay = setup.mode == RESIDENT or setup.weights == KEPT
    return encoder + small + transformers, encoder + (0 if setup.keep_parts else small) + (0 if stay else transformers)


def _share(stored: int, some: int, total: int) -> int:
    return stored * some // max(total, 1)
