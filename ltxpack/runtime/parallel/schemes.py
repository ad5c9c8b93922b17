"""The ways to use several devices, by counting: the operations each saves, and the bytes that move. Needs no torch.

A stage is so many evaluations of so many passes of one forward, each pass counted as a whole one. What a scheme gains
is the work of one device over that of the busiest device of several; text, sound and frames are not counted, nor the
time in which bytes move. All sizes are of one video.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.flops import Lengths, forward_flops
from ltxpack.runtime.weights.plan import StageWork, Work

# One video over several devices; many videos over several devices.
GUIDANCE, SEQUENCE, BOTH, STAGES, DATA = "guidance", "sequence", "both", "stages", "data"
OF_ONE, OF_MANY = (GUIDANCE, SEQUENCE, BOTH), (STAGES, DATA)
# Queries, keys, values go from tokens to heads around the video's self-attention, and what was attended comes back.
TURNED, KEYS_AND_VALUES = 4, 2


@dataclass(frozen=True)
class Split:
    """How a stage is shared out: ``groups`` of ranks take its passes in turn, the ``shards`` of a group the tokens."""

    groups: int = 1
    shards: int = 1


@dataclass(frozen=True)
class Counted:
    """A way to use ``devices``, counted. ``gain``: videos in the time of one on one device, at most.

    ``splits``: of each stage; none where stages or whole videos are shared out. ``received``: bytes that come to the
    busiest device. ``shares``: of each stage, its share of a video's work on one device.
    """

    scheme: str
    devices: int
    gain: float
    received: int
    splits: tuple[Split, ...]
    shares: tuple[float, ...]


def counted(scheme: str, config: DiTConfig, work: Work, devices: int, itemsize: int) -> Counted | None:
    """``scheme`` on ``devices`` for ``work``; None where it has no use for so many: see :func:`unused`."""
    if unused(scheme, config, work, devices):
        return None
    alone = [stage_flops(config, work, stage, Split()) for stage in work.stages]
    shares = tuple(one / sum(alone) for one in alone)
    if scheme == DATA:
        return Counted(scheme, devices, float(devices), 0, (), shares)
    if scheme == STAGES:
        before, after = work.stages[0].shape, work.stages[-1].shape
        latents = values(config, before.tokens, after.audio_length) * itemsize
        return Counted(scheme, devices, sum(alone) / max(alone), latents + _contexts(config, itemsize), (), shares)
    splits = tuple(split_of(scheme, config, work, stage, devices) for stage in work.stages)
    each = list(zip(work.stages, splits, strict=True))
    busiest = sum(stage_flops(config, work, stage, split) for stage, split in each)
    received = sum(stage_received(config, work, stage, split, itemsize) for stage, split in each)
    prompts = min(2, max(stage.passes for stage in work.stages))
    received += prompts * _contexts(config, itemsize)
    return Counted(scheme, devices, sum(alone) / busiest, received, splits, shares)


def unused(scheme: str, config: DiTConfig, work: Work, devices: int) -> str:
    """Why ``scheme`` cannot use so many devices, in words; empty where it can."""
    indivisible = f"{config.streams.video.heads} heads do not divide by {devices}"
    if scheme in (GUIDANCE, BOTH) and all(stage.passes == 1 for stage in work.stages):
        return "no stage is guided"
    if scheme == SEQUENCE and not divides(config, devices):
        return indivisible
    if scheme == BOTH and all(split_of(BOTH, config, work, stage, devices).shards == 1 for stage in work.stages):
        return f"{GUIDANCE} alone does as much" if divides(config, devices) else indivisible
    if scheme == STAGES and devices != len(work.stages):
        return f"there are {len(work.stages)} stages" if len(work.stages) > 1 else "there is one stage"
    return ""


def divides(config: DiTConfig, shards: int) -> bool:
    """Whether so many ranks can share the heads of the video's self-attention."""
    return config.streams.video.heads % shards == 0


def split_of(scheme: str, config: DiTConfig, work: Work, stage: StageWork, devices: int) -> Split:
    """How ``scheme`` shares out ``stage``; one that it cannot share out is made by every rank alike."""
    if scheme == GUIDANCE:
        return Split(devices if stage.passes > 1 else 1, 1)
    if scheme == SEQUENCE:
        return Split(1, devices)
    return min(_both(config, stage, devices), key=lambda split: stage_flops(config, work, stage, split))


def stage_flops(config: DiTConfig, work: Work, stage: StageWork, split: Split) -> int:
    """What the busiest rank computes of ``stage``."""
    passes = -(-stage.passes // split.groups)
    return stage.evaluations * passes * forward_flops(config, _lengths(work, stage), split.shards)


def stage_received(config: DiTConfig, work: Work, stage: StageWork, split: Split, itemsize: int) -> int:
    """Bytes that come to the rank which gets most in ``stage``: within blocks, and velocities at their end."""
    made = -(-stage.passes // split.groups)
    lengths = _lengths(work, stage)
    tokens = _own(lengths, split.shards) * split.shards
    within = made * config.num_layers * block_received(config, lengths, split.shards, itemsize)
    # Of the passes its group makes it has its own tokens' velocities already; it makes the fewest where it gets most.
    fewest = stage.passes // split.groups
    video, audio = config.streams.video.out_channels, config.streams.audio.out_channels
    velocities = stage.passes * tokens * video - fewest * _own(lengths, split.shards) * video
    velocities += (stage.passes - fewest) * lengths.audio * audio
    return stage.evaluations * (within + (velocities * itemsize if split != Split() else 0))


def block_received(config: DiTConfig, lengths: Lengths, shards: int, itemsize: int) -> int:
    """Bytes that come to one of ``shards`` ranks in a block of one pass: to its heads and back, and keys and values of
    the others' tokens for the sound.
    """
    own, others = _own(lengths, shards), shards - 1
    turned = TURNED * own * config.streams.video.dim * others // shards
    gathered = KEYS_AND_VALUES * own * config.streams.audio.dim * others
    return (turned + gathered) * itemsize


def values(config: DiTConfig, video: int, audio: int) -> int:
    """Numbers in the latents of so many tokens."""
    return video * config.streams.video.in_channels + audio * config.streams.audio.in_channels


def _both(config: DiTConfig, stage: StageWork, devices: int) -> Iterator[Split]:
    """All ranks in groups of one size, which share the passes; a single pass is one group's."""
    for shards in range(1, devices + 1):
        groups = devices // shards
        if devices % shards == 0 and divides(config, shards) and (groups > 1) == (stage.passes > 1):
            yield Split(groups, shards)
    if stage.passes == 1:
        yield Split()


def _lengths(work: Work, stage: StageWork) -> Lengths:
    """Tokens of a forward of ``stage``; every image counts as one that is appended."""
    shape = stage.shape
    return Lengths(shape.tokens + work.images * shape.tokens_per_frame, shape.audio_length, TEXT_TOKENS)


def _own(lengths: Lengths, shards: int) -> int:
    return -(-lengths.video // shards)


def _contexts(config: DiTConfig, itemsize: int) -> int:
    """Bytes of a prompt's contexts."""
    return TEXT_TOKENS * (config.streams.video.dim + config.streams.audio.dim) * itemsize
