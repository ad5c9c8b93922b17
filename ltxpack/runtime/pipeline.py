"""The two-stage HQ recipe: text, stage 1, upsampler, stage 2, decode (spec 05, section 5).

Reads top to bottom as the video is made. Which part is on the device when is the residency's business, the
numbers are the samplers', codecs' and the DiT's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, Unpack

import torch
from diffusers import AutoencoderKLLTX2Video
from torch import Tensor

from ltxpack.errors import DeviceError, UsageError
from ltxpack.manifest import FileRecord
from ltxpack.reporter import ProgressReporter, Reporter, SilentReporter
from ltxpack.runtime import codecs
from ltxpack.runtime.compiled import compile_dit
from ltxpack.runtime.large_tiles import FAST
from ltxpack.runtime.media import load_image, prepare_image
from ltxpack.runtime.model import kernels
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.model.weights import load_dit, read_dit_config
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.request import ImageSpec, Request, Settings
from ltxpack.runtime.sampling.av import AV
from ltxpack.runtime.sampling.conditioning import ImageItem, LatentState, VideoShape, initial_state, unpatchify
from ltxpack.runtime.sampling.guidance import Denoiser, Guidance
from ltxpack.runtime.sampling.sample import res2s
from ltxpack.runtime.sampling.schedule import stage1_sigmas, stage2_sigmas
from ltxpack.runtime.sampling.shape import VIDEO_CHANNELS
from ltxpack.runtime.select import AUTO, Choice, choose
from ltxpack.runtime.text.encode import PromptEncoder
from ltxpack.runtime.text.prompt_cache import PromptCache
from ltxpack.runtime.video import Latents, Video
from ltxpack.runtime.weights import report
from ltxpack.runtime.weights.advice import check_mode, check_reads
from ltxpack.runtime.weights.commands import hq_work
from ltxpack.runtime.weights.device import known_fault, resolve_device
from ltxpack.runtime.weights.keeper import Residency
from ltxpack.runtime.weights.plan import Work

P = TypeVar("P", bound=torch.nn.Module)
R = TypeVar("R")
Progress = Callable[[str, int, int], object]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# How libraries say it that raise a plain RuntimeError.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


@dataclass
class Timings:
    """Seconds per phase, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase ``name``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


