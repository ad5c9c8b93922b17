"""The bytes of a phase on the device beside its weights. The constants are counts of live tensors.

Each formula is the largest moment of its phase run eagerly: what PyTorch has allocated, without kernel workspaces.
test_activations.py runs the phases at full size on the meta device and compares: a change of the computation that keeps
other tensors alive shows there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ltxpack.ltx23.classes import SPATIAL_FACTOR, TEMPORAL_FACTOR, TEXT_TOKENS
from ltxpack.ltx23.codes import I8
from ltxpack.ltx23.expected import FEED_FORWARD
from ltxpack.runtime.codecs.tiles import DecoderSizes, Tiles, Tiling
from ltxpack.runtime.parallel.schemes import WHOLE, Split
from ltxpack.runtime.sampling.shape import VIDEO_CHANNELS, VideoShape

FLOAT32, INT32, FLOAT64 = 4, 4, 8
PROMPTS = 2
COLOURS = 3
# The planner asks for one video again and again.
MEMORY = 256
# Rows that become codes, in two float32 copies.
CODED = 2 * 2**22 * FLOAT32


@dataclass(frozen=True)
class Widths:
    """The sizes in the components' configs that activations follow.

    ``decoder`` channels and ``patch`` pixels of the video decoder's last stage; ``mel`` channels times bins of the
    audio decoder; ``sound`` channels times samples per audio latent in the vocoder's widest layer.
    """

    video: int
    audio: int
    text: int
    text_layers: int
    text_inner: int
    encoder: int
    decoder: int
    patch: int
    upsampler: int
    mel: int
    sound: int


@functools.lru_cache(MEMORY)
def sampling(
    widths: Widths,
    shape: VideoShape,
    itemsize: int,
    passes: int,
    images: int,
    codes: str = "",
    split: Split = WHOLE,
    isolated: bool = False,
) -> int:
    """A forward of the DiT over all its ``passes``, with the tables and states that live through a stage.

    At the feed-forward of the last pass there are: the stream, its normed and modulated copies, and two inner tensors
    of four widths; the inputs and outputs of each pass; the attended states of each pass but an ``isolated`` one, which
    shares those of the first; the context and its keys and values of each prompt. Each image counts as one appended
    frame. With weights in ``codes``, a few rows are float32 before they become codes, and a weight may be decoded (for
    a short video in place of an inner tensor); with int8, one inner tensor is codes and one is int32 before it is
    scaled.
    A rank has the share of one group of ``split`` in the passes, and of one of its shards in the video's tokens,
    padded, with tables of its own beside the whole ones. Exchanges take less than the inner tensors. If shares are
    small, the largest moment is when the tables are made, in float32.
    """
    prompts, passes = min(passes, PROMPTS), -(-passes // split.groups)
    own_prompts, attended = min(passes, PROMPTS), passes - (isolated and split.groups == 1)
    tokens = shape.tokens + images * shape.tokens_per_frame
    own = split.own(tokens)
    held = 1 + 2 * FEED_FORWARD + 2 * passes + attended + (1 if images else 0)
    states = held * (own * widths.video + shape.audio_length * widths.audio)
    text = (2 * own_prompts + prompts) * TEXT_TOKENS * (widths.video + widths.audio)
    rope = (tokens + (own if split.shards > 1 else 0)) * (widths.video + widths.audio)
    sampler = 4 * tokens * VIDEO_CHANNELS * FLOAT64
    inner = FEED_FORWARD * widths.video
    coded = inner * own * (1 + max(0, INT32 - itemsize)) if codes == I8 else 0
    coded += inner * max(0, widths.video - own) * itemsize + CODED if codes else 0
    return max((states + text + rope) * itemsize + sampler + coded, 2 * tokens * widths.video * FLOAT32)


def hidden_states(widths: Widths, itemsize: int) -> int:
    """The text encoder's result for a batch of prompts: every layer's output and the embedding."""
    return PROMPTS * TEXT_TOKENS * widths.text * (widths.text_layers + 1) * itemsize


def contexts(widths: Widths, itemsize: int) -> int:
    """The connectors' result for a batch of prompts."""
    return PROMPTS * TEXT_TOKENS * (widths.video + widths.audio) * itemsize


def encoding(widths: Widths, itemsize: int) -> int:
    """The text encoder: its hidden states twice as they are stacked, or once and a layer at work."""
    tokens = PROMPTS * TEXT_TOKENS
    layer = tokens * (3 * widths.text_inner + 5 * widths.text) * itemsize
    kept = hidden_states(widths, itemsize)
    return kept + max(kept, layer)


def connecting(widths: Widths, itemsize: int) -> int:
    """The connectors on one prompt: the hidden states of all, three copies of its own, and a feed-forward."""
    states = hidden_states(widths, itemsize)
    return states + 3 * states // PROMPTS + TEXT_TOKENS * widths.video * (2 * FEED_FORWARD + 10) * itemsize


def image_encoding(widths: Widths, shape: VideoShape, itemsize: int) -> int:
    """The video encoder on one image of full size: a convolution of the first stage and its padded input."""
    return 12 * widths.encoder * shape.height * shape.width // widths.patch**2 * itemsize


def upsampling(widths: Widths, shape: VideoShape, itemsize: int) -> int:
    """The latent upsampler at its output's size: four tensors in a residual block."""
    return (4 * widths.upsampler + 2 * VIDEO_CHANNELS) * shape.tokens * itemsize


def sound_decoding(widths: Widths, shape: VideoShape, itemsize: int) -> int:
    """The audio decoder, or the vocoder in float32: a periodic activation at twice the rate."""
    spectrogram = 8 * widths.mel * 4 * shape.audio_length * itemsize
    wave = 14 * widths.sound * shape.audio_length * FLOAT32
    return max(spectrogram, wave)


def decoder_sizes(widths: Widths) -> DecoderSizes:
    """The sizes that the memory of the video decoder's tiles follows."""
    places = TEMPORAL_FACTOR * (SPATIAL_FACTOR // widths.patch) ** 2
    return DecoderSizes(widths.decoder, places, TEMPORAL_FACTOR * SPATIAL_FACTOR**2 * COLOURS)


@functools.lru_cache(MEMORY)
def video_decoding(widths: Widths, shape: VideoShape, itemsize: int, tiling: Tiling) -> int:
    """The video decoder on one tile of ``tiling``, and the frames around it.

    The largest moment of a tile is a convolution of the last stage with its input padded by two frames, or taking the
    patches apart. The frames are those of the group under way, and if there are several groups, of the one before and
    its chunk handed out. A group's chunk is made in three steps at its end.
    """
    tile = Tiles.of(shape.grid, tiling).largest
    frames = _frames(tile[0])
    area = math.prod(tile[1:]) * SPATIAL_FACTOR**2
    patches = area // widths.patch**2
    conv = (9 * frames + 8) * widths.decoder * patches // 2
    unpatch = 2 * 3 * frames * area
    group = frames * 3 * shape.height * shape.width
    held = group if shape.grid[0] <= tile[0] else 3 * group
    return max(max(conv, unpatch) + held + 3 * frames * area, 3 * group) * itemsize


@functools.lru_cache(MEMORY)
def frames_on_host(shape: VideoShape, tiling: Tiling) -> int:
    """Decoded frames on their way to the video encoder: two groups, 8-bit."""
    return 2 * _frames(Tiles.of(shape.grid, tiling).largest[0]) * 3 * shape.height * shape.width


def _frames(latents: int) -> int:
    return TEMPORAL_FACTOR * (latents - 1) + 1
