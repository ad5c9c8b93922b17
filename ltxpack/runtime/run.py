"""One run from options to a file: check everything cheap first, then make the video, then publish by rename."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltxpack.errors import UsageError
from ltxpack.manifest import is_overlay
from ltxpack.reporter import Reporter
from ltxpack.runtime.media import VideoWriter, check_output, frame_rate
from ltxpack.runtime.pipeline import Pipeline
from ltxpack.runtime.request import DEFAULTS, Request, Settings
from ltxpack.runtime.select import AUTO
from ltxpack.runtime.video import check_tensors_path


@dataclass(frozen=True)
class RunOptions:
    """The options of ``ltxpack run``, by the names of its flags."""

    overlay: Path
    prompt: str = ""
    output: Path = Path("video.mp4")
    negative_prompt: str | None = DEFAULTS["negative_prompt"]
    seed: int = DEFAULTS["seed"]
    height: int = DEFAULTS["height"]
    width: int = DEFAULTS["width"]
    num_frames: int = DEFAULTS["num_frames"]
    fps: float = DEFAULTS["fps"]
    steps: int = DEFAULTS["steps"]
    images: tuple[str, ...] = ()
    image_crf: int | None = DEFAULTS["image_crf"]
    stage1: str = AUTO
    stage2: str = AUTO
    video_cfg: float = DEFAULTS["video_cfg"]
    audio_cfg: float = DEFAULTS["audio_cfg"]
    video_rescale: float = DEFAULTS["video_rescale"]
    audio_rescale: float = DEFAULTS["audio_rescale"]
    modality: float = DEFAULTS["modality"]
    device: str = "auto"
    dtype: str = "bfloat16"
    residency: str = "auto"
    reads: str = "auto"
    decode: str = DEFAULTS["decode"]
    attention: str | None = None
    compile_blocks: bool = False
    cache: bool = True
    save_tensors: Path | None = None

    @property
    def settings(self) -> Settings:
        """What these options say of a video."""
        return Settings(
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            fps=self.fps,
            steps=self.steps,
            images=self.images,
            image_crf=self.image_crf,
            video_cfg=self.video_cfg,
            audio_cfg=self.audio_cfg,
            video_rescale=self.video_rescale,
            audio_rescale=self.audio_rescale,
            modality=self.modality,
            decode=self.decode,
        )

    def request(self) -> Request:
        """The video asked for. Raises UsageError."""
        return Request.of(self.prompt, **self.settings)

    def open(self, reporter: Reporter) -> Pipeline:
        """The overlay, opened as these options say. Raises LtxpackError."""
        return Pipeline.from_overlay(
            self.overlay,
            stage1=self.stage1,
            stage2=self.stage2,
            device=self.device,
            dtype=self.dtype,
            residency=self.residency,
            reads=self.reads,
            attention=self.attention,
            compile=self.compile_blocks,
            cache=self.cache,
            reporter=reporter,
        )


@dataclass(frozen=True)
class Peaks:
    """The most memory held at once, in bytes; on the device None where it is the CPU."""

    host: int
    device: int | None

    @classmethod
    def of(cls, device: torch.device) -> Peaks:
        """Those of this process so far."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return cls(host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)


@dataclass(frozen=True)
class Summary:
    """What a run used and made; ``decoding`` the tiles in words, ``seconds`` per phase in order."""

    output: Path
    stage1: str
    stage2: str
    decoding: str
    seconds: dict[str, float]
    peaks: Peaks


def run_to_file(options: RunOptions, reporter: Reporter) -> Summary:
    """Make the video of ``options``; its files appear by rename when they are whole.

    Raises UsageError, OverlayError, DeviceError, FormatError.
    """
    request = options.request()
    check_target(request, options.output)
    if options.save_tensors is not None:
        check_tensors_path(options.save_tensors)
        if options.save_tensors.resolve() == options.output.resolve():
            raise UsageError("--save-tensors and -o are one file", file=options.output, next="choose two names")
    tell_inside((options.output, *((options.save_tensors,) if options.save_tensors else ())), reporter)
    with options.open(reporter) as pipeline:
        reporter.note(pipeline.choice.note)
        write_video(pipeline, request, options.output, options.save_tensors, once=True)
        choice, peaks = pipeline.choice, Peaks.of(pipeline.device)
    seconds = dict(pipeline.timings.seconds)
    return Summary(options.output, choice.stage1, choice.stage2, pipeline.decoding, seconds, peaks)


def check_target(request: Request, output: Path) -> None:
    """Raises UsageError unless a video of ``request`` can be written to ``output``."""
    check_output(output)
    frame_rate(request.shape.fps)


def tell_inside(outputs: Iterable[Path], reporter: Reporter) -> None:
    """Warn of what would be written into an overlay: ``ltxpack verify`` would call it a fault."""
    for folder in dict.fromkeys(output.absolute().parent.resolve() for output in outputs):
        overlay = next((place for place in (folder, *folder.parents) if is_overlay(place)), None)
        if overlay is not None:
            reporter.warn(f"{folder}: lies in the overlay {overlay}, where verify calls what is not its own a fault")


def write_video(
    pipeline: Pipeline, request: Request, output: Path, save_tensors: Path | None = None, *, once: bool = False
) -> None:
    """Make the video of ``request`` and encode it while it is decoded; ``pipeline.timings`` are its seconds.

    ``once``: it is the only one. Raises LtxpackError; then ``output`` is as it was.
    """
    latents, waveform, sample_rate = pipeline.generate(request, once=once)
    kept: list[Tensor] = []
    shape = request.shape

    def write() -> None:
        with VideoWriter(output, shape.width, shape.height, shape.fps, sample_rate) as writer:

            def take(frames: Tensor) -> None:
                writer.write(frames)
                if save_tensors is not None:
                    kept.append(frames.cpu())

            pipeline.decode_video(latents.stage2.video, take)
            writer.write_audio(waveform)

    pipeline.within_memory(write)
    if save_tensors is not None:
        pipeline.finish(request, latents, kept, waveform, sample_rate).save_tensors(save_tensors)
