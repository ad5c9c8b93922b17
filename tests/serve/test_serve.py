"""``ltxpack serve`` with real workers: OpenAI's client as it is, and what a worker says of its videos."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import openai
import pytest
from PIL import Image
from serving import Server
from support import until

from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings
from ltxpack.serve import worker
from ltxpack.serve.ray_workers import ActorLink

KEY = "a key"
SMALL: dict[str, Any] = {"num_frames": 9, "height": 64, "width": 64}


# Over HTTP


@pytest.fixture(scope="module")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that goes on where a killed one left a job."""
    flags = ["--device=cpu", "--dtype=float32", "--port=0", "-o", tmp_path_factory.mktemp("served")]
    command = [sys.executable, "-m", "ltxpack", "serve", demo / "overlay", *flags]
    with Server(command, LTXPACK_API_KEY=KEY) as killed:
        killed.post("before the kill", model="ltx-2.3-distilled")
        killed.process.kill()
    with Server(command, LTXPACK_API_KEY=KEY) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with warnings.catch_warnings():
        # The client warns of the end of a service that is not ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        with openai.OpenAI(base_url=server.address, api_key=KEY, max_retries=0) as client:
            yield client


def frames_of(content: bytes) -> int:
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.audio
        return sum(1 for _ in container.decode(video=0))


