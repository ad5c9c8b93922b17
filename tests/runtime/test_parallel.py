"""Ranks that take passes in turn make the video of one device, bit for bit; what is left when one of them ends."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import HANG, Notes, alive, ltxpack, until
from warm_processes import WarmProcess

from ltxpack import Pipeline
from ltxpack.errors import DeviceError, LtxpackError, UsageError
from ltxpack.runtime.model import kernels
from ltxpack.runtime.parallel import exchange
from ltxpack.runtime.parallel.devices import named_devices
from ltxpack.runtime.parallel.exchange import Exchange
from ltxpack.runtime.parallel.process import ProcessWorker
from ltxpack.runtime.parallel.ranks import Numerics
from ltxpack.runtime.parallel.schemes import Split
from ltxpack.runtime.parallel.team import Team
from ltxpack.runtime.recipe_run import decode_video, work_of
from ltxpack.runtime.request import Request
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings
from ltxpack.runtime.torch_settings import round_as, rounding

pytestmark = pytest.mark.usefixtures("warm_workers")
TINY: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}
STG: dict[str, Any] = {"video_stg": 1.0, "audio_stg": 0.5, "video_stg_blocks": (0,), "audio_stg_blocks": (1,)}
VIDEOS: dict[str, dict[str, Any]] = {
    "three passes": {"steps": 3},
    "four passes, skipped steps": {"recipe": "two-stage", "steps": 3, "video_skip_step": 1, **STG},
    "one pass": {"recipe": "distilled"},
}


@pytest.fixture(scope="module")
def alone(demo: Path) -> Iterator[Pipeline]:
    with Pipeline.from_overlay(demo / "overlay", device="cpu", dtype="float32") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def three(demo: Path) -> Iterator[Pipeline]:
    with Pipeline.from_overlay(demo / "overlay", devices="cpu:3", parallel="guidance", dtype="float32") as pipeline:
        yield pipeline


def latents(pipeline: Pipeline, **given: Any) -> list[torch.Tensor]:
    video = pipeline("A paper boat", **TINY, **given)
    return [part for stage in video.latents.stages for part in (stage.video, stage.audio)]


# These make pipelines of several devices of their own: before the one that the other tests share.


def test_a_pipeline_that_cannot_be_opened_leaves_no_ranks(demo: Path) -> None:
    with pytest.raises(LtxpackError, match="none-such"):
        Pipeline.from_overlay(demo / "overlay", devices="cpu:2", stage1="none-such")
    assert Team._only.acquire(blocking=False), "another can be opened"
    Team._only.release()


def test_ranks_that_were_never_needed_end_in_order(demo: Path) -> None:
    with Pipeline.from_overlay(demo / "overlay", devices="cpu:2", dtype="float32") as two:
        team = two.session.ranks
        assert isinstance(team, Team)
        (worker,) = team._workers
        assert worker.ready.wait(HANG)
        worker.dismiss(idle=True)
        assert worker.process.wait(HANG) == 0, "it does not wait for rank 0 to join"


def test_the_ranks_attend_by_what_rank_0_measured(demo: Path, alone: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank alone would find another kernel the fastest: the others are processes where nothing is changed."""
    kinds = dict.fromkeys((kernels.VIDEO, kernels.TEXT, kernels.AUDIO), "math")
    monkeypatch.setattr(kernels, "choose", lambda *_: kernels.KernelChoice(kinds, "attention: as measured here", {}))
    overlay, given = demo / "overlay", {"steps": 2}
    with Pipeline.from_overlay(overlay, devices="cpu:2", parallel="guidance", dtype="float32") as two:
        found = latents(two, **given)
    monkeypatch.undo()
    with Pipeline.from_overlay(overlay, device="cpu", dtype="float32", attention="math") as one:
        assert all(map(torch.equal, found, latents(one, **given)))
    assert not all(map(torch.equal, found, latents(alone, **given))), "what is measured shows in a video"


