"""Writing the video file: H.264 and AAC through PyAV, encoded in a thread while the next frames are decoded.

The file appears under its name when it is whole, or not at all (spec 06, section 7); of two writers of one name, the
last to finish replaces the other's video. The bytes may differ from run to run: x264's AVX-512 lookahead is not
deterministic at every width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType

import av
import numpy as np
import torch
from av.container import OutputContainer
from numpy.typing import NDArray
from torch import Tensor

from ltxpack.errors import LtxpackError, UsageError, quoted
from ltxpack.files.publish import Temporary
from ltxpack.files.reader import hash_file

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
NTSC = (24, 30, 48, 60, 120)
SLOWEST, FASTEST = Fraction(1, 1000), Fraction(1000)
MAX_DENOMINATOR = 1_000_000
# The numbers of ITU-T H.273: BT.709 is 1 as primaries, transfer and matrix; 1 is FFmpeg's limited range.
BT709 = LIMITED_RANGE = 1
X264 = {"crf": "19", "preset": "veryfast"}
FRAMES_AT_ONCE = 8
# Red, green and blue in each plane, BT.709.
PLANES = {
    "y": (0.2126, 0.7152, 0.0722),
    "cb": (-0.1146, -0.3854, 0.5),
    "cr": (0.5, -0.4542, -0.0458),
}


def check_output(path: Path) -> Path:
    """``path`` if a video can be written there. Raises UsageError: unknown ending, no such folder, not writable."""
    if path.suffix.lower() not in CONTAINERS:
        better = path.parent / f"{path.stem or 'video'}.mp4"
        raise UsageError(
            "not a video file this can write",
            file=path,
            expected=f"a name ending in {', '.join(CONTAINERS)}",
            found=path.suffix or "no ending",
            next=f"choose -o {quoted(better)}",
        )
    check_writable(path, "-o", "video.mp4")
    return path


def check_writable(path: Path, flag: str, usual: str) -> None:
    """Raises UsageError unless a file can be written at ``path``, which ``flag`` names; ``usual`` is such a name."""
    folder = path.absolute().parent
    if path.is_dir():
        better = f"choose {flag} {quoted(path / usual)}"
        raise UsageError("is a folder", file=path, expected="a file name", next=better)
    if not folder.is_dir():
        remedy = f"mkdir -p {quoted(path.parent)}"
        raise UsageError("no such folder", file=path.parent, expected="a folder that exists", next=remedy)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError("no permission to write there", file=path.parent, next=f"choose {flag} in another folder")


def frame_rate(fps: float | Fraction | str) -> Fraction:
    """Frames per second as an exact fraction: 23.976 is 24000/1001, and so for its NTSC relatives.

    Takes a number or its text, also ``24000/1001``. Raises UsageError for what is no positive finite rate.
    """
    try:
        exact = fps if isinstance(fps, Fraction) else Fraction(str(fps).strip())
    except (ValueError, ZeroDivisionError):
        exact = Fraction(0)
    if not SLOWEST <= exact <= FASTEST:
        raise UsageError(
            "not a frame rate", expected=f"a number or fraction from {SLOWEST} to {FASTEST}, like 24000/1001", found=fps
        )
    for nominal in NTSC:
        ntsc = Fraction(nominal * 1000, 1001)
        # A quarter of the step to the whole number: 23.98 is meant, 23.99 is not.
        if abs(exact - ntsc) < (nominal - ntsc) / 4:
            return ntsc
    return exact.limit_denominator(MAX_DENOMINATOR)


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """Size in pixels (both even), frames per second, and samples per second of its sound (None: silent)."""

    width: int
    height: int
    rate: Fraction
    sample_rate: int | None = None

    def __post_init__(self) -> None:
        if self.width % 2 or self.height % 2 or min(self.width, self.height) < 2:
            raise UsageError("not a size H.264 takes", expected="even sides", found=f"{self.width}x{self.height}")


class VideoWriter:
    """``with VideoWriter(...) as w: w.write(frames); w.write_audio(waveform)``.

    Frames are converted on their own device and encoded in another thread; at most one chunk waits. At the end of the
    block the file is finished and renamed to ``path``; after an exception (a KeyboardInterrupt too) it is removed.
    ``blake3`` is then the hash of the file, whatever other writers have done to ``path`` since. Raises LtxpackError at
    the next call for anything that went wrong in the thread.
    """

    def __init__(
        self, path: Path, width: int, height: int, fps: float | Fraction | str, sample_rate: int | None = None
    ) -> None:
        self.path = check_output(path)
        self.format = VideoFormat(width, height, frame_rate(fps), sample_rate)
        self.frames_written = 0
        self.blake3 = ""
        self._temporary: Temporary | None = None
        self._queue: Queue[Tensor | None] = Queue(maxsize=1)
        self._waveform: Tensor | None = None
        self._failure: BaseException | None = None
        self._given_up = False
        self._ended = False
        self._thread = Thread(target=self._run, name="ltxpack-encoder", daemon=True)

    def __enter__(self) -> VideoWriter:
        try:
            # Absolute: FFmpeg would take the text before a colon for a protocol.
            self._temporary = Temporary(self.path.absolute())
        except OSError as error:
            raise LtxpackError("the video could not be written", file=self.path, found=str(error)) from error
        self._thread.start()
        return self

    def write(self, frames: Tensor) -> None:
        """Appends ``frames`` ``[n, H, W, 3]`` in [0, 1]. Waits while the chunk before the last is encoded."""
        expected = (self.format.height, self.format.width, 3)
        if tuple(frames.shape[1:]) != expected:
            raise ValueError(f"frames are {tuple(frames.shape[1:])}, the video is {expected}")
        self._raise_failure()
        # In parts, so that the intermediate planes stay small beside the frames.
        self._queue.put(torch.cat([to_i420(part).cpu() for part in frames.split(FRAMES_AT_ONCE)]))
        self.frames_written += len(frames)

    def write_audio(self, waveform: Tensor) -> None:
        """The whole sound, ``[2, N]`` in [-1, 1]; it is encoded after the last frame."""
        if waveform.ndim != 2 or waveform.shape[0] != 2 or self.format.sample_rate is None:
            raise ValueError(f"sound of shape {tuple(waveform.shape)} for {self.format}")
        self._raise_failure()
        self._waveform = waveform.float().cpu()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._given_up = kind is not None
            self._queue.put(None)
            self._thread.join()
            if kind is None:
                self._raise_failure()
                self._publish_whole()
        finally:
            self._given_up = True
            if self._temporary is not None:
                self._temporary.discard()

    def _publish_whole(self) -> None:
        assert self._temporary is not None
        if not self.frames_written:
            raise LtxpackError("no frame was written", file=self.path)
        if self.format.sample_rate is not None and self._waveform is None:
            raise LtxpackError("its sound was not written", file=self.path)
        # Before the rename: after it, another writer's video may be at the path.
        self.blake3 = hash_file(self._temporary.path, cached=True)
        try:
            self._temporary.publish()
        except OSError as error:
            raise LtxpackError("the video could not be put there", file=self.path, found=str(error)) from error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise LtxpackError(
                "the video could not be written", file=self.path, found=str(self._failure)
            ) from self._failure

    def _chunks(self) -> Iterator[Tensor]:
        """The queued chunks, up to the None that ends them; none after the file is given up."""
        while (chunk := self._queue.get()) is not None:
            if not self._given_up:
                yield chunk
        self._ended = True

    def _run(self) -> None:
        """The thread. After a failure it only empties the queue, so that the caller never waits for it."""
        assert self._temporary is not None
        chunks = self._chunks()
        try:
            with av.open(str(self._temporary.path), "w", format=CONTAINERS[self.path.suffix.lower()]) as container:
                encoder = _Encoder(container, self.format)
                for chunk in chunks:
                    encoder.video(chunk.numpy())
                if not self._given_up:
                    encoder.finish(self._waveform)
        except BaseException as error:
            self._failure = error
            while not self._ended and self._queue.get() is not None:
                pass


class _Encoder:
    """The streams of an open container."""

    def __init__(self, container: OutputContainer, format: VideoFormat) -> None:
        self._container = container
        self._format = format
        self._video = container.add_stream("libx264", rate=format.rate, options=X264)
        self._video.width, self._video.height, self._video.pix_fmt = format.width, format.height, "yuv420p"
        context = self._video.codec_context
        context.thread_type, context.thread_count = "FRAME", 0
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        self._audio = None
        if format.sample_rate is not None:
            self._audio = container.add_stream("aac", rate=format.sample_rate, layout="stereo")
        self._count = 0

    def video(self, planes: NDArray[np.uint8]) -> None:
        """Encodes ``planes`` ``[n, 3 H / 2, W]`` (I420)."""
        for plane in planes:
            frame = av.VideoFrame.from_ndarray(plane, format="yuv420p")
            frame.pts, frame.time_base = self._count, 1 / self._format.rate
            frame.colorspace, frame.color_range = BT709, LIMITED_RANGE
            self._container.mux(self._video.encode(frame))
            self._count += 1

    def finish(self, waveform: Tensor | None) -> None:
        """Flushes the pictures, then encodes the sound."""
        self._container.mux(self._video.encode())
        if self._audio is None or waveform is None:
            return
        rate = self._format.sample_rate
        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
        for frame in [*resampler.resample(_sound(waveform, rate)), *resampler.resample(None)]:
            self._container.mux(self._audio.encode(frame))
        self._container.mux(self._audio.encode())


def _sound(waveform: Tensor, rate: int | None) -> av.AudioFrame:
    """``[2, N]`` in [-1, 1] as one frame of interleaved 16-bit samples, cut off and not rounded."""
    samples = (waveform.clamp(-1, 1) * 32767).to(torch.int16)
    frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).numpy(), format="s16", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate or 1)
    return frame


def to_i420(frames: Tensor) -> Tensor:
    """uint8 ``[F, 3 H / 2, W]`` (planes Y, U, V from top to bottom) of RGB ``frames`` ``[F, H, W, 3]`` in [0, 1].

    The arithmetic is in the dtype of ``frames``; the result is truncated, not rounded. H and W are even.
    """
    count, height, width, _ = frames.shape
    y, cb, cr = (_weighted(frames, row) for row in PLANES.values())
    chroma = torch.stack([_halved(cb), _halved(cr)], dim=1)
    planes = [(y * 219 + 16).reshape(count, height, width), (chroma * 224 + 128).reshape(count, height // 2, width)]
    return torch.cat(planes, dim=1).clamp(0, 255).to(torch.uint8)


def _weighted(frames: Tensor, row: tuple[float, float, float]) -> Tensor:
    red, green, blue = frames.unbind(-1)
    return red * row[0] + green * row[1] + blue * row[2]


def _halved(plane: Tensor) -> Tensor:
    """``[F, H, W]`` averaged over 2x2 squares."""
    return torch.nn.functional.avg_pool2d(plane[:, None], 2)[:, 0]