def test_openais_client_makes_and_fetches_videos(server: Server, client: openai.OpenAI, tmp_path: Path) -> None:
    assert [model.id for model in client.models.list()][:2] == ["ltx-2.3-hq", "ltx-2.3-distilled"]
    Image.new("RGB", (80, 64), (200, 30, 30)).save(tmp_path / "a.png")
    first = client.videos.create(
        prompt="a boat", model="ltx-2.3-hq", size="64x64", seconds="1", input_reference=tmp_path / "a.png",
        extra_body={"fps": 9, "steps": 2, "video_stg": 0.5, "video_stg_blocks": [0, 1]},
    )  # fmt: skip
    assert first.status == "queued" and first.object == "video" and first.progress == 0 and first.seconds == "1"
    second = client.videos.create_and_poll(
        prompt="a dog", model="ltx-2.3-distilled", size="64x64", extra_body={"num_frames": 9}, poll_interval_ms=50
    )
    assert second.status == "completed" and second.progress == 100 and second.completed_at is not None
    made = client.videos.retrieve(first.id)
    assert made.status == "completed" and made.prompt == "a boat" and made.error is None
    assert frames_of(client.videos.download_content(first.id).read()) == 9
    listed = [video.id for video in client.videos.list(limit=2, order="asc")]
    assert listed[-2:] == [first.id, second.id] and len(listed) == 3, "pages are followed"
    assert client.videos.delete(second.id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        client.videos.retrieve(second.id)
    assert gone.value.code == "not_found"
    with pytest.raises(openai.BadRequestError, match="a multiple of 64") as refused:
        client.videos.create(prompt="a boat", size="1280x720")
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").videos.list()


def test_what_a_killed_server_had_accepted_is_made(server: Server) -> None:
    (before,) = (job for job in server.jobs() if job["prompt"] == "before the kill")
    assert server.ended(before["id"])["status"] == "completed"
    got, looked = (server.client.request(how, f"/videos/{before['id']}/content") for how in ("GET", "HEAD"))
    assert frames_of(got.content) == 9
    assert (looked.status_code, looked.content, looked.headers["content-length"]) == (200, b"", str(len(got.content)))


def test_a_video_in_the_answer_and_the_counts(server: Server) -> None:
    said = {"prompt": "a boat", "size": "64x64", "num_frames": 9, "model": "ltx-2.3-distilled"}
    made = server.client.post("/videos/sync", json=said)
    assert frames_of(made.content) == 9 and made.headers["content-type"] == "video/mp4"
    gone = made.headers["x-video-id"]
    until(lambda: gone not in [job["id"] for job in server.jobs()])
    assert re.search(r'^ltxpack_videos_total\{model="ltx-2.3-distilled"\} [1-9]', server.metrics(), re.MULTILINE)
    until(lambda: re.search(r'^ltxpack_workers\{device="cpu",state="idle"\} 1$', server.metrics(), re.MULTILINE))


# What a worker says


class Told:
    """An inbox and what was said; a job is cancelled when it says that it has come so far."""

    def __init__(self, cancel_at: int = 101) -> None:
        self.cancelled: set[str] = set()
        self.said: list[dict[str, Any]] = []
        self._cancel_at = cancel_at

    def say(self, message: Any) -> None:
        self.said.append(message)
        if message.get("progress", 0) >= self._cancel_at:
            self.cancelled.add("video_1")

    def of(self, kind: str) -> list[Any]:
        return [message[kind] for message in self.said if kind in message]


@pytest.fixture(scope="module")
def session(demo: Path) -> Iterator[Session]:
    with Session(demo / "overlay", SessionSettings(device="cpu", dtype="float32", cache=False)) as session:
        yield session


def made(session: Session, told: Told, output: Path, prompt: str = "a boat", **given: Any) -> bool:
    settings, stages = {**SMALL, "recipe": "distilled", **given}, ["distilled-0.5", "distilled-0.5"]
    task = {"id": "video_1", "prompt": prompt, "settings": settings, "stages": stages, "images": []}
    return worker.make(session, {**task, "pictures": ".", "output": str(output)}, told.cancelled, told.say)


def test_progress_rises_to_the_end_and_warnings_come_along(session: Session, tmp_path: Path) -> None:
    told = Told()
    assert made(session, told, tmp_path / "a.mp4", "boat " * 1100)
    progress = told.of("progress")
    assert progress == sorted(set(progress)) and progress[-1] == 99 and len(progress) >= 11
    assert set(told.of("done")[0]) >= {"text", "stage 1", "stage 2", "video"}
    assert "of which the model reads 1024" in told.of("warning")[0]
    assert frames_of((tmp_path / "a.mp4").read_bytes()) == 9


@pytest.mark.parametrize("percent", [1, 10, 60])
def test_a_cancelled_job_ends_at_its_next_step_and_the_next_is_made(
    session: Session, tmp_path: Path, percent: int
) -> None:
    told = Told(percent)
    assert made(session, told, tmp_path / "a.mp4")
    assert told.said[-1] == {"cancelled": True} and len([at for at in told.of("progress") if at >= percent]) == 1
    assert not [*tmp_path.iterdir()] and not told.cancelled
    if percent == 60:
        again = Told()
        assert made(session, again, tmp_path / "a.mp4") and again.of("done")


def test_what_cannot_be_made_is_told_without_paths(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    assert made(session, told, tmp_path / "a.mp4", recipe="one-stage")
    (failed,) = [message for message in told.said if "failed" in message]
    assert failed["code"] == "invalid_request" and "names a block" in failed["failed"]
    told = Told()
    assert made(session, told, tmp_path / "no" / "a.mp4")
    (failed,) = [message for message in told.said if "failed" in message]
    assert str(tmp_path) not in failed["failed"] and str(tmp_path) in failed["log"]

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker, "write_video", broken)
    told = Told()
    assert not made(session, told, tmp_path / "a.mp4"), "another process is needed"
    assert told.said[-1]["ends"] and "illegal memory access" in told.said[-1]["log"]


def test_what_cannot_be_written_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The video where the server is, and the pictures where the actor is."""
    link = ActorLink.__new__(ActorLink)
    link._output = tmp_path / "none" / "a.mp4"
    said = link._kept({"done": {}, "video": b"v"})
    assert said["code"] == "server_error" and str(tmp_path) in said["log"] and str(tmp_path) not in said["failed"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    said: list[Any] = []
    session: Any = None
    assert worker.make_apart(session, {"files": {"a-0": b""}}, set(), said.append)
    assert "cannot be written" in said[0]["failed"]


def test_what_a_killed_worker_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what another one uses, nor a folder that may get its lock yet, nor where a link leads."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, used, young, linked, others = (tmp_path / f"{worker.FOLDER}{name}" for name in "abcde")
    for folder in (left, used, young, tmp_path / "kept"):
        folder.mkdir()
        (folder / "video.mp4").touch()
        os.utime(folder, (0, 0))
    os.utime(young)
    linked.symlink_to(tmp_path / "kept")
    others.touch()
    with worker._locked(used), worker._own_folder() as own:
        assert Path(own).parent == tmp_path and not left.exists()
        assert (used / "video.mp4").exists() and (young / "video.mp4").exists() and (linked / "video.mp4").exists()
        os.utime(own, (0, 0))
        with worker._own_folder() as another:
            assert Path(own).exists() and Path(another).exists()
    assert not Path(own).exists() and used.exists() and others.exists()
