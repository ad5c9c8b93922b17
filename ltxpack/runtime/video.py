"""The results of a run: latents of each stage, frames and sound; and how to write them to files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ltxpack.files.publish import Temporary, check_writable, output_errors, remove_temporaries
from ltxpack.files.tensorfile import build_header
from ltxpack.runtime.media.mp4 import FRAMES_AT_ONCE, VideoWriter
from ltxpack.runtime.sampling.recipes import stage_flag
from ltxpack.runtime.sampling.shape import AV

T = TypeVar("T")


@dataclass(frozen=True)
class Latents:
    """The results of the samplers: normalised latents ``[1, 128, f, h, w]`` and ``[1, 8, Ta, 16]`` of each stage.

    ``upsampled`` is the video from which the last stage began, before noise; None if it began from noise alone.
    """

    stages: tuple[AV[Tensor], ...]
    upsampled: Tensor | None = None

    @property
    def video(self) -> Tensor:
        return self.stages[-1].video

    @property
    def stage1(self) -> AV[Tensor]:
        return self.stages[0]

    @property
    def stage2(self) -> AV[Tensor]:
        """The latents of the second stage. Raises AttributeError for a recipe of one stage."""
        return second(self.stages)


@dataclass(frozen=True)
class Video:
    """A finished video in memory.

    ``frames`` ``[F, H, W, 3]`` in [0, 1], in the pipeline's dtype, and ``waveform`` float32 ``[2, N]`` in [-1, 1]
    with ``sample_rate`` samples per second: both on the CPU. ``latents`` are on the device that made them. ``fps`` in
    frames per second; ``seconds`` has the time of each phase, in order.
    """

    frames: Tensor
    waveform: Tensor
    sample_rate: int
    fps: float
    seed: int
    recipe: str
    transformers: tuple[str, ...]
    latents: Latents
    seconds: Mapping[str, float]

    @property
    def stage1(self) -> str:
        return self.transformers[0]

    @property
    def stage2(self) -> str:
        """The transformer of the second stage. Raises AttributeError for a recipe of one stage."""
        return second(self.transformers)

    def save(self, path: str | Path) -> Path:
        """Write an ``.mp4``, ``.m4v``, ``.mov`` or ``.mkv`` (H.264 and AAC), which appears when it is whole.

        Raises UsageError for a path that cannot be written.
        """
        path = Path(path)
        _, height, width, _ = self.frames.shape
        with VideoWriter(path, width, height, self.fps, self.sample_rate) as writer:
            for part in self.frames.split(FRAMES_AT_ONCE):
                writer.write(part)
            writer.write_audio(self.waveform)
        return path

    def save_tensors(self, path: str | Path) -> Path:
        """Write the tensors of ``ltxpack run --save-tensors`` in float32; equal tensors give equal bytes.

        Raises UsageError for a path that cannot be written, UnwrittenError for a full disk.
        """
        path = Path(path)
        check_writable(path, "--save-tensors", "video.safetensors")
        made = self.latents
        named = {
            f"{stage_flag(number)}.{modality}": tensor
            for number, stage in enumerate(made.stages)
            for modality, tensor in (("video", stage.video), ("audio", stage.audio))
        }
        if made.upsampled is not None:
            named["upsampled.video"] = made.upsampled
        named |= {"video": self.frames, "audio": self.waveform}
        metadata = {
            "audio_sample_rate": str(self.sample_rate),
            "fps": str(self.fps),
            "seed": str(self.seed),
            "recipe": self.recipe,
            **{stage_flag(number): name for number, name in enumerate(self.transformers)},
        }
        header = build_header(((name, "F32", tuple(tensor.shape)) for name, tensor in named.items()), metadata)
        with output_errors(path):
            remove_temporaries(path, stale=True)
            with Temporary(path) as temporary, temporary.open("wb") as file:
                file.write(header)
                for tensor in named.values():
                    file.write(tensor.float().cpu().contiguous().numpy().data)
        return path


def second(stages: tuple[T, ...]) -> T:
    """The second of ``stages``. Raises AttributeError if there is only one."""
    if len(stages) < 2:
        raise AttributeError("this recipe has one stage")
    return stages[1]
