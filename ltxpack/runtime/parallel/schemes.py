"""The schemes to use several devices, counted: the operations that each saves, and the bytes that move. Needs no torch.

A stage is so many evaluations of so many passes of one forward, each pass counted as a whole one. The gain of a scheme
is the work of one device over that of the busiest of several. Text, sound and frames are not counted, and the time in
which bytes move only if the rates of the devices are known. All sizes are of one video.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ltxpack.errors import UsageError
from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.ltx23.expected import FEED_FORWARD
from ltxpack.runtime.model.config import DiTConfig

if TYPE_CHECKING:
    from ltxpack.runtime.weights.plan import StageWork, Work

# One video over several devices; many videos over several devices.
GUIDANCE, SEQUENCE, BOTH, STAGES, DATA = "guidance", "sequence", "both", "stages", "data"
OF_ONE, OF_MANY = (GUIDANCE, SEQUENCE, BOTH), (STAGES, DATA)
# What --parallel takes: the fastest for each stage, one way for all stages, or one device for a video.
AUTO, NONE = "auto", "none"
PARALLEL: tuple[str, ...] = (AUTO, *OF_ONE, *OF_MANY, NONE)
# Queries, keys, values go from tokens to heads around the video's self-attention, and what was attended comes back.
TURNED, KEYS_AND_VALUES = 4, 2
# Parts of a forward that an isolated pass does not compute.
ACROSS = ("a2v and v2a linears", "a2v and v2a attention")


@dataclass(frozen=True)
class Split:
    """How a stage is shared out: ``groups`` of ranks take its passes in turn, the ``shards`` of a group the tokens.

    Ranks left over get the results. With one group of one, every rank makes the whole stage and nothing moves.
    """

    groups: int = 1
    shards: int = 1

    def own(self, tokens: int) -> int:
        """How many of so many tokens a rank has, padding included."""
        return -(-tokens // self.shards)

    def __str__(self) -> str:
        ways = {GUIDANCE: self.groups, SEQUENCE: self.shards}
        return " x ".join(f"{way} over {count}" for way, count in ways.items() if count > 1) or "not shared out"


WHOLE = Split()


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: ``flops``, and bytes from others over the ``link``; by default in no time."""

    flops: float = 1.0
    link: float = math.inf


@dataclass(frozen=True)
class Counted:
    """A scheme, counted. ``gain``: videos in the time of one on one device, at most.

    ``received``: bytes that come to the busiest device. ``splits``: of each stage; empty if stages or whole videos are
    shared out. ``shares``: of each stage, its share of a video's work on one device.
    """

    scheme: str
    gain: float
    received: int
    splits: tuple[Split, ...]
    shares: tuple[float, ...]


def counted(scheme: str, config: DiTConfig, work: Work, devices: int, itemsize: int) -> Counted | None:
    """``scheme`` on ``devices`` for ``work``; None if it cannot use so many, see :func:`unused`."""
    if unused(scheme, config, work, devices):
        return None
    alone = [stage_flops(config, work, stage, WHOLE) for stage in work.stages]
    shares = tuple(one / sum(alone) for one in alone)
    if scheme == DATA:
        return Counted(scheme, float(devices), 0, (), shares)
    if scheme == STAGES:
        before, after = work.stages[0].shape, work.stages[-1].shape
        streams = config.streams
        latents = before.tokens * streams.video.in_channels + after.audio_length * streams.audio.in_channels
        handed = latents * itemsize + _contexts(config, work, itemsize)
        return Counted(scheme, sum(alone) / max(alone), handed, (), shares)
    return shared(scheme, config, work, devices, itemsize)


def shared(scheme: str, config: DiTConfig, work: Work, devices: int, itemsize: int, rates: Rates = Rates()) -> Counted:
    """How ``scheme``, AUTO or one of OF_ONE, uses ``devices`` of such ``rates`` for ``work``."""

    def moved(stage: StageWork, split: Split) -> int:
        return stage_received(config, work, stage, split, itemsize)

    def seconds(stage: StageWork, split: Split) -> float:
        return stage_seconds(config, work, stage, split, itemsize, rates)

    def way(stage: StageWork) -> Split:
        if scheme != AUTO:
            return split_of(scheme, config, work, stage, devices)
        return min(_every(config, stage, devices), key=lambda split: (seconds(stage, split), moved(stage, split)))

    splits = tuple(map(way, work.stages))
    alone = [seconds(stage, WHOLE) for stage in work.stages]
    spent = sum(map(seconds, work.stages, splits))
    received = sum(map(moved, work.stages, splits)) + _contexts(config, work, itemsize)
    return Counted(scheme, sum(alone) / spent, received, splits, tuple(one / sum(alone) for one in alone))


