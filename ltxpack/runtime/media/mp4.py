"""Writing the video file: H.264 and AAC through PyAV, encoded in a thread while the next frames are decoded.

The file appears under its name when it is whole, or not at all (spec 06, section 7); of two writers of one name, the
last to finish replaces the other's video. The same frames give the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import torch
from av.container import OutputContainer
from numpy.typing import NDArray
from torch import Tensor

from ltxpack.errors import LtxpackError, UsageError, quoted
from ltxpack.files.publish import Temporary, check_writable, remove_temporaries, unwritten
from ltxpack.files.reader import hash_file
from ltxpack.runtime.sampling.shape import frame_rate

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
# The numbers of ITU-T H.273: BT.709 is 1 as primaries, transfer and matrix; 1 is FFmpeg's limited range.
BT709 = LIMITED_RANGE = 1
X264 = {"crf": "19", "preset": "veryfast"}
# The AVX-512 code of x264 reads memory that nobody has written where the width is not a multiple of 128 pixels: its
# bytes differ from run to run. Every processor with AVX-512 has this too, which takes as long.
WITHOUT_AVX512 = {"x264-params": "asm=MMX2,SSE2Fast,SSE3,SSSE3,SSE4.2,LZCNT,BMI2,FMA3,AVX2"}
FRAMES_AT_ONCE = 8
# Red, green and blue in Y, Cb and Cr of BT.709.
PLANES = ((0.2126, 0.7152, 0.0722), (-0.1146, -0.3854, 0.5), (0.5, -0.4542, -0.0458))


def check_output(path: Path) -> Path:
    """``path`` if a video can be written there. Raises UsageError: unknown ending, no such folder, not writable."""
    if path.suffix.lower() not in CONTAINERS:
        better = path.parent / f"{path.stem or 'video'}.mp4"
        known, advice = f"a name ending in {', '.join(CONTAINERS)}", f"choose -o {quoted(better)}"
        problem, found = "not a video file this can write", path.suffix or "no ending"
        raise UsageError(problem, file=path, expected=known, found=found, next=advice)
    check_writable(path, "-o", "video.mp4")
    return path


class VideoWriter:
    """``with VideoWriter(...) as w: w.write(frames); w.write_audio(waveform)``.

    Frames are converted on their own device and encoded in another thread; at most one chunk waits. At the end of the
    block the file is finished and renamed to ``path``; after an exception (a KeyboardInterrupt too) it is removed.
    ``blake3`` is then the hash of the file, whatever other writers have done to ``path`` since. Raises LtxpackError at
    the next call for anything that went wrong in the thread.

    ``width`` and ``height`` in pixels, both even; ``sample_rate``: samples per second of the sound (None: silent).
    """

    def __init__(
        self, path: Path, width: int, height: int, fps: float | Fraction | str, sample_rate: int | None = None
    ) -> None:
        self.path = check_output(path)
        if width % 2 or height % 2 or min(width, height) < 2:
            raise UsageError("not a size H.264 takes", expected="even sides", found=f"{width}x{height}")
        self.width, self.height, self.rate, self.sample_rate = width, height, frame_rate(fps), sample_rate
        self.frames_written = 0
        self.blake3 = ""
        self._waveform: Tensor | None = None
        self._encoding: deque[Future[None]] = deque()
        self._cleanup = ExitStack()

    def __enter__(self) -> VideoWriter:
        with self._told(), ExitStack() as made:
            remove_temporaries(self.path, stale=True)
            # Absolute: FFmpeg would take the text before a colon for a protocol.
            self._temporary = Temporary(self.path.absolute())
            made.callback(self._temporary.discard)
            container = av.open(str(self._temporary.path), "w", format=CONTAINERS[self.path.suffix.lower()])
            made.callback(_close, container)
            self._encoder = _Encoder(container, self.width, self.height, self.rate, self.sample_rate)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ltxpack-encoder")
            made.callback(self._thread.shutdown, cancel_futures=True)
            self._cleanup = made.pop_all()
        return self

    def write(self, frames: Tensor) -> None:
        """Append ``frames`` ``[n, H, W, 3]`` in [0, 1]. Waits while the chunk before the last is encoded."""
        expected = (self.height, self.width, 3)
        if tuple(frames.shape[1:]) != expected:
            raise ValueError(f"frames are {tuple(frames.shape[1:])}, the video is {expected}")
        # In parts, so that the intermediate planes stay small beside the frames.
        planes = torch.cat([to_i420(part).cpu() for part in frames.split(FRAMES_AT_ONCE)])
        self._await_encoder(1)
        self._encoding.append(self._thread.submit(self._encoder.video, planes.numpy()))
        self.frames_written += len(frames)

    def write_audio(self, waveform: Tensor) -> None:
        """Take the whole sound, ``[2, N]`` in [-1, 1], and encode it after the last frame."""
        if waveform.ndim != 2 or waveform.shape[0] != 2 or self.sample_rate is None:
            raise ValueError(f"sound of shape {tuple(waveform.shape)} for a video with {self.sample_rate} samples/s")
        self._await_encoder(2)
        self._waveform = waveform.float().cpu()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._cleanup:
            if kind is None:
                self._await_encoder(0)
                self._publish_whole()

    def _publish_whole(self) -> None:
        if not self.frames_written:
            raise LtxpackError("no frame was written", file=self.path)
        if self.sample_rate is not None and self._waveform is None:
            raise LtxpackError("its sound was not written", file=self.path)
        with self._told():
            self._encoder.finish(self._waveform)
        # Before the rename: after it, another writer's video may be at the path.
        self.blake3 = hash_file(self._temporary.path, cached=True)
        with self._told("the video could not be put there"):
            self._temporary.publish()

    def _await_encoder(self, most: int) -> None:
        """Wait until at most ``most`` chunks are left to encode. Raises the error of an earlier chunk."""
        with self._told():
            while self._encoding and (len(self._encoding) > most or self._encoding[0].done()):
                self._encoding.popleft().result()

    @contextmanager
    def _told(self, problem: str = "the video could not be written") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritten(self.path, error) from error
        except Exception as error:
            raise LtxpackError(problem, file=self.path, found=str(error)) from error


def x264_options() -> dict[str, str]:
    return X264 | (WITHOUT_AVX512 if torch.backends.cpu.get_cpu_capability() == "AVX512" else {})


def _close(container: OutputContainer) -> None:
    """Close a file that is whole, or that is given up."""
    with suppress(Exception):
        container.close()


class _Encoder:
    """The streams of an open container."""

    def __init__(
        self, container: OutputContainer, width: int, height: int, rate: Fraction, sample_rate: int | None
    ) -> None:
        self._container, self._rate, self._sample_rate = container, rate, sample_rate
        self._video = container.add_stream("libx264", rate=rate, options=x264_options())
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        context = self._video.codec_context
        context.thread_type, context.thread_count = "FRAME", 0
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        self._audio = sample_rate and container.add_stream("aac", rate=sample_rate, layout="stereo")
        self._count = 0

    def video(self, planes: NDArray[np.uint8]) -> None:
        """Encodes ``planes`` ``[n, 3 H / 2, W]`` (I420)."""
        for plane in planes:
            frame = av.VideoFrame.from_ndarray(plane, format="yuv420p")
            frame.pts, frame.time_base = self._count, 1 / self._rate
            frame.colorspace, frame.color_range = BT709, LIMITED_RANGE
            self._container.mux(self._video.encode(frame))
            self._count += 1

    def finish(self, waveform: Tensor | None) -> None:
        """Flushes the pictures, then encodes the sound, and finishes the file."""
        self._container.mux(self._video.encode())
        if self._audio and waveform is not None:
            rate = self._sample_rate
            resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
            for frame in [*resampler.resample(_sound(waveform, rate)), *resampler.resample(None), None]:
                self._container.mux(self._audio.encode(frame))
        self._container.close()


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
    red, green, blue = frames.unbind(-1)
    y, cb, cr = (red * row[0] + green * row[1] + blue * row[2] for row in PLANES)
    chroma = torch.stack([torch.nn.functional.avg_pool2d(plane[:, None], 2)[:, 0] for plane in (cb, cr)], dim=1)
    planes = [(y * 219 + 16).reshape(count, height, width), (chroma * 224 + 128).reshape(count, height // 2, width)]
    return torch.cat(planes, dim=1).clamp(0, 255).to(torch.uint8)
