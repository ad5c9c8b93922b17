"""Carries out a recipe: text, stages, upsampler, sound, pictures (spec 05, section 5; spec 08, section 2).

:func:`sample` and :func:`_make_stage` show the steps of a video from top to bottom. The session decides what is on the
device; recipe, samplers, codecs and DiT make the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltxpack.ltx23.classes import TEMPORAL_FACTOR
from ltxpack.runtime.codecs import audio, video
from ltxpack.runtime.codecs.tiles import FAST
from ltxpack.runtime.media.images import load_image, prepare_image
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.model.quantised import decode_weights
from ltxpack.runtime.request import ImageSpec, Request
from ltxpack.runtime.sampling.conditioning import ImageItem, initial_state, unpatchify
from ltxpack.runtime.sampling.guidance import Denoiser
from ltxpack.runtime.sampling.recipes import stage_label
from ltxpack.runtime.sampling.sample import SAMPLERS
from ltxpack.runtime.sampling.schedule import sigmas_of
from ltxpack.runtime.sampling.shape import AV, LONGEST_SECONDS, VideoShape
from ltxpack.runtime.session import Session
from ltxpack.runtime.video import Latents, Video
from ltxpack.runtime.weights.plan import Work

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTX2Audio


@dataclass
class Underway:
    """A video on its way through the stages: its inputs, and its results so far.

    ``images``: encoded in the size of each stage. One generator draws the first noise of all stages in order, video
    before audio.
    """

    contexts: Sequence[AV[Tensor]]
    images: list[list[ImageItem]]
    generator: torch.Generator
    made: list[AV[Tensor]] = field(default_factory=list)
    upsampled: Tensor | None = None


@dataclass(frozen=True)
class Halfway:
    """A video after its first stage, on the host, which another device finishes.

    ``noise`` is the state of the generator, ``seconds`` has the time of each phase.
    """

    made: tuple[AV[Tensor], ...]
    images: list[list[ImageItem]]
    noise: Tensor
    seconds: dict[str, float]


@torch.inference_mode()
def sample(
    session: Session, request: Request, following: Request | None = None, halfway: Halfway | None = None
) -> Latents:
    """From the request, or from its first stage, to the latents of every stage. Raises LtxpackError.

    ``following`` is the next video: the session loads its first transformer while the last stage runs.
    """
    underway = _begun(session, request) if halfway is None else _resumed(session, request, halfway)
    _make_stages(session, request, underway, range(len(underway.made), len(request.recipe.stages)), following)
    return Latents(tuple(underway.made), underway.upsampled)


def _begun(session: Session, request: Request) -> Underway:
    """The video before its first stage: text and images encoded."""
    asked = request.settings.image_crf
    crf = session.overlay.manifest.image_crf if asked is None else asked
    # Before anything is loaded, so that a bad file fails at once.
    pictures = [load_image(image.path, crf) for image in request.images]
    generator = torch.Generator(device=session.device).manual_seed(request.settings.seed)
    session.load_ahead(session.transformers(request.recipe).stages[0])
    with session.timings.phase("text"):
        contexts = session.ranks.contexts(lambda: session.prompts.contexts(request.prompts, session.reporter))
    with session.timings.phase("images"):
        images = _encoded(session, request, pictures)
    return Underway(contexts, images, generator)


def _resumed(session: Session, request: Request, halfway: Halfway) -> Underway:
    """The video after its first stage, which another device made."""
    session.load_ahead(session.transformers(request.recipe).stages[1])
    contexts = session.prompts.contexts(request.prompts, session.reporter)
    generator = torch.Generator(device=session.device)
    generator.set_state(halfway.noise)
    made = [stage.map(lambda part: part.to(session.device)) for stage in halfway.made]
    return Underway(contexts, _moved(halfway.images, session.device), generator, made)


def _encoded(session: Session, request: Request, pictures: Sequence[Tensor]) -> list[list[ImageItem]]:
    """The images encoded in the size of each stage."""
    shapes = [stage.shape(request.shape) for stage in request.recipe.stages]
    if not pictures:
        return [[] for _ in shapes]

    def item(vae: video.VideoVAE, image: ImageSpec, picture: Tensor, shape: VideoShape) -> ImageItem:
        pixels = prepare_image(picture, shape.height, shape.width, session.device, session.dtype)
        return ImageItem(image.frame, image.strength, video.encode_image(vae, pixels))

    def encode(vae: video.VideoVAE) -> list[list[ImageItem]]:
        pairs = list(zip(request.images, pictures, strict=True))
        return [[item(vae, image, picture, shape) for image, picture in pairs] for shape in shapes]

    return session.residency.use("vae", video.load_video_vae, encode)


def _make_stages(
    session: Session, request: Request, underway: Underway, numbers: range, following: Request | None
) -> None:
    """Make the stages ``numbers``; during the last one, load the transformer of the first one for ``following``."""
    ahead = [*session.transformers(request.recipe).stages[numbers.start + 1 : numbers.stop], None]
    if following is not None:
        ahead[-1] = session.transformers(following.recipe).stages[numbers.start]
    for number, name in zip(numbers, ahead, strict=True):
        _make_stage(session, request, underway, number, name)


def _make_stage(session: Session, request: Request, underway: Underway, number: int, ahead: str | None) -> None:
    """Make stage ``number``, and load the transformer ``ahead`` meanwhile."""
    stage, settings = request.recipe.stages[number], request.settings
    shape = stage.shape(request.shape)
    sigmas = sigmas_of(stage.schedule, shape.tokens, settings.steps)
    start, noise_scale = None, 1.0
    if stage.upsampled:
        with session.timings.phase("upsample"):
            underway.upsampled = session.upsample(underway.made[-1].video)
        start, noise_scale = AV(underway.upsampled, underway.made[-1].audio), float(sigmas[0])

    def denoised(model: DiT) -> AV[Tensor]:
        if ahead is not None:
            session.load_ahead(ahead)
        negative, guidance = (underway.contexts[1], settings.guidance) if stage.guided else (None, None)
        denoiser = Denoiser(session.ranks.front(model, number), underway.contexts[0], negative, guidance)
        kept = request.kept_steps(number)
        rope = model.rope(state.map(lambda s: s.positions), session.dtype, session.device)

        def on_step(done: int, total: int) -> None:
            session.reporter.advance()
            decode_weights(model, done in kept)

        session.reporter.begin(stage_label(number), len(sigmas) - 1, "step")
        decode_weights(model, 0 in kept)
        sampler = SAMPLERS[stage.sampler]
        tokens = sampler(lambda latents, sigma: denoiser(latents, sigma, state, rope), state, sigmas, on_step=on_step)
        session.reporter.end()
        return tokens

    with session.timings.phase(stage_label(number)):
        images, generator = underway.images[number], underway.generator
        state = initial_state(shape, start, images, noise_scale, generator, session.device, session.dtype)
        name = session.transformers(request.recipe).stages[number]
        underway.made.append(unpatchify(session.transform(name, denoised), shape))


def generate(
    session: Session,
    request: Request,
    *,
    following: Request | None = None,
    once: bool = False,
    halfway: Halfway | None = None,
) -> tuple[Latents, Tensor, int]:
    """Everything but the frames: latents, waveform ``[2, N]`` float32 and its sample rate. Restarts the timings.

    ``following``: the next video, if known. ``once``: there is no next video, so that the plan need not keep weights
    for it. ``halfway``: the first stage, made by another device. Raises LtxpackError.
    """
    latents = latents_of(session, request, following, once, halfway)
    sound = latents.stages[request.recipe.sound].audio
    return latents, *session.within_memory(lambda: decode_audio(session, sound))


def latents_of(
    session: Session, request: Request, following: Request | None, once: bool, halfway: Halfway | None = None
) -> Latents:
    """The part of :func:`generate` that every rank carries out."""
    work = _prepare(session, request, once)
    with session.ranks.together(work, session.numerics, request, following, once):
        return session.within_memory(lambda: sample(session, request, following, halfway))


def _prepare(session: Session, request: Request, once: bool = False) -> Work:
    """Begin a new video: its timings, its warnings, and the plan for its work."""
    session.check_open()
    session.begin_video()
    shape = request.shape
    if shape.frames > shape.longest:
        session.reporter.warn(
            f"{shape.frames} frames at {shape.fps:g} fps: the model was trained for at most {shape.longest}"
            f" ({LONGEST_SECONDS} s); the video may drift or repeat itself"
        )
    for told in request.without_effect:
        session.reporter.warn(told)
    work = work_of(session, request, session.prompts.ahead, once)
    session.prepare([work])
    return work


def first_stage(session: Session, request: Request, following: Request | None) -> Halfway:
    """The first stage alone; another device passes it to :func:`generate` as ``halfway``. Raises LtxpackError."""
    _prepare(session, request)

    @torch.inference_mode()
    def make() -> Halfway:
        underway = _begun(session, request)
        _make_stages(session, request, underway, range(1), following)
        made = tuple(stage.map(Tensor.cpu) for stage in underway.made)
        noise, seconds = underway.generator.get_state(), dict(session.timings.seconds)
        return Halfway(made, _moved(underway.images, "cpu"), noise, seconds)

    return session.within_memory(make)


def _moved(images: list[list[ImageItem]], device: torch.device | str) -> list[list[ImageItem]]:
    return [[replace(item, latents=item.latents.to(device)) for item in stage] for stage in images]


def finish(
    session: Session, request: Request, latents: Latents, frames: list[Tensor], waveform: Tensor, sample_rate: int
) -> Video:
    """The Video of these parts; empties ``frames`` (chunks ``[n, H, W, 3]``)."""
    return Video(
        frames=_joined(frames),
        waveform=waveform,
        sample_rate=sample_rate,
        fps=request.shape.fps,
        seed=request.settings.seed,
        recipe=request.recipe.name,
        transformers=session.transformers(request.recipe).stages,
        latents=latents,
        seconds=dict(session.timings.seconds),
    )


def encode_ahead(session: Session, requests: Sequence[Request]) -> float:
    """Encode the prompts of all ``requests`` with one load of the text encoder; returns the seconds."""
    session.check_open()
    begin = time.perf_counter()
    batches = [request.prompts for request in requests]
    together = len(set(batches))
    session.prepare([work_of(session, request, together) for request in requests])
    with torch.inference_mode():
        session.within_memory(lambda: session.prompts.encode_ahead(batches, session.reporter))
    return time.perf_counter() - begin


def decode_audio(session: Session, latents: Tensor) -> tuple[Tensor, int]:
    """The waveform ``[2, N]`` float32 and its sample rate, from audio latents (spec 04, section 9)."""

    def decode(vae: AutoencoderKLLTX2Audio) -> tuple[Tensor, int]:
        return session.residency.use(
            "vocoder",
            audio.load_vocoder,
            lambda vocoder: (audio.decode_audio(vae, vocoder, latents).cpu(), audio.sample_rate(vocoder)),
        )

    with session.timings.phase("audio"):
        return session.residency.use("audio_vae", audio.load_audio_vae, decode)


def decode_video(session: Session, latents: Tensor, write: Callable[[Tensor], object]) -> None:
    """Pass the frames ``[n, H, W, 3]`` in [0, 1] to ``write``, chunk by chunk, in order.

    It decodes the official tiles, or larger ones if the plan has them.
    """
    plan = session.residency.plan
    tiling = None if plan is None or plan.work.decode != FAST else plan.tiling

    def decode(vae: video.VideoVAE) -> None:
        session.reporter.begin("decode", (latents.shape[2] - 1) * TEMPORAL_FACTOR + 1, "frame")
        shared = session.ranks.decoding(latents) if tiling is None else nullcontext(video.decode_tiles)
        with shared as decode_tiles:
            for frames in video.decode_video(vae, latents, tiling, decode_tiles):
                write(frames)
                session.reporter.advance(len(frames))
        session.reporter.end()

    with session.timings.phase("video"):
        session.residency.use("vae", video.load_video_vae, decode)


@torch.no_grad()
def decode_share(session: Session, latents: Tensor, decode: video.DecodeTiles) -> None:
    """The part of :func:`decode_video` for a rank other than 0, whose ``decode`` sends its tiles to rank 0."""

    def share(vae: video.VideoVAE) -> None:
        tiles = video.TileLayout.of(vae, latents).cut(video.LatentStatistics.of(vae).denormalise(latents))
        for _ in decode(vae, tiles):
            raise AssertionError("the blending is done on rank 0")

    session.residency.use("vae", video.load_video_vae, share)


def work_of(session: Session, request: Request, together: int = 1, once: bool = False) -> Work:
    """The work of ``request``, for the planner; the prompts of ``together`` videos are encoded at once.

    Raises UsageError for a size without a schedule, and for blocks that the transformer does not have.
    """
    for stage in request.recipe.stages:
        sigmas_of(stage.schedule, stage.shape(request.shape).tokens, request.settings.steps)
    if any(stage.guided for stage in request.recipe.stages):
        session.check_blocks(request.settings.guidance)
    work = request.work(session.transformers(request.recipe).stages, prompts=max(1, together), once=once)
    return session.ranks.share(replace(work, only=session.only))


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts joined; each is freed after its copy, so that memory does not hold all frames twice."""
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    start = 0
    while parts:
        part = parts.pop(0)
        whole[start : start + len(part)] = part
        start += len(part)
    return whole
