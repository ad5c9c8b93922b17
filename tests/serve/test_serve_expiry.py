"""What ``ltxpack serve`` keeps no longer: jobs that ended too long ago, videos beyond the bytes; by a test's clock."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import stubbed
from support import ltxpack, refused

from ltxpack.serve import app
from ltxpack.serve.answers import VideoAnswer
from ltxpack.serve.jobs import Jobs, VideoTask
from ltxpack.serve.metrics import Metrics

TASK = VideoTask("ltx-2.3-hq", "a boat", {"recipe": "hq"}, ["base", "base"], [], "64x64", "1")
DAY = 86400.0
HUNDRED = b"v" * 100


class Kept:
    """Jobs with a clock that the test sets; a video has 100 bytes."""

    def __init__(self, folder: Path, **bounds: Any) -> None:
        self.now, self.made = 1e9, 0
        self.jobs = Jobs(folder, 10, clock=lambda: self.now, **bounds)

    def end(self, *, failed: bool = False) -> str:
        """A further job that ends now."""
        job_id = f"video_{self.made:032x}"
        self.made += 1
        self.jobs.add(job_id, TASK)
        claimed = self.jobs.claim(0)
        assert claimed is not None and claimed.id == job_id
        if failed:
            self.jobs.fail(job_id, "server_error", "too small a card")
        else:
            self.jobs.video(job_id).write_bytes(HUNDRED)
            self.jobs.complete(job_id)
        return job_id

    @property
    def left(self) -> list[str]:
        return [job.id for job in self.jobs.listed(None, 99, descending=False)]

    @property
    def files(self) -> list[str]:
        return sorted(path.stem for path in self.jobs.folder.glob("*.mp4"))


Opened = Callable[..., Kept]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    found: list[Kept] = []

    def make(**bounds: Any) -> Kept:
        found.append(Kept(tmp_path, **bounds))
        return found[-1]

    yield make
    for kept in found:
        kept.jobs.close()


def test_jobs_that_ended_go_after_their_time_with_their_files(opened: Opened) -> None:
    kept = opened(keep_seconds=DAY)
    done, failed = kept.end(), kept.end(failed=True)
    job = kept.jobs.get(done)
    assert job is not None and job.public["expires_at"] == 1e9 + DAY
    kept.now += DAY - 1
    assert not kept.jobs.expire() and kept.files == [done]
    late = kept.end()
    waiting = kept.jobs.add("video_" + "a" * 32, TASK)
    assert waiting.public["expires_at"] is None
    kept.now += 1
    assert kept.jobs.expire() == {"time": 2}
    assert failed not in kept.left and kept.left == [late, waiting.id] and kept.files == [late]
    kept.now += 100 * DAY
    assert kept.jobs.expire() == {"time": 1} and kept.left == [waiting.id], "what waits does not expire"


def test_the_oldest_videos_go_beyond_the_bytes(opened: Opened) -> None:
    kept = opened(keep_bytes=250)
    ids = [kept.end(), kept.end(failed=True), kept.end(), kept.end(), kept.end()]
    assert not kept.jobs.expire(), "whoever waits for a video has a minute to fetch it"
    assert kept.jobs.kept_bytes() == 400
    kept.now += 60
    newest = kept.end()
    assert kept.jobs.expire() == {"space": 3} and kept.left == [ids[1], ids[4], newest]
    assert kept.files == [ids[4], newest] and kept.jobs.kept_bytes() == 200
    job = kept.jobs.get(newest)
    assert job is not None and job.public["expires_at"] is None
    kept.now += 1000
    assert not kept.jobs.expire()


def test_a_video_that_is_fetched_stays_until_it_is_sent(opened: Opened) -> None:
    kept = opened(keep_seconds=DAY, keep_bytes=50)
    job_id, other = kept.end(), kept.end()
    kept.now += 2 * DAY
    sent: list[Any] = []

    async def send(message: Any) -> None:
        if not sent:
            assert kept.jobs.expire() == {"time": 1} and kept.left == [job_id], "the other one, not this one"
        sent.append(message)

    async def fetch(*, once: bool) -> None:
        scope = {"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": "2.4"}}
        await VideoAnswer(kept.jobs, job_id, once=once)(scope, receive, send)

    async def receive() -> Any:
        raise AssertionError("nobody asks")

    asyncio.run(fetch(once=False))
    assert [message.get("status") for message in sent] == [200, None] and sent[-1]["body"] == HUNDRED
    with kept.jobs.fetching(job_id), kept.jobs.fetching(job_id) as path:
        assert path is not None and not kept.jobs.expire()
    assert kept.jobs.expire() == {"time": 1} and not kept.left and not kept.files
    asyncio.run(fetch(once=False))
    assert sent[2]["status"] == 404 and b"the video was removed" in sent[3]["body"]
    assert other not in kept.left


def test_what_is_sent_once_goes_also_when_its_client_leaves(opened: Opened) -> None:
    kept = opened()
    job_id = kept.end()

    async def send(message: Any) -> None:
        raise OSError("the client has left")

    async def fetch() -> None:
        scope = {"type": "http", "method": "POST", "headers": [], "asgi": {"spec_version": "2.4"}}
        await VideoAnswer(kept.jobs, job_id, once=True)(scope, lambda: None, send)  # type: ignore[arg-type,return-value]

    with pytest.raises(OSError, match="has left"):
        asyncio.run(fetch())
    assert not kept.left and not kept.files


def test_the_server_looks_again_and_again_and_counts(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, metrics = opened(keep_seconds=DAY), Metrics()
    kept.end()
    looks = 0

    async def wait(seconds: float) -> None:
        nonlocal looks
        looks += 1
        assert seconds == app.EXPIRY
        if looks == 1:
            kept.now += DAY
        if looks == 2:
            monkeypatch.setattr(kept.jobs, "expire", damaged)
        if looks == 3:
            raise asyncio.CancelledError

    def damaged() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(asyncio, "sleep", wait)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(app.expire_for_ever(kept.jobs, metrics))
    assert not kept.left
    assert 'ltxpack_jobs_expired_total{reason="time"} 1' in metrics.text({})
    assert "ltxpack_expiry_faults_total 1" in metrics.text({})


def test_without_bounds_nothing_goes_which_is_said(opened: Opened, demo: Path, tmp_path: Path) -> None:
    kept = opened()
    kept.end()
    kept.now += 10000 * DAY
    assert not kept.jobs.expire() and len(kept.files) == 1
    asyncio.run(app.expire_for_ever(kept.jobs, Metrics()))
    with stubbed(demo / "overlay", tmp_path / "videos") as server:
        done = server.ended(server.post("a boat")["id"])
        size = (tmp_path / "videos" / f"{done['id']}.mp4").stat().st_size
        assert done["expires_at"] is None and f"ltxpack_kept_bytes {size}" in server.metrics()
    assert "videos stay until they are deleted; --keep-videos 24h or --keep-bytes 50GB bounds them" in server.log


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--keep-videos", "24"), "expected a time of 60 s or more such as 90m, 24h or 7d"),
        (("--keep-videos", "59s"), "--keep-videos is no such time"),
        (("--keep-bytes", "a lot"), "--keep-bytes is not a size"),
    ],
)
def test_bounds_that_are_none(flags: tuple[str, ...], problem: str, demo: Path, tmp_path: Path) -> None:
    assert problem in refused(ltxpack("serve", demo / "overlay", *flags, "-o", tmp_path / "videos"), 2)
