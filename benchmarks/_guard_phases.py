"""What a video costs around its stages: text, images, upsampling, sound and pictures, by the runtime's own functions.

Each part is loaded by its own loader from an overlay of the published sizes, whose weights are holes, onto the meta
device.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from _full_size import make_full_size
from _guard_operations import BFLOAT16, META, Counted
from torch import Tensor

from ltxpack.ltx23.classes import TEXT_TOKENS
from ltxpack.ltx23.expected import published_configs
from ltxpack.runtime.codecs import audio, video
from ltxpack.runtime.codecs.tiles import Tiling, tiling_within
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.recipes import RECIPES
from ltxpack.runtime.sampling.shape import AUDIO_BINS, AUDIO_CHANNELS, VIDEO_CHANNELS, VideoShape
from ltxpack.runtime.text import gemma as text
from ltxpack.runtime.weights.activations import decoder_sizes
from ltxpack.runtime.weights.load import Stored
from ltxpack.runtime.weights.sizes import read_widths

LOADERS: Mapping[str, Callable[..., Any]] = {
    "text_encoder": text.load_text_encoder,
    "connectors": text.load_connectors,
    "vae": video.load_video_vae,
    "latent_upsampler": video.load_upsampler,
    "audio_vae": audio.load_audio_vae,
    "vocoder": audio.load_vocoder,
}
# What is free for larger tiles: about what a card of 24 GB has while it decodes.
ROOM = 20 * 10**9


class Tokenizer:
    """Every prompt is as long as the model reads."""

    bos_token_id, eos_token_id, pad_token_id = 2, 1, 0

    def __call__(self, prompt: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id] * TEXT_TOKENS}


def phases(_: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """FLOP and launches of every phase of a recipe that is no stage, at the recipe's size; and FLOP of all of them.

    One image, as every stage has it, is counted beside them.
    """
    for recipe in RECIPES.values():
        request, sizes = Request.of("", recipe=recipe.name), [stage.shape for stage in recipe.stages]
        shape, whole = request.shape, 0
        found = {"text": _text(len(request.prompts))}
        for before in sizes[:-1]:
            found["upsample"] = _upsample(before(shape))
        found["sound"] = _sound(shape)
        found["video"] = _video(shape, None)
        for phase, counts in found.items():
            whole += counts["flop"]
            yield from _told(f"{recipe.name}, {phase}", counts)
        yield f"{recipe.name}, all but the stages: FLOP", whole
        image = sum((_image(size(shape)) for size in sizes), Counter[str]())
        yield from _told(f"{recipe.name}, an image", image)
        sizes_of_tiles = decoder_sizes(read_widths(published_configs(), Path()))
        tiling = tiling_within(shape.grid, sizes_of_tiles, BFLOAT16.itemsize, ROOM)
        yield from _told(f"{recipe.name}, video in large tiles", _video(shape, tiling))


def _told(name: str, counts: Counter[str]) -> Iterator[tuple[str, int]]:
    yield f"{name}: FLOP", counts["flop"]
    yield f"{name}: launches", counts["launches"]


@functools.cache
def _parts() -> dict[str, Any]:
    """Every part but the transformer, in bf16 on the meta device."""

    def empty(stored: Mapping[str, Stored], device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            name: torch.empty(each.shape, dtype=each.arriving_as(dtype), device=device) for name, each in stored.items()
        }

    with tempfile.TemporaryDirectory(prefix="ltxpack-guard-") as folder:
        root = make_full_size(Path(folder) / "overlay", blocks=1, hashed=False, forms=())
        return {name: load(root / name, META, BFLOAT16, empty) for name, load in LOADERS.items()}


def _counted(work: Callable[[dict[str, Any]], object]) -> Counter[str]:
    parts, counted = _parts(), Counted()
    with torch.inference_mode(), counted:
        work(parts)
    return counted.found


@functools.cache
def _text(prompts: int) -> Counter[str]:
    def work(parts: dict[str, Any]) -> None:
        for hidden in text.hidden_states([""] * prompts, Tokenizer(), parts["text_encoder"]):
            text.contexts(hidden, parts["connectors"])

    return _counted(work)


@functools.cache
def _image(shape: VideoShape) -> Counter[str]:
    picture = torch.empty(1, 3, 1, shape.height, shape.width, dtype=BFLOAT16, device=META)
    return _counted(lambda parts: video.encode_image(parts["vae"], picture))


@functools.cache
def _upsample(shape: VideoShape) -> Counter[str]:
    def work(parts: dict[str, Any]) -> None:
        video.upsample(parts["latent_upsampler"], video.LatentStatistics.of(parts["vae"]), _latents(shape))

    return _counted(work)


@functools.cache
def _sound(shape: VideoShape) -> Counter[str]:
    latents = torch.empty(1, AUDIO_CHANNELS, shape.audio_length, AUDIO_BINS, dtype=BFLOAT16, device=META)
    return _counted(lambda parts: audio.decode_audio(parts["audio_vae"], parts["vocoder"], latents))


@functools.cache
def _video(shape: VideoShape, tiling: Tiling | None) -> Counter[str]:
    """By its tiles, one of each shape of which is decoded; ``tiling``: None for the official ones."""
    counts, decoded = Counter[str](), dict[Any, tuple[Counter[str], Tensor]]()

    def decode(vae: video.VideoVAE, tiles: Iterable[Tensor]) -> Iterator[Tensor]:
        for tile in tiles:
            if tile.shape not in decoded:
                with Counted() as counted:
                    frames = video.decode_tile(vae, tile)
                decoded[tile.shape] = counted.found, frames
            found, frames = decoded[tile.shape]
            counts.update(found)
            yield frames

    def work(parts: dict[str, Any]) -> None:
        for _ in video.decode_video(parts["vae"], _latents(shape), tiling, decode):
            pass

    rest = _counted(work)
    once = sum((found for found, _ in decoded.values()), Counter[str]())
    return rest - once + counts


def _latents(shape: VideoShape) -> Tensor:
    return torch.empty(1, VIDEO_CHANNELS, *shape.grid, dtype=BFLOAT16, device=META)