@pytest.mark.parametrize("given", VIDEOS.values(), ids=list(VIDEOS))
def test_three_ranks_make_the_latents_of_one_device(
    given: dict[str, Any], alone: Pipeline, three: Pipeline, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").convert("RGB").save(picture)
    given = {**given, "images": [f"{picture}", f"{picture}@last:0.5"]}
    found, expected = latents(three, **given), latents(alone, **given)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_rank_takes_over_what_rank_0_computes_by(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rounding()
    with Session(demo / "overlay", SessionSettings(device="cpu", dtype="float32")) as session:
        kinds = dict.fromkeys((kernels.VIDEO, kernels.TEXT, kernels.AUDIO), "math")
        other = before | {"float32_matmul_precision": "high", "cudnn.enabled": False, "math_sdp": False}
        numerics = Numerics(kernels.KernelChoice(kinds, "", {}), {}, other)
        try:
            session.adopt(numerics)
            assert {name: rounding()[name] for name in other if other[name] != before[name]} == {
                "float32_matmul_precision": "high", "cudnn.enabled": False, "math_sdp": False,
            }  # fmt: skip
        finally:
            round_as(before)
        assert rounding() == before
        session.prepare([Request.of("a", **TINY).work(("base", "base"))])
        assert session.attention is numerics.attention, "nothing is measured"
        monkeypatch.setattr(kernels, "fault", lambda kind, name: "no such unit")
        lesser, problem = Session(demo / "overlay", session.settings), "cpu cannot attend by math, which rank 0 chose"
        with lesser, pytest.raises(DeviceError, match=problem):
            lesser.adopt(numerics)


def test_the_ranks_exchange_the_velocities_of_guided_steps_and_nothing_else(
    three: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    broadcast = exchange.dist.broadcast

    def counted(tensor: torch.Tensor, src: int) -> None:
        sent.append((src, tensor.nbytes))
        broadcast(tensor, src=src)

    monkeypatch.setattr(exchange.dist, "broadcast", counted)
    first = latents(three, steps=3)[:2]
    # 2n + 1 evaluations by three passes, which the ranks take in turn; stage 2 has one pass.
    assert sent == [(owner, part.nbytes) for owner in (0, 1, 2) for part in first] * 7


def test_a_rank_that_dies_while_the_device_waits_for_it(three: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on cards, where the host does not wait in an exchange: at the end it waits for a device that never comes."""
    team, abandoned = three.session.ranks, threading.Event()
    assert isinstance(team, Team)

    def waits(self: Exchange) -> None:
        os.kill(team._workers[0].process.pid, signal.SIGKILL)
        assert abandoned.wait(HANG), "what waits on the card is given up"
        finish(self)

    finish = Exchange.finish
    monkeypatch.setattr("ltxpack.runtime.parallel.team.GIVEN_UP", HANG)
    monkeypatch.setattr(Exchange, "finish", waits)
    monkeypatch.setattr(Exchange, "abandon", lambda self: abandoned.set())
    with pytest.raises(DeviceError, match="rank 1 on cpu ended: its process was ended by signal 9"):
        three("A paper boat", **TINY, steps=2)


def test_the_ranks_decode_tiles_in_turn_into_the_frames_of_one_device(
    alone: Pipeline, three: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[tuple[int, tuple[int, ...]]] = []
    recv = exchange.dist.recv

    def counted(tensor: torch.Tensor, src: int) -> None:
        got.append((src, tuple(tensor.shape)))
        recv(tensor, src)

    monkeypatch.setattr(exchange.dist, "recv", counted)
    wide: dict[str, Any] = {**TINY, "width": 1600, "recipe": "distilled"}
    found = three("A paper boat", **wide)
    # Three tiles of at most 24 latents that overlap by two: rank 0 decodes the first, and gets the others.
    assert got == [(1, (3, 9, 64, 768)), (2, (3, 9, 64, 192))]
    assert torch.equal(found.frames, alone("A paper boat", **wide).frames)
    team = three.session.ranks
    assert isinstance(team, Team)
    others = [worker.process.pid for worker in team._workers]

    def full(frames: torch.Tensor) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        decode_video(three.session, found.latents.video, full)
    assert not any(map(alive, others)), "nobody is left in the middle of a video"


def test_a_rank_that_dies_ends_the_video_and_the_next_one_is_made(
    alone: Pipeline, three: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltxpack.runtime.parallel.team.GIVEN_UP", HANG)
    team = three.session.ranks
    assert isinstance(team, Team)
    workers: list[ProcessWorker] = []

    def kill(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("stage 1", 1) and not workers:
            workers.extend(team._workers)
            workers[1].process.kill()

    with pytest.raises(DeviceError, match="rank 2 on cpu ended: its process was ended by signal 9"):
        three("A paper boat", progress=kill, **TINY, steps=3)
    assert len(workers) == 2 and not any(alive(worker.process.pid) for worker in workers), "nobody is left"
    assert workers[0].said is None, "who lost its connection leaves it to the other to be the cause"
    assert all(map(torch.equal, latents(three, steps=2), latents(alone, steps=2)))


def test_each_rank_plans_with_its_share_of_the_host(alone: Pipeline, three: Pipeline) -> None:
    assert [pipeline.session.residency.processes for pipeline in (alone, three)] == [1, 3]


def test_each_rank_plans_for_its_share_of_the_passes(alone: Pipeline, three: Pipeline) -> None:
    for pipeline, groups in ((alone, [1, 1]), (three, [3, 1])):
        stages = work_of(pipeline.session, Request.of("a", **TINY)).stages
        assert [stage.split for stage in stages] == [Split(group) for group in groups]


def test_a_second_team_of_one_process_is_refused(three: Pipeline, demo: Path) -> None:
    with pytest.raises(UsageError, match="another pipeline of this process has several devices"):
        Pipeline.from_overlay(demo / "overlay", devices="cpu:2")


def test_a_rank_that_cannot_begin_says_why(three: Pipeline, tmp_path: Path) -> None:
    place = three.session.ranks._place  # type: ignore[attr-defined]
    assert place.is_dir()
    three.close()
    assert not place.exists()
    config, work = three.session.transformer_config, Request.of("a").work(("base", "base"))
    team = Team(tmp_path / "none", SessionSettings(), ("cpu", "cpu"), torch.device("cpu"), config, Notes())
    with pytest.raises(DeviceError, match=r"rank 1 on cpu ended: .*none"), team.together(work, three.session.numerics):
        raise AssertionError("never begun")
    team.close()


def test_the_ranks_end_with_rank_0(demo: Path) -> None:
    code = (
        "import sys, time; from ltxpack import Pipeline\n"
        "two = Pipeline.from_overlay(sys.argv[1], devices='cpu:2', dtype='float32')\n"
        "team = two.session.ranks; print(team._workers[0].process.pid, team._place, flush=True); time.sleep(600)"
    )
    first = WarmProcess([sys.executable, "-c", code, demo / "overlay"], stdout=subprocess.PIPE)
    assert first.stdout is not None
    with first.stdout as told:
        pid, _, place = told.readline().decode().strip().partition(" ")
        worker, meeting = int(pid), Path(place)
        assert stat.S_IMODE(meeting.stat().st_mode) == 0o700, "nobody else can join"
        first.kill()
        first.wait()
        until(lambda: not alive(worker))
        assert not meeting.exists()


def test_a_command_whose_rank_is_killed_ends_within_seconds(demo: Path, tmp_path: Path) -> None:
    small = ("--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2000", "--no-cache")
    command = [sys.executable, "-m", "ltxpack", "run", demo / "overlay", "--prompt", "A boat", "--devices", "cpu:2"]
    running = WarmProcess([*command, *small, "-o", tmp_path / "x.mp4"], stderr=subprocess.PIPE)
    assert running.stderr is not None
    with io.TextIOWrapper(running.stderr) as errors:
        # The ways are told once all ranks are at work.
        told = next(line for line in errors if line.startswith("parallel "))
        [worker] = map(int, Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split())
        os.kill(worker, signal.SIGKILL)
        begin = time.monotonic()
        said = errors.read()
        assert running.wait(HANG) == 1 and time.monotonic() - begin < 10, told
    assert "rank 1 on cpu ended: its process was ended by signal 9" in said
    assert not alive(worker) and not [*tmp_path.iterdir()]


def test_one_process_does_not_ask_how_many_there_are(alone: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **more: Any) -> None:
        raise AssertionError("an exchange on one device")

    for name in ("broadcast", "init_process_group"):
        monkeypatch.setattr(exchange.dist, name, refused)
    assert latents(alone, steps=2)


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("cpu", ("cpu",)),
        ("cpu:3", ("cpu",) * 3),
        ("0", ("cuda:0",)),
        ("2,0", ("cuda:2", "cuda:0")),
        ("cuda:1", ("cuda:1",)),
    ],
)
def test_devices_are_ordinals_or_a_number_of_processes(text: str, devices: tuple[str, ...]) -> None:
    assert named_devices(text) == devices


@pytest.mark.parametrize(
    "text", ["", "x", "0,,1", "0,0", "cpu:0", "cpu:99999999999", "-1", "cpu:2,0", "0-3", "1e3", "²"]
)
def test_other_devices_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--devices names"):
        named_devices(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are cards")
def test_cards_that_are_not_there(demo: Path) -> None:
    done = ltxpack("run", demo / "overlay", "--prompt", "a", "--devices", "0,1")
    assert done.returncode == 1 and "next: the same command with --devices cpu," in done.stderr


@pytest.mark.parametrize("more", [("--device", "cpu"), ("--save-activations", "x.safetensors")])
def test_what_does_not_go_with_several_devices_is_refused(more: tuple[str, ...], demo: Path) -> None:
    done = ltxpack("run", demo / "overlay", "--prompt", "a", "--devices", "cpu:2", *more)
    assert done.returncode == 2 and "--devices" in done.stderr