def as_shared(work: Work, splits: tuple[Split, ...]) -> Work:
    """``work`` as the busiest rank has it if its stages are shared out like this."""
    shared_out = (replace(stage, split=split) for stage, split in zip(work.stages, splits, strict=True))
    return replace(work, stages=tuple(shared_out))


def unused(scheme: str, config: DiTConfig, work: Work, devices: int) -> str:
    """Why ``scheme`` cannot use so many devices, in words; empty if it can."""
    indivisible = f"{_heads(config)} heads do not divide by {devices}"
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
    """Whether so many ranks can share the heads of the video's self-attention and of what the sound attends with."""
    return _heads(config) % shards == 0


def check_heads(scheme: str, config: DiTConfig, devices: int) -> None:
    """Raises UsageError if ``scheme`` shares out tokens over so many devices, and the heads do not divide by them."""
    if scheme == SEQUENCE and not divides(config, devices):
        counts = [str(count) for count in range(2, _heads(config) + 1) if divides(config, count)]
        raise UsageError(
            f"--parallel {SEQUENCE} cannot share {_heads(config)} attention heads over {devices} devices",
            expected=f"{', '.join(counts)} devices",
            found=devices,
            next=f"choose other --devices, or --parallel {AUTO}",
        )


def split_of(scheme: str, config: DiTConfig, work: Work, stage: StageWork, devices: int) -> Split:
    """How ``scheme`` shares out ``stage``; every rank makes a stage that cannot be shared out."""
    if scheme == GUIDANCE:
        return Split(devices if stage.passes > 1 else 1, 1)
    if scheme == SEQUENCE:
        return Split(1, devices)
    return min(_both(config, stage, devices), key=lambda split: stage_flops(config, work, stage, split))


def stage_seconds(config: DiTConfig, work: Work, stage: StageWork, split: Split, itemsize: int, rates: Rates) -> float:
    """Seconds of the busiest rank for ``stage``: first it computes, then bytes move."""
    moved = stage_received(config, work, stage, split, itemsize)
    return stage_flops(config, work, stage, split) / rates.flops + moved / rates.link


