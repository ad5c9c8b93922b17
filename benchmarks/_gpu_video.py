"""The sections about videos: a whole one by phase, through the real sampler and codecs, and decoding by tile layout."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _flops import run_flops
from _gpu_bench import Bench, Growing, gigabytes
from _gpu_forward import compiled
from _gpu_models import Codecs, contexts, installed, random_codecs, state_of
from torch import Tensor

from ltxpack.runtime.sampling.conditioning import unpatchify
from ltxpack.runtime.sampling.guidance import Denoiser
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.sampling.sample import SAMPLERS
from ltxpack.runtime.sampling.schedule import sigmas_of
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.settings import Settings

CODEC_PACKAGE, MEDIA_PACKAGE = "diffusers", "av"
# Spec 07, section 5: TFLOP to decode the default video in one piece.
WHOLE_DECODE = 624


class Phases:
    """Seconds and peak memory of each part, in order; the device is waited for at the end of each."""

    def __init__(self, bench: Bench, table: Growing) -> None:
        self.bench, self.table = bench, table
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, flops: int = 0) -> Iterator[None]:
        """Times the block and tells its line."""
        bench = self.bench
        bench.say(name)
        bench.clock.wait()
        bench.clock.forget_peak()
        begin = time.perf_counter()
        yield
        bench.clock.wait()
        spent = bench.note(f"run.{name}", time.perf_counter() - begin)
        self.seconds[name] = spent
        rate = flops / spent / 1e12
        told = (f"{rate:.0f}", bench.share(rate)) if flops else ("-", "-")
        self.table.rows.append((name, f"{spent:.2f}", *told, gigabytes(bench.clock.peak())))


def video(bench: Bench) -> None:
    """One video of the recipe from random contexts. Both stages use the same weights: that changes no time."""
    with compiled(bench), bench.attempt("a video with compiled blocks"):
        _one_step_each(bench)
        _make(bench, "compiled")
        return
    # So that there is a time in any case.
    _one_step_each(bench)
    _make(bench, "eager")


def decode(bench: Bench) -> None:
    """The video decoder by layout of its tensors and of its tiles."""
    if not installed(CODEC_PACKAGE):
        _absent(bench, "Video decoder", CODEC_PACKAGE)
        return
    from ltxpack.runtime.codecs import video
    from ltxpack.runtime.codecs.tiles import DecoderSizes, auto_tiling, tiling_within

    table = bench.table("Video decoder", ("tensors", "tiles", "s", "TFLOP/s", "of the matrix rate", "peak GB"))
    vae = random_codecs(bench.sizes, bench.device, bench.dtype).vae
    grid = bench.sizes.shape.grid
    latents = torch.randn(1, vae.config.latent_channels, *grid, device=bench.device, dtype=bench.dtype)
    official = auto_tiling(*grid[1:])
    free = torch.cuda.mem_get_info(bench.device)[0] * 8 // 10 if bench.device.type == "cuda" else 2**30
    config, spatial = vae.config, vae.spatial_compression_ratio
    sizes = DecoderSizes(
        width=config.decoder_block_out_channels[0] // config.upsample_factor[0],
        places=vae.temporal_compression_ratio * (spatial // config.patch_size) ** 2,
        values=vae.temporal_compression_ratio * spatial**2 * config.out_channels,
    )
    fast = tiling_within(grid, sizes, latents.itemsize, free)
    for layout in ("planes", "channels last"):
        if layout == "channels last":
            video.channels_last(vae)
        for tiles, tiling in (("official", official), ("fast", fast)):
            bench.say(f"decode, {layout}, {tiles} tiles")

            def work(tiling: Any = tiling) -> None:
                for _ in video.decode_video(vae, latents, tiling):
                    pass

            work()
            bench.clock.wait()
            bench.clock.forget_peak()
            spent = bench.clock.median(work, 3.0, warm_ups=0) / 1e3
            bench.note(f"decode.{layout}.{tiles}", spent)
            rate = WHOLE_DECODE * _decoded_share(grid, tiling) / spent
            told = (f"{rate:.0f}", bench.share(rate)) if bench.device.type == "cuda" else ("-", "-")
            table.rows.append((layout, tiles, f"{spent:.2f}", *told, gigabytes(bench.clock.peak())))
    bench.release()


def _decoded_share(grid: tuple[int, int, int], tiling: Any) -> float:
    """Latents decoded in all tiles over latents of the video."""
    from ltxpack.runtime.codecs.tiles import LEADS, AxisTiles

    return math.prod(axis.decoded for axis in map(AxisTiles.of, grid, tiling, LEADS)) / math.prod(grid)


def _one_step_each(bench: Bench) -> None:
    """So that compiling is not part of the video: a warm process is measured."""
    begin = time.perf_counter()
    for number in range(2):
        sampled(bench, number, whole=False)
    bench.clock.wait()
    bench.note("run.warming up", time.perf_counter() - begin)


def _make(bench: Bench, blocks: str) -> None:
    sizes = bench.sizes
    table = bench.table(
        f"A whole video, {bench.recipe.name}, warm, {blocks}: "
        f"{sizes.shape.width} x {sizes.shape.height}, {sizes.shape.frames} frames",
        ("phase", "s", "TFLOP/s", "of the matrix rate", "peak GB"),
        "Random weights and text contexts. The text encoder is not part of it: a cached prompt does not load it.",
    )
    phases = Phases(bench, table)
    evaluations = {
        stage_label(number): (sizes.lengths(number + 1), stage.evaluations(sizes.steps), stage.guided)
        for number, stage in enumerate(bench.recipe.stages)
    }
    flops = run_flops(bench.config, evaluations)
    codecs = random_codecs(sizes, bench.device, bench.dtype) if installed(CODEC_PACKAGE) else None
    with phases.phase("stage 1", flops["stage 1"]):
        first = unpatchify(sampled(bench, 0), sizes.shape.divided(2))
    with phases.phase("upsample"):
        start = AV(_upsampled(bench, codecs, first.video), first.audio)
    with phases.phase("stage 2", flops["stage 2"]):
        second = unpatchify(sampled(bench, 1, start), sizes.shape)
    if codecs is None:
        table.note += f" {CODEC_PACKAGE} is not installed here: the upsampler is a copy, and nothing is decoded."
    else:
        _decoded(bench, codecs, second, (first, second)[bench.recipe.sound].audio, phases)
    total = bench.note("run.total", sum(phases.seconds.values()))
    table.rows.append(("all of it", f"{total:.2f}", "-", "-", "-"))


def sampled(bench: Bench, number: int, start: AV[Tensor] | None = None, *, whole: bool = True) -> AV[Tensor]:
    """The tokens of a stage; not ``whole``: of its first step alone."""
    sizes, dit, stage = bench.sizes, bench.dit, bench.recipe.stages[number]
    shape = stage.shape(sizes.shape)
    sigmas = sigmas_of(stage.schedule, shape.tokens, sizes.steps) if whole else torch.tensor([1.0, 0.9])
    state = state_of(dit, shape, float(sigmas[0]) if stage.upsampled else 1.0, start)
    positive, negative = (contexts(dit, sizes.text, seed) for seed in (11, 12))
    guidance = Settings.of({"recipe": bench.recipe.name}).guidance
    denoiser = Denoiser(dit, positive, negative, guidance) if stage.guided else Denoiser(dit, positive)
    rope = dit.rope(state.map(lambda s: s.positions), bench.dtype, bench.device)
    return SAMPLERS[stage.sampler](lambda latents, sigma: denoiser(latents, sigma, state, rope), state, sigmas)


def _upsampled(bench: Bench, parts: Codecs | None, latents: Tensor) -> Tensor:
    if parts is None:
        return latents.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    from ltxpack.runtime.codecs import video

    return video.upsample(parts.upsampler, video.LatentStatistics.of(parts.vae), latents)


def _decoded(bench: Bench, parts: Codecs, latents: AV[Tensor], sound: Tensor, phases: Phases) -> None:
    """Sound, then pictures, encoded in their thread while the next are decoded, as ``ltxpack run`` does it."""
    from ltxpack.runtime.codecs import audio, video

    if bench.device.type == "cuda":
        video.channels_last(parts.vae)
    with phases.phase("audio"):
        waveform = audio.decode_audio(parts.audio_vae, parts.vocoder, sound).cpu()
    if not installed(MEDIA_PACKAGE):
        phases.table.note += f" {MEDIA_PACKAGE} is not installed here: frames are decoded and not encoded."
        with phases.phase("video, decoded only"):
            for frames in video.decode_video(parts.vae, latents.video):
                (frames * 255).to(torch.uint8).cpu()
        return
    from ltxpack.runtime.media.mp4 import VideoWriter

    shape = bench.sizes.shape
    rate = audio.sample_rate(parts.vocoder)
    with tempfile.TemporaryDirectory() as folder, phases.phase("video"):
        path = Path(folder) / "video.mp4"
        with VideoWriter(path, shape.width, shape.height, shape.fps, rate) as writer:
            for frames in video.decode_video(parts.vae, latents.video):
                writer.write(frames)
            writer.write_audio(waveform)


def _absent(bench: Bench, title: str, package: str) -> None:
    bench.table(title, ("skipped",)).rows.append((f"{package} is not installed here",))


def diffusers_or_a_line(title: str, section: Callable[[Bench], None]) -> Callable[[Bench], None]:
    """``section`` where diffusers is installed, else a table that says that it is not."""

    def run(bench: Bench) -> None:
        if installed(CODEC_PACKAGE):
            section(bench)
        else:
            _absent(bench, title, CODEC_PACKAGE)

    return run
