"""The video VAE: pixels to normalised latents, and latents to frames, tile by tile, a group of frames at a time.

Also the upsampler between two stages: twice the height and width in latent space (spec 05, section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ltxpack.errors import OverlayError, UsageError
from ltxpack.files.tensorfile import FLOATS
from ltxpack.runtime.codecs.tiles import LEADS, Cut, Tiling, auto_tiling, split
from ltxpack.runtime.torch_settings import exact_float32
from ltxpack.runtime.weights.load import Reader, load_component, read_headers, read_tensors, verify_command

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel

VideoVAE: TypeAlias = "AutoencoderKLLTX2Video"
# Decodes many tiles in order: :func:`decode_tiles`, or a function that shares the work between ranks.
DecodeTiles: TypeAlias = "Callable[[VideoVAE, Iterable[Tensor]], Iterator[Tensor]]"
# The number of frames that are blended at once, so that the float32 copies stay small beside the frames.
BLENDED_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """Mean and deviation per latent channel, ``[C]`` each, in the model dtype."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, vae: VideoVAE) -> LatentStatistics:
        """The statistics of a loaded video VAE; they can outlive it."""
        return cls(vae.latents_mean, vae.latents_std)

    @classmethod
    def read(cls, folder: Path, channels: int, device: torch.device, dtype: torch.dtype) -> LatentStatistics:
        """The statistics alone from the files of ``vae/``, on ``device`` in ``dtype``.

        It compares no hash: a hash covers a whole file, and loading the VAE compares it. Raises OverlayError if the
        statistics are missing or do not have ``channels`` numbers; FormatError.
        """
        headers, stored = read_headers(folder), {}
        for name in ("latents_mean", "latents_std"):
            entry = headers.get(name)
            if entry is None or entry.dtype not in FLOATS or entry.shape != (channels,):
                raise OverlayError(
                    "the VAE's statistics are missing", file=entry.file if entry else folder, tensor=name,
                    expected=f"floats [{channels}]", found=entry or "none", next=verify_command(folder),
                )  # fmt: skip
            stored[name] = entry
        found = read_tensors(stored, device, dtype)
        return cls(found["latents_mean"], found["latents_std"])

    def normalise(self, latents: Tensor) -> Tensor:
        """``(z - mean) / std`` over ``[B, C, f, h, w]``, in the dtype of ``latents``."""
        mean, std = self._broadcast(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """``z * std + mean`` over ``[B, C, f, h, w]``, in the dtype of ``latents``."""
        mean, std = self._broadcast(latents)
        return latents * std + mean

    def _broadcast(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        return self.mean.view(shape).to(latents), self.std.view(shape).to(latents)


def load_video_vae(folder: Path, device: torch.device, dtype: torch.dtype, reader: Reader | None = None) -> VideoVAE:
    """The video VAE of an overlay's ``vae/``, with channels last if it goes to a GPU.

    Raises as :func:`ltxpack.runtime.weights.load.load_module`.
    """
    from diffusers import AutoencoderKLLTX2Video

    vae = load_component(AutoencoderKLLTX2Video, folder, device, dtype, reader=reader)
    return channels_last(vae) if device.type == "cuda" else vae


def channels_last(vae: VideoVAE) -> VideoVAE:
    """``vae`` itself, with the channels innermost in weights and activations.

    Convolutions use matrix units in this layout; results stay the same up to rounding. diffusers pads in time with
    tensors in planes, which would undo the layout before every convolution, so our padding replaces it.
    """
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d

    ours = type("ChannelsLastConv", (LTX2VideoCausalConv3d,), {"forward": _padded_convolution})
    vae.to(memory_format=torch.channels_last_3d)
    for module in vae.modules():
        if isinstance(module, LTX2VideoCausalConv3d):
            module.__class__ = ours
    return vae


def _padded_convolution(module: Any, x: Tensor, causal: bool = True) -> Tensor:
    """The ``forward`` of a causal convolution of diffusers' that pads into channels-last memory: ``x`` may be in
    planes, which the convolution would copy once more.

    It pads with copies of the first frame; without ``causal`` with half as many, and with copies of the last one.
    """
    missing = module.kernel_size[0] - 1
    before, after = (missing, 0) if causal else (missing // 2, missing // 2)
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, before + frames + after, height, width)
    padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    padded[:, :, :before] = x[:, :, :1]
    padded[:, :, before : before + frames] = x
    padded[:, :, before + frames :] = x[:, :, -1:]
    return module.conv(padded)


@torch.no_grad()
@exact_float32()
def encode_image(vae: VideoVAE, pixels: Tensor) -> Tensor:
    """Normalised latents ``[1, C, f, H/32, W/32]`` of ``pixels`` ``[1, 3, F, H, W]`` in [-1, 1], model dtype.

    It returns the mean of the posterior and draws nothing. One frame makes one latent frame; F is 8k + 1 (spec 04,
    section 5).
    """
    latents = vae.encode(pixels).latent_dist.mode()
    return LatentStatistics.of(vae).normalise(latents)


def decode_tiles(vae: VideoVAE, tiles: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each of ``tiles``, plain latents ``[1, C, f, h, w]``, as ``[3, 8 (f - 1) + 1, 32h, 32w]`` in [-1, 1]."""
    return (decode_tile(vae, tile) for tile in tiles)


@torch.no_grad()
@exact_float32()
def decode_tile(vae: VideoVAE, tile: Tensor) -> Tensor:
    """One tile, as :func:`decode_tiles`."""
    decoded: Tensor = vae.decode(tile, return_dict=False)[0][0]
    return decoded


def decoded_shape(vae: VideoVAE, tile: Tensor) -> tuple[int, int, int, int]:
    _, _, length, height, width = tile.shape
    spatial, frames = vae.spatial_compression_ratio, vae.temporal_compression_ratio * (length - 1) + 1
    return vae.config.out_channels, frames, height * spatial, width * spatial


@torch.no_grad()
def decode_video(
    vae: VideoVAE, latents: Tensor, tiling: Tiling | None = None, decode: DecodeTiles = decode_tiles
) -> Iterator[Tensor]:
    """The frames of normalised ``latents`` ``[1, C, f, h, w]``, in chunks ``[n, 32h, 32w, 3]`` in [0, 1].

    It yields a chunk as soon as its temporal group is decoded, in the dtype and on the device of ``latents``; together
    they are ``8 (f - 1) + 1`` frames. ``tiling`` defaults to the official layout (spec 06, section 5). ``decode`` gives
    the tiles in order.
    """
    layout = TileLayout.of(vae, latents, tiling)
    tiles = iter(decode(vae, layout.cut(LatentStatistics.of(vae).denormalise(latents))))
    tail = latents.new_empty(0, 1, 1, 1)
    for group, fresh in zip(layout.groups, fresh_frames(layout.groups), strict=True):
        frames = _blended_group(tiles, latents, layout, group, vae.config.out_channels)
        overlap = tail.shape[0]
        frames[:overlap] += tail
        tail = frames[fresh:].clone()
        if fresh:
            yield ((frames[:fresh] + 1) * 0.5).clamp(0, 1)


@dataclass(frozen=True, slots=True)
class TileLayout:
    """The tiles of a video along each axis, in the order of groups, then rows, then columns."""

    groups: list[AxisTile]
    rows: list[AxisTile]
    columns: list[AxisTile]

    @classmethod
    def of(cls, vae: VideoVAE, latents: Tensor, tiling: Tiling | None = None) -> TileLayout:
        """The layout for ``latents`` ``[1, C, f, h, w]``; ``tiling`` defaults to the official one."""
        _, _, length, height, width = latents.shape
        tiling = tiling or auto_tiling(height, width)
        scales = (vae.temporal_compression_ratio, vae.spatial_compression_ratio, vae.spatial_compression_ratio)
        axes = map(axis_tiles, (length, height, width), tiling, scales, LEADS)
        return cls(*([tile.to(latents.device) for tile in axis] for axis in axes))

    def cut(self, latents: Tensor) -> Iterator[Tensor]:
        for group, row, column in product(self.groups, self.rows, self.columns):
            yield latents[:, :, group.latents, row.latents, column.latents]


def _blended_group(
    tiles: Iterator[Tensor], latents: Tensor, layout: TileLayout, group: AxisTile, channels: int
) -> Tensor:
    """The weighted sum of one temporal group's tiles, ``[n, H, W, 3]`` in [-1, 1].

    The sums are float32, rounded once when the buffer stores them.
    """
    rows, columns = layout.rows, layout.columns
    frames = latents.new_zeros(len(group.weights), rows[-1].output.stop, columns[-1].output.stop, channels)
    for row, column in product(rows, columns):
        _blend(frames[:, row.output, column.output], next(tiles).permute(1, 2, 3, 0), group, row, column)
    return frames


def _blend(place: Tensor, tile: Tensor, group: AxisTile, row: AxisTile, column: AxisTile) -> None:
    """Adds ``tile`` times its weights to ``place``, both ``[n, h, w, 3]``."""
    parts = (values.split(BLENDED_AT_ONCE) for values in (place, tile, group.weights))
    for target, values, weights in zip(*parts, strict=True):
        outer = weights.view(-1, 1, 1, 1) * row.weights.view(1, -1, 1, 1) * column.weights.view(1, 1, -1, 1)
        target.copy_(target.float() + values.float() * outer)


@dataclass(frozen=True, slots=True)
class AxisTile:
    """One tile along one axis: the latents it decodes, its positions in the output, and the weight of each."""

    latents: slice
    output: slice
    weights: Tensor

    def to(self, device: torch.device) -> AxisTile:
        """The tile with its weights on ``device``; the CPU computes them, because its rounding is the norm."""
        return AxisTile(self.latents, self.output, self.weights.to(device))


def axis_tiles(length: int, cut: Cut, scale: int, lead: int) -> list[AxisTile]:
    """The tiles along one axis, ``scale`` positions per latent; float32 weights rise and fall where tiles overlap.

    In time (``lead`` 1) ``n`` latents decode to ``scale * (n - 1) + 1`` frames.
    """
    # i / (n + 1) for i = 1..n, with the rounding of linspace.
    edge = torch.linspace(0, 1, cut.overlap * scale + 2)[1:-1]
    tiles = []
    for number, latents in enumerate(split(length, cut, lead)):
        output = slice(latents.start * scale, (latents.stop - lead) * scale + lead)
        weights = torch.ones(output.stop - output.start)
        if number:
            weights[:lead] = 0
            weights[lead : lead + len(edge)] *= edge
        if latents.stop < length:
            weights[len(weights) - len(edge) :] *= edge.flip(0)
        tiles.append(AxisTile(latents, output, weights))
    return _summing_to_one(tiles)


def fresh_frames(groups: list[AxisTile]) -> Iterator[int]:
    """The number of final frames of each temporal group after its decoding: those before the next group."""
    for group, following in pairwise(groups):
        yield following.output.start - group.output.start
    yield groups[-1].output.stop - groups[-1].output.start


def _summing_to_one(tiles: list[AxisTile]) -> list[AxisTile]:
    """Divide the weights by their sum where more than two tiles overlap, so that it is not 1."""
    total = torch.zeros(max(tile.output.stop for tile in tiles))
    for tile in tiles:
        total[tile.output] += tile.weights
    if torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-5):
        return tiles
    total.clamp_(min=1e-8)
    return [AxisTile(tile.latents, tile.output, tile.weights / total[tile.output]) for tile in tiles]


def load_upsampler(
    folder: Path, device: torch.device, dtype: torch.dtype | None, reader: Reader | None = None
) -> LTX2LatentUpsamplerModel:
    """The upsampler of an overlay's ``latent_upsampler/``. Raises as ``load_component``."""
    from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel

    return load_component(LTX2LatentUpsamplerModel, folder, device, dtype, reader=reader)


@torch.no_grad()
@exact_float32()
def upsample(upsampler: LTX2LatentUpsamplerModel, statistics: LatentStatistics, latents: Tensor) -> Tensor:
    """Normalised latents ``[1, C, f, h, w]`` to normalised latents ``[1, C, f, 2h, 2w]``, same dtype.

    The network works on plain latents, so this takes the video VAE's statistics out and puts them back. Raises
    UsageError for a single latent if the network is too narrow for one.
    """
    norms = [module for module in upsampler.modules() if isinstance(module, nn.GroupNorm)]
    if latents[0, 0].numel() == 1 and any(norm.num_channels == norm.num_groups for norm in norms):
        # A group of one value has no variance. A network as narrow as the demo's has such groups for its smallest
        # picture.
        raise UsageError(
            "too small a video for the upsampler of this checkpoint, which normalises each channel by itself",
            expected="more than 1 latent in stage 1",
            found="1: one frame of 64x64",
            next="choose a larger --height, --width or --num-frames",
        )
    return statistics.normalise(upsampler(statistics.denormalise(latents)))
