"""The video file: colours, both streams read back, exact rates, and nothing left behind by a failure."""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from support import HANG, load
from torch import Tensor

from ltxpack.errors import LtxpackError, UsageError
from ltxpack.files.publish import Temporary
from ltxpack.runtime.media import mp4
from ltxpack.runtime.media.mp4 import VideoWriter, check_output, to_i420
from ltxpack.runtime.sampling.shape import MAX_SIDE, frame_rate

RATE = 48000
FULL = OSError(errno.ENOSPC, "No space left on device")


def solid(*rgb: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(rgb, dtype=dtype).expand(1, 4, 4, 3)


def moving_bar(count: int, height: int = 64, width: int = 96) -> Tensor:
    """Frames ``[count, height, width, 3]`` of a white bar going over red."""
    frames = torch.zeros(count, height, width, 3)
    frames[..., 0] = 0.8
    for i in range(count):
        frames[i, :, i % (width - 8) : i % (width - 8) + 8] = 1
    return frames


def tone(samples: int) -> Tensor:
    return 0.5 * torch.sin(torch.arange(samples) * (2 * math.pi * 440 / RATE)).repeat(2, 1)


def test_recorded_colours(golden: Path) -> None:
    recorded = load(golden / "golden" / "components_fp32.safetensors")
    frames = recorded["yuv420p.rgb_in_fchw"].permute(0, 2, 3, 1)
    assert torch.equal(to_i420(frames), recorded["yuv420p.out_u8"])


@pytest.mark.parametrize(
    ("rgb", "yuv"),
    [
        ((0, 0, 0), (16, 128, 128)),
        ((1, 1, 1), (235, 128, 128)),
        ((1, 0, 0), (62, 102, 240)),
        ((0, 1, 0), (172, 41, 26)),
        ((0, 0, 1), (31, 240, 117)),
    ],
)
def test_known_colours_in_limited_range_cut_off_not_rounded(rgb: tuple[float, ...], yuv: tuple[int, ...]) -> None:
    planes = to_i420(solid(*rgb))
    assert planes.dtype == torch.uint8
    assert planes.shape == (1, 6, 4)
    assert [planes[0, row, 0].item() for row in (0, 4, 5)] == list(yuv)
    coarse = to_i420(solid(*rgb, dtype=torch.bfloat16))
    assert (coarse.int() - planes.int()).abs().max() <= 2


def test_chroma_is_the_mean_of_four_pixels() -> None:
    frames = torch.zeros(1, 2, 2, 3)
    frames[0, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    planes = to_i420(frames)[0].tolist()
    assert planes[:2] == [[62, 16], [16, 16]]
    assert planes[2] == [int(128 - 0.1146 * 224 / 4), int(128 + 0.5 * 224 / 4)]


@pytest.mark.parametrize(
    ("expected", "rates"),
    [
        ("24", [24, 24.0]),
        ("25", ["25"]),
        ("24000/1001", [23.976, "23.98", 23.976023976023978, "24000/1001"]),
        ("30000/1001", [Fraction(30000, 1001), 29.97]),
        ("60000/1001", [59.94]),
        ("120000/1001", [119.88]),
        ("25/2", [12.5]),
        ("47/2", [23.5]),
        ("2399/100", [23.99]),
    ],
)
def test_rates_are_exact(expected: str, rates: list[float | str | Fraction]) -> None:
    assert {frame_rate(rate) for rate in rates} == {Fraction(expected)}


@pytest.mark.parametrize("wrong", [0, -24, "nan", float("nan"), float("inf"), "", "fast", "24/0", 1e-9, 1e9])
def test_what_is_no_rate_is_refused(wrong: float | str) -> None:
    with pytest.raises(UsageError, match="not a frame rate"):
        frame_rate(wrong)


@given(st.floats(0.01, 1000), st.integers(1, 1000))
def test_a_rate_stays_within_a_thousandth_and_a_whole_one_whole(rate: float, whole: int) -> None:
    assert abs(float(frame_rate(rate)) - rate) <= 1e-3 * rate
    assert frame_rate(whole) == frame_rate(float(whole)) == whole


@pytest.mark.parametrize("name", ["a.mp4", "a.MP4", "a.mkv", "a.mov", "a.m4v", "b.c.mp4"])
def test_places_a_video_can_go(tmp_path: Path, name: str) -> None:
    assert check_output(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("name", ["a", "a.txt", "a.webm", "a.mp4.safetensors", "missing/a.mp4", "folder.mp4", "", "."])
def test_places_it_cannot_go(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.mp4").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        check_output(Path(name))
    with pytest.raises(UsageError):
        VideoWriter(Path(name), 64, 64, 24)


@pytest.mark.parametrize(
    ("size", "fits"),
    [((MAX_SIDE, 32), True), ((32, MAX_SIDE), True), ((MAX_SIDE + 32, 32), False), ((MAX_SIDE, 16192), False)],
)
def test_the_largest_sides_are_those_that_the_encoder_takes(size: tuple[int, int], fits: bool) -> None:
    """A request takes just those; a test of requests has the limits."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height = size
    encoder.pix_fmt, encoder.time_base = "yuv420p", Fraction(1, 24)
    with nullcontext() if fits else pytest.raises(av.FFmpegError):
        encoder.open()


@pytest.mark.parametrize("size", [(63, 64), (64, 65), (0, 64)])
def test_odd_sizes_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="even sides"):
        VideoWriter(tmp_path / "a.mp4", *size, 24)


@pytest.mark.parametrize("ending", mp4.CONTAINERS)
def test_both_streams_read_back(tmp_path: Path, ending: str) -> None:
    path, count, samples = tmp_path / f"a{ending}", 41, 80_000
    with VideoWriter(path, 96, 64, 24, RATE) as writer:
        writer.write(moving_bar(count)[:16])
        writer.write(moving_bar(count)[16:])
        writer.write_audio(tone(samples))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    settings = path.read_bytes().partition(b"x264 - core")[2][:1000]
    assert b" crf=19.0 " in settings and b" rc_lookahead=10 " in settings, "as x264's preset veryfast has"

    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        context = video.codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == ("h264", "yuv420p", 96, 64)
        tags = (context.colorspace, context.color_range, context.color_primaries, context.color_trc)
        assert [int(tag) for tag in tags] == [1, 1, 1, 1]
        assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", RATE, 2)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == count
    difference = np.abs(frames[20].astype(int) - (moving_bar(count)[20].numpy() * 255))
    assert difference.mean() < 6

    with av.open(str(path)) as container:
        sound = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert samples <= sound.shape[1] < samples + 2048
    found, expected = sound[0, 4096:60_000], tone(samples)[0, 4096:60_000].numpy()
    assert np.abs(found - expected).max() < 0.05


@pytest.mark.parametrize(
    ("fps", "rate"), [("24000/1001", Fraction(24000, 1001)), (23.976, Fraction(24000, 1001)), (25, 25)]
)
def test_picture_and_sound_stay_together(tmp_path: Path, fps: str | float, rate: Fraction) -> None:
    """Long enough that a rate of int(fps) would show: 3 s at 23 frames instead of 23.976 is 0.13 s."""
    count = 73
    seconds = count / Fraction(rate)
    with VideoWriter(tmp_path / "a.mp4", 96, 64, fps, RATE) as writer:
        writer.write(moving_bar(count))
        writer.write_audio(tone(round(seconds * RATE)))
    with av.open(str(tmp_path / "a.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.average_rate == rate
        assert video.frames == count
        assert video.duration * video.time_base == seconds
        assert abs(audio.duration * audio.time_base - seconds) <= Fraction(1024, RATE)
        assert (video.start_time, audio.start_time) == (0, 0)
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [i / Fraction(rate) for i in range(count)]


def test_a_silent_video_has_one_stream(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 96, 64, 24) as writer:
        writer.write(moving_bar(9))
        with pytest.raises(ValueError, match="sound"):
            writer.write_audio(tone(100))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_two_runs_with_one_output_each_publish_a_whole_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 96, 64, 24) as slow:
        slow.write(moving_bar(60))
        with VideoWriter(path, 96, 64, 24) as quick:
            quick.write(moving_bar(9))
        assert frames_in(path) == 9
        assert quick.blake3 == blake3(path.read_bytes()).hexdigest()
        slow.write(moving_bar(60))
        assert frames_in(path) == 9
    assert frames_in(path) == 120
    assert slow.blake3 == blake3(path.read_bytes()).hexdigest() != quick.blake3
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_goes_with_the_next_video_of_a_later_day(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    old, new = Temporary(path).path, Temporary(path).path
    kept = tmp_path / f".a.mp4.{'f' * 16}.tmp"
    kept.mkdir()  # it cannot be removed
    for each in (old, kept):
        os.utime(each, (0, time.time() - 25 * 3600))
    with VideoWriter(path, 96, 64, 24) as writer:
        writer.write(torch.rand(9, 64, 96, 3))
    assert set(tmp_path.iterdir()) == {new, kept, path}


def test_names_ffmpeg_would_read_as_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "http:a.mp4", "a%03d.mp4", "-y.mp4", "größe.mp4"):
        with VideoWriter(Path(name), 96, 64, 24) as writer:
            writer.write(moving_bar(3))
        assert Path(name).stat().st_size > 500
        assert len(list(tmp_path.iterdir())) == 1
        Path(name).unlink()


def test_loud_sound_is_clipped_not_wrapped(tmp_path: Path) -> None:
    frame = mp4._sound(torch.tensor([[2.0, -2.0, 0.5], [1.0, -1.0, 0.99999]]), RATE)
    assert frame.to_ndarray().reshape(-1, 2).T.tolist() == [[32767, -32767, 16383], [32767, -32767, 32766]]


class TestFailures:
    """Each leaves the folder as it was, an older video included."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.mp4"
        path.write_text("the older video")
        return path

    @pytest.fixture(autouse=True)
    def untouched(self, path: Path) -> object:
        yield
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        assert path.read_text() == "the older video"
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ltxpack-encoder")]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
    def test_in_the_caller(self, path: Path, error: type[BaseException]) -> None:
        with pytest.raises(error), VideoWriter(path, 96, 64, 24, RATE) as writer:
            writer.write(moving_bar(20))
            raise error

    @pytest.mark.parametrize(
        ("owner", "name", "error", "says"),
        [
            *((mp4._Encoder, method, FULL, "the disk is full") for method in ("__init__", "video", "finish")),
            (av, "open", av.error.FileNotFoundError(errno.ENOENT, "No such file"), "cannot be written: No such file"),
            (Path, "replace", PermissionError(errno.EACCES, "Permission denied"), "may not be written"),
        ],
    )
    def test_in_the_encoder_or_of_the_disk(
        self, path: Path, owner: object, name: str, error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(owner, name, raising(error))
        with pytest.raises(LtxpackError, match=says) as caught:  # noqa: SIM117
            with VideoWriter(path, 96, 64, 24, RATE) as writer:
                for _ in range(20):
                    writer.write(moving_bar(4))
                writer.write_audio(tone(1000))
        assert caught.value.file == str(path)

    def test_by_a_rate_the_encoder_does_not_know(self, path: Path) -> None:
        with pytest.raises(LtxpackError, match="could not be written"), VideoWriter(path, 96, 64, 24, 12) as writer:
            writer.write(moving_bar(4))
            writer.write_audio(tone(1000))

    @pytest.mark.parametrize(
        ("frames", "rate", "error", "says"),
        [
            ([], None, LtxpackError, "no frame"),
            ([moving_bar(4)], RATE, LtxpackError, "sound was not"),
            ([moving_bar(4, 32, 32)], None, ValueError, "frames are"),
        ],
        ids=["nothing written", "no sound", "another size"],
    )
    def test_of_the_caller_to_write_what_it_promised(
        self, path: Path, frames: list[Tensor], rate: int | None, error: type[Exception], says: str
    ) -> None:
        with pytest.raises(error, match=says), VideoWriter(path, 96, 64, 24, rate) as writer:
            for each in frames:
                writer.write(each)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


def test_the_same_frames_give_the_same_bytes_whatever_was_in_memory_before(demo: Path, tmp_path: Path) -> None:
    """Also where rows are no whole number of 128 pixels, and what was encoded before has left its bytes behind."""
    made = next(tensors["video"] for tensors in map(load, demo.glob("*.safetensors")))
    small, found = made[:9, :64, :64], dict[tuple[int, int], set[str]]()
    for height, width in ((64, 64), (128, 64), (256, 320), (320, 448), (512, 512)) * 3:
        with VideoWriter(tmp_path / "a.mp4", width, height, 24) as writer:
            writer.write(small.repeat(1, height // 64, width // 64, 1))
        found.setdefault((height, width), set()).add(writer.blake3)
    assert {size: len(hashes) for size, hashes in found.items()} == dict.fromkeys(found, 1)


def test_frames_are_encoded_while_the_caller_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the encoder held up, one chunk is in work and one waits; the third write waits for the encoder."""
    at_work, go_on, third = threading.Event(), threading.Event(), threading.Event()
    encode = mp4._Encoder.video

    def held_up(self: mp4._Encoder, planes: np.ndarray) -> None:
        at_work.set()
        assert go_on.wait(HANG)
        encode(self, planes)

    monkeypatch.setattr(mp4._Encoder, "video", held_up)

    def produce() -> None:
        with VideoWriter(tmp_path / "a.mp4", 96, 64, 24) as writer:
            writer.write(moving_bar(4))
            assert at_work.wait(HANG)
            writer.write(moving_bar(4))
            first_two.set()
            writer.write(moving_bar(4))
            third.set()

    first_two = threading.Event()
    caller = threading.Thread(target=produce)
    caller.start()
    assert first_two.wait(HANG)
    assert not third.wait(0.2)
    go_on.set()
    caller.join(HANG)
    assert third.is_set()
    assert frames_in(tmp_path / "a.mp4") == 12
