"""The memory model against what is counted: every phase run at full size on the meta device, without a byte of it.

What a kernel needs for itself is not counted, and nothing here was measured on a GPU.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codec_parts import decoder_sizes
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel, LTX2VocoderWithBWE
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from runtime.memory_meter import peak_of
from torch import Tensor, nn
from transformers import Gemma3TextConfig, Gemma3TextModel

from ltxpack.ltx23.codes import E4M3, I8
from ltxpack.ltx23.expected import published_configs
from ltxpack.runtime.codecs import audio, video
from ltxpack.runtime.codecs.tiles import Cut, Tiling, auto_tiling, tiling_within
from ltxpack.runtime.codecs.video import AxisTile
from ltxpack.runtime.media.images import prepare_image
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.layers import Attention, Linear
from ltxpack.runtime.model.model import DiT, Pass, Stream
from ltxpack.runtime.model.quantised import put_quantised
from ltxpack.runtime.parallel.front import Front
from ltxpack.runtime.parallel.schemes import WHOLE, Split
from ltxpack.runtime.sampling.conditioning import positions
from ltxpack.runtime.sampling.shape import AV, VideoShape
from ltxpack.runtime.text import gemma as text
from ltxpack.runtime.weights import activations
from ltxpack.runtime.weights.activations import Widths
from ltxpack.runtime.weights.sizes import read_widths

CONFIGS = published_configs()
WIDTHS = read_widths(CONFIGS, Path())
SHAPES = [VideoShape(121, 1088, 1920, 24.0), VideoShape(49, 576, 1024, 24.0), VideoShape(9, 512, 512, 24.0)]
DTYPES = [torch.bfloat16, torch.float32]
# The plan must not be short, and within a tenth; phases that are small beside all others may be farther off.
LARGE, SMALL = 1.10, 1.6

# Formulas are linear in a number's bytes: each size is counted in one of both dtypes.
shapes = pytest.mark.parametrize(("shape", "dtype"), list(zip(SHAPES, (*DTYPES, DTYPES[0]), strict=True)))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def meta(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


@functools.cache
def built(cls: type[nn.Module], component: str, dtype: torch.dtype) -> nn.Module:
    config = {name: value for name, value in CONFIGS[component].items() if not name.startswith("_")}
    with torch.device("meta"):
        module = cls(**config)
    for parameter in [*module.parameters(), *module.buffers()]:
        parameter.data = parameter.data.to(dtype)
    return module.requires_grad_(False).eval()


def check(planned: int, counted: int, tolerance: float = LARGE) -> None:
    assert counted <= planned * 1.01, f"planned {planned / 1e9:.3f} GB, counted {counted / 1e9:.3f} GB"
    assert planned <= counted * tolerance, f"planned {planned / 1e9:.3f} GB, counted {counted / 1e9:.3f} GB"


@functools.cache
def transformer(dtype: torch.dtype, codes: str = "") -> DiT:
    """Two blocks of it: what is alive does not depend on their number."""
    with torch.device("meta"):
        model = DiT(DiTConfig.from_dict({**CONFIGS["transformer"], "num_layers": 2})).to(dtype)
    linears = (name for name, module in model.transformer_blocks.named_modules() if isinstance(module, Linear))
    put_quantised(model.transformer_blocks, dict.fromkeys(linears if codes else (), codes))
    for module in model.modules():
        if isinstance(module, Attention):
            # What fused attention leaves; on the meta device torch would write the scores out.
            module.kernel = lambda query, key, value: torch.empty_like(query)
    return model


@shapes
@pytest.mark.parametrize(
    ("stage", "images", "stg"), [(1, 0, False), (1, 2, False), (1, 0, True), (2, 0, False), (2, 2, False)]
)
def test_a_stage(stage: int, images: int, stg: bool, shape: VideoShape, dtype: torch.dtype) -> None:
    check_stage(stage, images, shape, dtype, stg=stg)


@pytest.mark.parametrize("codes", [E4M3, I8])
@pytest.mark.parametrize(("stage", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_a_stage_in_codes(codes: str, stage: int, dtype: torch.dtype) -> None:
    check_stage(stage, 0, SHAPES[0], dtype, codes)


SPLITS = [(1, Split(2, 1)), (1, Split(3, 1)), (1, Split(1, 4)), (1, Split(3, 2)), (2, Split(1, 2)), (2, Split(1, 8))]
SHARED = [
    *((*way, 2, "", DTYPES[0]) for way in SPLITS),
    *((*way, 0, "", DTYPES[1]) for way in SPLITS),
    *((*way, 0, I8, DTYPES[0]) for way in (SPLITS[1], SPLITS[4])),
]


@pytest.mark.parametrize(("stage", "split", "images", "codes", "dtype"), SHARED, ids=str)
def test_a_stage_that_ranks_share(stage: int, split: Split, images: int, codes: str, dtype: torch.dtype) -> None:
    """With what is sent and got, and the padding: the tokens of stage 1 with images do not divide by four."""
    check_stage(stage, images, SHAPES[0], dtype, codes, split)


class Sent:
    """The exchanges of rank 0: as many bytes as it would get."""

    rank, alike = 0, True
    group = staticmethod(lambda split: split.shards)
    all_to_all = staticmethod(lambda parts, shards: torch.empty_like(parts))
    all_gather = staticmethod(lambda part, shards: torch.empty_like(part.expand(shards, *part.shape).contiguous()))
    broadcast = staticmethod(lambda tensor, owner: tensor)


def check_stage(
    stage: int,
    images: int,
    shape: VideoShape,
    dtype: torch.dtype,
    codes: str = "",
    split: Split = WHOLE,
    *,
    stg: bool = False,
) -> None:
    shape = shape.divided(2) if stage == 1 else shape
    model = transformer(dtype, codes)
    sent: Any = Sent()
    front = model if split == WHOLE else Front(model, sent, split)
    tokens = AV(shape.tokens + images * shape.tokens_per_frame, shape.audio_length)

    def forward() -> None:
        places = positions(shape).map(lambda where, n: where.to("meta")[:, :, :1].expand(-1, -1, n, -1), tokens)
        rope = model.rope(places, dtype, "meta")
        noisy = [tokens.map(lambda n: meta(1, n, 128, dtype=torch.float64)) for _ in range(4)]
        prompts = 2 if stage == 1 else 1
        streams = [streams_of(tokens, rope, images, dtype) for _ in range(prompts)]
        passes = [Pass(each) for each in streams]
        if stg:
            passes.append(Pass(streams[0], perturbed=AV(frozenset({0}), frozenset({0}))))
        if stage == 1:
            passes.append(Pass(streams[0], isolated=True))
        front.passes(passes)
        del noisy

    passes = 3 + stg if stage == 1 else 1
    planned = activations.sampling(WIDTHS, shape, dtype.itemsize, passes, images, codes, split, stage == 1)
    check(planned, peak_of(forward))


def streams_of(tokens: AV[int], rope: AV[object], images: int, dtype: torch.dtype) -> AV[Stream]:
    def stream(count: int, turn: object, width: int, distinct: int) -> Stream:
        times = meta(1, distinct, dtype=torch.float32)
        index = meta(count, dtype=torch.int64) if distinct > 1 else None
        sigma = meta(1, dtype=torch.float32)
        return Stream(meta(1, count, 128, dtype=dtype), times, index, sigma, meta(1, 1024, width, dtype=dtype), turn)

    return tokens.map(stream, rope, AV(WIDTHS.video, WIDTHS.audio), AV(2 if images else 1, 1))


@pytest.mark.parametrize(("layers", "dtype"), [(6, torch.bfloat16), (24, torch.float32)])
def test_the_text_encoder(layers: int, dtype: torch.dtype) -> None:
    """In the published proportions on the CPU: its masks cannot be made on the meta device."""
    width = 96
    config = Gemma3TextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        vocab_size=16,
        attn_implementation="sdpa",
    )
    encoder = Gemma3TextModel(config).to(dtype).eval().requires_grad_(False)
    ids = torch.ones(2, 1024, dtype=torch.int64)

    def encode() -> None:
        out = encoder(input_ids=ids, attention_mask=ids, output_hidden_states=True, use_cache=False)
        states = [torch.stack([layer[row] for layer in out.hidden_states], dim=-1)[None] for row in range(2)]
        del states

    sized = Widths(**{**vars(WIDTHS), "text": width, "text_inner": 4 * width, "text_layers": layers})
    check(activations.encoding(sized, dtype.itemsize), peak_of(encode), 1.2)


@dtypes
def test_the_connectors(dtype: torch.dtype) -> None:
    connectors = built(LTX2TextConnectors, "connectors", dtype)
    text.use_rounded_rotary(connectors)

    def connect() -> None:
        kept = meta(1, 1000, 3840, 49, dtype=dtype)
        states = torch.cat([kept.new_zeros(1, 24, 3840, 49), kept], dim=1)
        text.contexts(text.HiddenStates(states, meta(1, 1024, dtype=torch.int64)), connectors)

    check(activations.connecting(WIDTHS, dtype.itemsize), peak_of(connect))


def decoding(vae: nn.Module, shape: VideoShape, dtype: torch.dtype, tiling: Tiling | None = None) -> int:
    """Bytes at the largest moment of decoding a video of ``shape``."""
    move = AxisTile.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AxisTile, "to", lambda tile, _: move(tile, torch.device("meta")))
        return peak_of(lambda: sum(1 for _ in video.decode_video(vae, meta(1, 128, *shape.grid, dtype=dtype), tiling)))


@shapes
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels last"])
def test_decoding_a_video(last: bool, shape: VideoShape, dtype: torch.dtype) -> None:
    vae = built(AutoencoderKLLTX2Video, "vae", dtype)
    if last:
        vae = video.channels_last(copy.deepcopy(vae))
    official = auto_tiling(*shape.grid[1:])
    check(activations.video_decoding(WIDTHS, shape, dtype.itemsize, official), decoding(vae, shape, dtype), 1.25)


LONG = VideoShape(241, 576, 1024, 24.0)


@pytest.mark.parametrize(
    ("shape", "tiling", "dtype"),
    [
        (LONG, auto_tiling(*LONG.grid[1:]), torch.bfloat16),
        (LONG, Tiling(Cut(17, 3), Cut(18, 2), Cut(32, 2)), torch.float32),
        (SHAPES[0], Tiling(Cut(16, 3), Cut(34, 2), Cut(31, 2)), torch.bfloat16),
        (SHAPES[0], Tiling(Cut(16, 3), Cut(34, 2), Cut(60, 2)), torch.float32),
    ],
    ids=["official, tiles in the middle", "two groups", "two tiles", "one tile"],
)
def test_decoding_in_other_tiles(shape: VideoShape, tiling: Tiling, dtype: torch.dtype) -> None:
    counted = decoding(built(AutoencoderKLLTX2Video, "vae", dtype), shape, dtype, tiling)
    check(activations.video_decoding(WIDTHS, shape, dtype.itemsize, tiling), counted, 1.25)


@dtypes
@pytest.mark.parametrize("room", [2, 8, 16, 30, 80])
def test_the_plan_and_the_decoder_agree_on_tiles_that_fit(room: int, dtype: torch.dtype) -> None:
    vae = built(AutoencoderKLLTX2Video, "vae", dtype)
    sizes = activations.decoder_sizes(WIDTHS)
    assert sizes == decoder_sizes(vae)
    for shape in (SHAPES[0], LONG):
        found = tiling_within(shape.grid, sizes, dtype.itemsize, room * 10**9)
        if found != auto_tiling(*shape.grid[1:]):
            assert activations.video_decoding(WIDTHS, shape, dtype.itemsize, found) <= room * 10**9


@shapes
def test_small_phases(shape: VideoShape, dtype: torch.dtype) -> None:
    vae = built(AutoencoderKLLTX2Video, "vae", dtype)
    upsampler = built(LTX2LatentUpsamplerModel, "latent_upsampler", dtype)
    audio_vae = built(AutoencoderKLLTX2Audio, "audio_vae", dtype)
    vocoder = built(LTX2VocoderWithBWE, "vocoder", torch.float32)
    sound = meta(1, 8, shape.audio_length, 16, dtype=dtype)
    mel = meta(1, 2, 4 * shape.audio_length - 3, 64, dtype=torch.float32)
    picture = meta(1, 3, 1, shape.height, shape.width, dtype=dtype)
    half = meta(1, 128, *shape.divided(2).grid, dtype=dtype)
    phases: list[tuple[Callable[..., int], list[Callable[[], object]]]] = [
        (activations.image_encoding, [lambda: video.encode_image(vae, picture)]),
        (activations.upsampling, [lambda: upsampler(half)]),
        (activations.sound_decoding, [lambda: audio.decode_mel(audio_vae, sound), lambda: vocoder(mel)]),
    ]
    for planned, works in phases:
        check(planned(WIDTHS, shape, dtype.itemsize), max(map(peak_of, works)), SMALL)
    largest = meta(2 * shape.height, 2 * shape.width, 3, dtype=torch.uint8)
    scaled = peak_of(lambda: prepare_image(largest, shape.height, shape.width, largest.device, dtype))
    assert 0 < scaled <= activations.image_encoding(WIDTHS, shape, dtype.itemsize), "larger ones are scaled on the CPU"