class Pipeline:
    """An overlay ready to make videos, one after another: ``with Pipeline.from_overlay("out") as make: make("...")``.

    What fits stays loaded between calls. Not for several threads at once.
    """

    def __init__(
        self,
        root: Path,
        *,
        stage1: str = AUTO,
        stage2: str = AUTO,
        device: str = "auto",
        dtype: str = "bfloat16",
        residency: str = "auto",
        reads: str = "auto",
        attention: str | None = None,
        compile_blocks: bool = False,
        cache: PromptCache | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        check_mode(residency)
        check_reads(reads)
        self.overlay = Overlay.open(root)
        self.choice: Choice = choose(self.overlay.manifest, stage1, stage2, root)
        self.device = resolve_device(device)
        self.dtype = DTYPES[dtype]
        self.compile_blocks = compile_blocks
        self.reporter = reporter or SilentReporter()
        self.residency = Residency(self.overlay, self.device, self.dtype, residency, self.reporter, reads)
        self.prompts = PromptEncoder(self.overlay, self.residency, cache)
        self.timings = Timings()
        self._closed = False
        self._to_come = 0
        self._asked_attention = attention
        self._attention: kernels.KernelChoice | None = None
        self._statistics: codecs.LatentStatistics | None = None
        # A name that cannot be used is told now; what has to be measured waits until there is something to make.
        if kernels.asked_for(attention) != kernels.AUTO:
            self._attention = self.within_memory(self._choose_attention)
        self._attention_told = False
        fault = known_fault(self.device, self.dtype)
        if fault is not None:
            self.reporter.warn(fault)

    @classmethod
    def from_overlay(
        cls,
        path: str | Path,
        *,
        stage1: str = AUTO,
        stage2: str = AUTO,
        device: str = "auto",
        dtype: str | torch.dtype = "bfloat16",
        residency: str = "auto",
        reads: str = "auto",
        attention: str | None = None,
        compile: bool = False,
        cache: bool | str | Path = True,
        reporter: Reporter | None = None,
    ) -> Pipeline:
        """Open the overlay at ``path``; nothing large is read yet.

        ``stage1`` and ``stage2`` are ``auto``, ``base`` or a bake's name; ``device`` is ``auto``, ``cpu`` or
        ``cuda[:N]``; ``dtype`` ``bfloat16`` or ``float32``; ``residency`` and ``reads`` as for ``ltxpack run``, and
        ``attention`` too: ``auto`` or a kernel's name, None for what ``LTXPACK_ATTENTION`` says or else ``auto``.
        ``cache`` says whether encoded prompts are kept on disk, or in which folder. Raises OverlayError, UsageError,
        DeviceError.
        """
        kept = None if cache is False else PromptCache.at(None if cache is True else Path(cache))
        return cls(
            Path(path),
            stage1=stage1,
            stage2=stage2,
            device=device,
            dtype=_dtype_name(dtype),
            residency=residency,
            reads=reads,
            attention=attention,
            compile_blocks=compile,
            cache=kept,
            reporter=reporter,
        )

    def __call__(self, prompt: str, *, progress: Progress | None = None, **settings: Unpack[Settings]) -> Video:
        """Make a video of ``prompt``; ``settings`` are those of ``ltxpack run`` by the names of its flags.

        ``progress(phase, done, total)`` is called as the work goes on; what it raises ends the call. Raises UsageError
        for values no run could use, DeviceError for too little memory, OverlayError for an overlay that changed. The
        pipeline can be called again after any of them.
        """
        return self.make(Request.of(prompt, **settings), progress)

    def make(self, request: Request, progress: Progress | None = None) -> Video:
        """The video of ``request``, in memory; see :meth:`__call__`."""
        frames: list[Tensor] = []
        with self._reporting(progress):
            latents, waveform, sample_rate = self.generate(request)
            self.within_memory(lambda: self.decode_video(latents.stage2.video, lambda part: frames.append(part.cpu())))
        return self.finish(request, latents, frames, waveform, sample_rate)

    def finish(
        self, request: Request, latents: Latents, frames: list[Tensor], waveform: Tensor, sample_rate: int
    ) -> Video:
        """The parts of a video as one; ``frames`` (chunks ``[n, H, W, 3]``) is emptied."""
        return Video(
            frames=_joined(frames),
            waveform=waveform,
            sample_rate=sample_rate,
            fps=request.shape.fps,
            seed=request.seed,
            stage1=self.choice.stage1,
            stage2=self.choice.stage2,
            latents=latents,
            seconds=dict(self.timings.seconds),
        )

    def generate(self, request: Request, *, once: bool = False) -> tuple[Latents, Tensor, int]:
        """Everything but the frames: latents, waveform, sample rate; begins the timings anew. Raises LtxpackError.

        ``once``: no other video follows, so that no weights are kept for one where that takes more memory.
        """
        self._check_open()
        self.timings = Timings()
        self._to_come -= 1
        self._prepare([self._work(request, self.prompts.ahead, once)])
        latents = self.within_memory(lambda: self.sample(request))
        return latents, *self.within_memory(lambda: self.decode_audio(latents.stage1.audio))

    def encode_ahead(self, requests: Sequence[Request]) -> float:
        """Encode the prompts of all ``requests``, so that the text encoder is loaded once. Seconds it took."""
        self._check_open()
        begin = time.perf_counter()
        self._to_come = len(requests)
        together = len({request.prompts for request in requests})
        self._prepare([self._work(request, together) for request in requests])
        self.within_memory(lambda: self._encode_ahead(requests))
        return time.perf_counter() - begin

    def close(self) -> None:
        """Give back the memory held; a closed pipeline makes no more videos."""
        self._closed = True
        self._statistics = None
        self.prompts.forget()
        self.residency.close()

    def __enter__(self) -> Pipeline:
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def within_memory(self, work: Callable[[], R]) -> R:
        """``work()``. Raises DeviceError, with everything of ``work`` released, when memory runs out in it."""
        try:
            return work()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            found = _out_of_memory(error)
            if found is None:
                raise
        # Not in the except block: there the failed work's tensors are still alive in its traceback.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise DeviceError(f"{self.device} ran out of memory", found=found, next=self.residency.advice())

    def check_fits(self, request: Request, together: int = 1) -> None:
        """Refuse a device that is too small, before anything is loaded; ``together`` videos' prompts are encoded at
        once. Raises DeviceError.
        """
        self.residency.check(self._work(request, together))

    @property
    def decoding(self) -> str:
        """The tiles the last video was decoded in, in words; empty before there is one."""
        return "" if self.residency.plan is None else report.decoding(self.residency.plan)

    @torch.inference_mode()
    def sample(self, request: Request) -> Latents:
        """From the request to the latents of both stages (spec 05, section 5)."""
        half = request.shape.half()
        sigmas = stage1_sigmas(half.tokens, request.steps)
        pictures = self._pictures(request)
        generator = torch.Generator(device=self.device).manual_seed(request.seed)
        self._load_ahead(self.choice.stage1)
        with self.timings.phase("text"):
            positive, negative = self.prompts.contexts(request.prompts, self.reporter)
        with self.timings.phase("images"):
            small, large = self._images(request.images, pictures, (half, request.shape))
        with self.timings.phase("stage 1"):
            state = initial_state(half, None, small, 1.0, generator, self.device, self.dtype)
            tokens = self._transform(self.choice.stage1, "stage 1", state, sigmas, positive, negative, request.guidance)
            stage1 = unpatchify(tokens, half)
        with self.timings.phase("upsample"):
            upsampled = self._upsample(stage1.video)
        with self.timings.phase("stage 2"):
            sigmas = stage2_sigmas()
            start = AV(upsampled, stage1.audio)
            state = initial_state(request.shape, start, large, float(sigmas[0]), generator, self.device, self.dtype)
            tokens = self._transform(self.choice.stage2, "stage 2", state, sigmas, positive)
            stage2 = unpatchify(tokens, request.shape)
        return Latents(stage1, upsampled, stage2)

    def decode_audio(self, latents: Tensor) -> tuple[Tensor, int]:
        """The waveform ``[2, N]`` float32 and its sample rate, from stage-1 audio latents (spec 04, section 9)."""
        with self.timings.phase("audio"):
            return self._borrow(
                "audio_vae",
                codecs.load_audio_vae,
                lambda vae: self._borrow(
                    "vocoder",
                    codecs.load_vocoder,
                    lambda vocoder: (codecs.decode_audio(vae, vocoder, latents).cpu(), codecs.sample_rate(vocoder)),
                ),
            )

    def decode_video(self, latents: Tensor, write: Callable[[Tensor], None]) -> None:
        """Hand the frames ``[n, H, W, 3]`` in [0, 1] to ``write``, chunk by chunk, in order.

        In the official tiles, or in larger ones if the plan has them.
        """
        plan = self.residency.plan
        tiling = None if plan is None or plan.work.decode != FAST else plan.tiling

        def decode(vae: AutoencoderKLLTX2Video) -> None:
            self.reporter.begin("decode", (latents.shape[2] - 1) * 8 + 1, "frame")
            for frames in codecs.decode_video(vae, latents, tiling):
                write(frames)
                self.reporter.advance(len(frames))
            self.reporter.end()

        with self.timings.phase("video"):
            self._borrow("vae", codecs.load_video_vae, decode)

    def _pictures(self, request: Request) -> list[Tensor]:
        """The images, read and compressed: before anything is loaded, so that a bad file fails at once."""
        crf = self.overlay.manifest.image_crf if request.image_crf is None else request.image_crf
        return [load_image(image.path, crf) for image in request.images]

    def _images(
        self, images: Sequence[ImageSpec], pictures: Sequence[Tensor], shapes: tuple[VideoShape, VideoShape]
    ) -> list[list[ImageItem]]:
        """The images encoded in the size of each of ``shapes``."""
        if not images:
            return [[] for _ in shapes]

        def encode(vae: AutoencoderKLLTX2Video) -> list[list[ImageItem]]:
            return [
                [
                    ImageItem(image.frame, image.strength, codecs.encode_image(vae, prepare(picture, shape)))
                    for image, picture in zip(images, pictures, strict=True)
                ]
                for shape in shapes
            ]

        def prepare(picture: Tensor, shape: VideoShape) -> Tensor:
            return prepare_image(picture, shape.height, shape.width, self.device, self.dtype)

        return self._borrow("vae", codecs.load_video_vae, encode)

    def _transform(
        self,
        name: str,
        label: str,
        state: AV[LatentState],
        sigmas: Tensor,
        positive: AV[Tensor],
        negative: AV[Tensor] | None = None,
        guidance: AV[Guidance] | None = None,
    ) -> AV[Tensor]:
        """One stage: the tokens after sampling with the transformer ``name``; the next one is loaded meanwhile."""
        following = self.choice.stage2 if guidance else self.choice.stage1 if self._to_come > 0 else None

        def work(model: DiT) -> AV[Tensor]:
            if following is not None:
                self._load_ahead(following)
            denoiser = Denoiser(model, positive, negative, guidance)
            rope = model.rope(state.map(lambda s: s.positions), self.dtype, self.device)
            self.reporter.begin(label, len(sigmas) - 1, "step")
            tokens = res2s(
                lambda latents, sigma: denoiser(latents, sigma, state, rope),
                state,
                sigmas,
                on_step=lambda done, total: self.reporter.advance(),
            )
            self.reporter.end()
            return tokens

        return self.residency.borrow(*self._transformer(name), load_dit, work, self._settle)

    def _settle(self, model: DiT, streamed: bool) -> None:
        """Once for a transformer whose weights have come to the device, or come there block by block."""
        if self._attention is not None:
            model.use_attention(self._attention.kernels)
        if self.compile_blocks:
            compile_dit(model, self.reporter)

    def _prepare(self, works: Sequence[Work]) -> None:
        """The plan for ``works``, and the attention kernel: before anything is loaded there is room to measure it."""
        self.residency.prepare(works)
        if not works:
            return
        if self._attention is None:
            self._attention = self.within_memory(self._choose_attention)
        if not self._attention_told:
            self.reporter.note(self._attention.note)
            for name, why in self._attention.refused.items():
                self.reporter.detail(f"attention: not {name}: {why}")
            self._attention_told = True

    def _choose_attention(self) -> kernels.KernelChoice:
        config = read_dit_config(self.overlay.transformer_folder(self.choice.stage1))
        found = kernels.choose(kernels.attention_kinds(config, self.device, self.dtype), self._asked_attention)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _load_ahead(self, name: str) -> None:
        self.residency.prefetch(*self._transformer(name), load_dit)

    def _transformer(self, name: str) -> tuple[Path, tuple[FileRecord, ...]]:
        return self.overlay.transformer_folder(name), self.overlay.transformer_records(name)

    def _upsample(self, latents: Tensor) -> Tensor:
        """Twice the height and width; of the video VAE, which may be off the device, this needs two small tensors."""
        if self._statistics is None:
            folder = self.overlay.folder("vae")
            self._statistics = codecs.LatentStatistics.read(folder, VIDEO_CHANNELS, self.device, self.dtype)
        statistics = self._statistics
        return self._borrow(
            "latent_upsampler",
            codecs.load_upsampler,
            lambda upsampler: codecs.upsample(upsampler, statistics, latents),
        )

    def _borrow(self, component: str, load: Callable[..., P], work: Callable[[P], R]) -> R:
        return self.residency.borrow(self.overlay.folder(component), self.overlay.records(component), load, work)

    @torch.inference_mode()
    def _encode_ahead(self, requests: Sequence[Request]) -> None:
        self.prompts.encode_ahead([request.prompts for request in requests], self.reporter)

    @contextmanager
    def _reporting(self, progress: Progress | None) -> Iterator[None]:
        """Let ``progress`` follow the work in the block."""
        before = self.reporter
        if progress is not None:
            self.reporter = ProgressReporter(progress, before)
        try:
            yield
        finally:
            self.reporter = before

    def _work(self, request: Request, together: int = 1, once: bool = False) -> Work:
        stages, images = (self.choice.stage1, self.choice.stage2), len(request.images)
        return hq_work(request.shape, stages, request.steps, images, request.decode, max(1, together), once)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this pipeline is closed", next="ltxpack.Pipeline.from_overlay(...) opens another")


def _out_of_memory(error: BaseException) -> str | None:
    """What ``error`` says if it says that memory ran out."""
    told = str(error).strip().splitlines() or [type(error).__name__]
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return told[0] if known or any(sign in str(error) for sign in OUT_OF_MEMORY) else None


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after another; each is let go as it is copied, so that the whole is not held twice."""
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    start = 0
    while parts:
        part = parts.pop(0)
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError("wrong dtype", expected=" or ".join(DTYPES), found=name, next="choose dtype='bfloat16'")
    return name