def stage_flops(config: DiTConfig, work: Work, stage: StageWork, split: Split) -> int:
    """FLOP of the busiest rank for ``stage``."""
    passes = -(-stage.passes // split.groups)
    return stage.evaluations * passes * forward_flops(config, _lengths(work, stage), split.shards)


def video_flops(config: DiTConfig, work: Work) -> int:
    """FLOP of one device for all stages; an isolated pass counts as less than a whole one (spec 07, section 5)."""
    total = 0
    for stage in work.stages:
        full, lengths = stage.passes - stage.isolated, _lengths(work, stage)
        once = full * forward_flops(config, lengths)
        once += stage.isolated * forward_flops(config, lengths, isolated=True)
        total += stage.evaluations * once
    return total


def stage_received(config: DiTConfig, work: Work, stage: StageWork, split: Split, itemsize: int) -> int:
    """Bytes that come in ``stage`` to the rank that gets most: within blocks, and velocities at their end."""
    lengths = _lengths(work, stage)
    own, block = split.own(lengths.video), block_received(config, lengths, split, itemsize)
    video, audio = config.streams.video.out_channels, config.streams.audio.out_channels

    def received(made: int) -> int:
        """Bytes for a rank whose group makes so many passes, of which it has its own tokens' velocities."""
        tokens = stage.passes * own * split.shards - made * own
        # The sound's are those of the first rank of a group, for all others.
        sound = lengths.audio * (stage.passes - (made if split.shards == 1 else 0))
        return made * config.num_layers * block + (tokens * video + sound * audio) * itemsize

    if split == WHOLE:
        return 0
    return stage.evaluations * max(map(received, {stage.passes // split.groups, -(-stage.passes // split.groups)}))


def block_received(config: DiTConfig, lengths: Lengths, split: Split, itemsize: int) -> int:
    """Bytes that come to a rank in a block of one pass of its group.

    Of the video: queries, keys and values of its heads, and what its tokens attended to. Of the sound: keys and values
    of its heads, and what the others' heads attended to.
    """
    own, others = split.own(lengths.video), split.shards - 1
    video, audio = config.streams.video.dim // split.shards, config.streams.audio.dim // split.shards
    turned = TURNED * own * video + KEYS_AND_VALUES * own * audio
    return (turned + lengths.audio * audio) * others * itemsize


def _both(config: DiTConfig, stage: StageWork, devices: int) -> Iterator[Split]:
    """As many groups of one size as there are devices for, if there are several passes; else one group."""
    for shards in range(1, devices + 1):
        groups = devices // shards if stage.passes > 1 else 1
        if divides(config, shards) and (groups > 1 or stage.passes == 1):
            yield Split(groups, shards)


def _every(config: DiTConfig, stage: StageWork, devices: int) -> Iterator[Split]:
    """All ways to share out a stage: few groups first."""
    for groups in range(1, min(stage.passes, devices) + 1):
        for shards in range(1, devices // groups + 1):
            if divides(config, shards):
                yield Split(groups, shards)


def _heads(config: DiTConfig) -> int:
    """The largest number of ranks that can share the heads of both modalities."""
    return math.gcd(config.streams.video.heads, config.streams.audio.heads)


def _lengths(work: Work, stage: StageWork) -> Lengths:
    """Tokens of a forward of ``stage``; every image counts as an appended frame."""
    shape = stage.shape
    return Lengths(shape.tokens + work.images * shape.tokens_per_frame, shape.audio_length, TEXT_TOKENS)


def _contexts(config: DiTConfig, work: Work, itemsize: int) -> int:
    """Bytes of the contexts of a video's prompts; the negative one counts if a stage is guided."""
    prompts = min(2, max(stage.passes for stage in work.stages))
    return prompts * TEXT_TOKENS * (config.streams.video.dim + config.streams.audio.dim) * itemsize


@dataclass(frozen=True)
class Lengths:
    video: int
    audio: int
    text: int


def forward_parts(config: DiTConfig, lengths: Lengths, ranks: int = 1) -> dict[str, int]:
    """FLOP of one forward by part, over all blocks; batch 1; 2 per multiply-add, as in spec 07 section 5.

    Counts matrix products and attention; leaves out norms, rotations and gates, and the AdaLN layers and the
    projections into and out of the model, which run once and not per block (0.01 % of a forward). ``ranks``: FLOP of
    one of this many ranks that share the video's tokens; each computes audio and text.
    """
    video, audio = config.streams.video, config.streams.audio
    v, a, text = lengths.video, lengths.audio, lengths.text
    own, inner = -(-v // ranks), audio.dim
    per_block = {
        "video self-attention linears": _queries(own, video.dim, video.dim, video.heads)
        + 2 * linear(own, video.dim, video.dim),
        "video text linears": _queries(own, video.dim, video.dim, video.heads) + 2 * linear(text, video.dim, video.dim),
        "video feed-forward": 2 * linear(own, video.dim, FEED_FORWARD * video.dim),
        "a2v and v2a linears": (
            _queries(own, video.dim, inner, audio.heads)
            + _queries(a, audio.dim, inner, audio.heads)
            + 2 * linear(a, audio.dim, inner)
            + 2 * linear(own, video.dim, inner)
        ),
        "audio linears": (
            2 * _queries(a, audio.dim, audio.dim, audio.heads)
            + 2 * linear(a, audio.dim, audio.dim)
            + 2 * linear(text, audio.dim, audio.dim)
            + 2 * linear(a, audio.dim, FEED_FORWARD * audio.dim)
        ),
        # All tokens attend with a share of the heads, or a share of the tokens with all heads.
        "video self-attention": _attention(own, v, video.dim),
        "text attention": _attention(own, text, video.dim),
        "a2v and v2a attention": _attention(own, a, inner) + _attention(a, v, inner) // ranks,
        "audio attention": _attention(a, a + text, audio.dim),
    }
    return {part: config.num_layers * count for part, count in per_block.items()}


def forward_flops(config: DiTConfig, lengths: Lengths, ranks: int = 1, *, isolated: bool = False) -> int:
    """FLOP of one pass on one rank, or on each of ``ranks`` that share it."""
    parts = forward_parts(config, lengths, ranks)
    return sum(count for part, count in parts.items() if not (isolated and part in ACROSS))


def linear(tokens: int, fan_in: int, fan_out: int) -> int:
    """A product of ``tokens`` rows with a weight [fan_out, fan_in]."""
    return 2 * tokens * fan_in * fan_out


def _queries(tokens: int, dim: int, inner: int, heads: int) -> int:
    """Queries, the gate per head and the output projection."""
    return linear(tokens, dim, inner) + linear(tokens, dim, heads) + linear(tokens, inner, dim)


def _attention(queries: int, keys: int, inner: int) -> int:
    """Scores, and values weighted by them."""
    return 2 * 2 * queries * keys * inner
