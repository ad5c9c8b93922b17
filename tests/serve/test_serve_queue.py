"""The queue of ``ltxpack serve``: nothing accepted is lost or made twice, whatever is killed; with stubs as workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from serving import Server, stubbed
from support import HANG, Mount, alive, ltxpack, refused, until

from ltxpack.errors import FormatError, UsageError
from ltxpack.serve.jobs import Jobs, QueueFullError, VideoTask

TASK = VideoTask("ltx-2.3-hq", "a boat", {"recipe": "hq"}, ["base", "base"], [], "64x64", "1")


def logged(output: Path, what: str) -> list[list[str]]:
    """The lines of the stubs that begin so, without that word."""
    log = output.with_suffix(".log")
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split()[1:] for line in lines if line.startswith(f"{what} ")]


def test_a_burst_is_made_once_each_in_its_order(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "start", staticmethod(subprocess.Popen))
    output = tmp_path / "videos"
    with stubbed(demo / "overlay", output) as server:

        def ask(client: int) -> list[str]:
            return [str(server.post(f"{client}.{number}")["id"]) for number in range(25)]

        with ThreadPoolExecutor(8) as pool:
            asked = [*pool.map(ask, range(8))]
        jobs = server.all_completed()
        order = [job["id"] for job in jobs]
        assert Counter(order) == Counter(job_id for ids in asked for job_id in ids)
        assert [job_id for (job_id,) in logged(output, "end")] == order
        for ids in asked:
            assert [job_id for job_id in order if job_id in ids] == ids
        assert all(output.joinpath(f"{job['id']}.mp4").read_text() == f"{job['id']} {job['prompt']}" for job in jobs)
        until(lambda: 'ltxpack_jobs_ended_total{status="completed"} 200' in server.metrics())
        loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "pydantic" in loaded and "torch" not in loaded
    assert not list((output / "pictures").iterdir())


def test_a_killed_server_and_killed_workers_lose_nothing(demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "videos"
    with stubbed(demo / "overlay", output, "cpu:2") as server:
        ids = [server.post("a boat")["id"] for _ in range(3)]
        server.all_completed()
        ids += [server.post("held")["id"] for _ in range(6)]
        begun = until(lambda: logged(output, "begin")[4:])
        os.kill(int(begun[-1][1]), signal.SIGKILL)
        until(lambda: len(logged(output, "begin")) == 6)
        assert len(logged(output, "end")) == 3
        server.process.kill()
    pids = {int(pid) for _, pid in logged(output, "begin")}
    until(lambda: not any(map(alive, pids)))
    output.with_suffix(".log.go").touch()
    left = output / f".{ids[-1]}.mp4.12.tmp"
    left.touch()
    (output / "mine.mp4").touch()
    with stubbed(demo / "overlay", output, "cpu:2") as server:
        jobs = server.all_completed()
        assert [job["id"] for job in jobs] == ids
        for job in jobs:
            assert server.client.get(f"/videos/{job['id']}/content").text == f"{job['id']} {job['prompt']}"
    begun = Counter(job_id for job_id, _ in logged(output, "begin"))
    assert set(begun) == set(ids) and begun.total() == len(ids) + 1 + 2, "only what was in work is begun again"
    assert sorted(job_id for (job_id,) in logged(output, "end")) == sorted(ids), "and nothing is made twice"
    assert (output / "mine.mp4").exists() and not left.exists(), "another's file, and what a killed worker left"


@pytest.fixture
def server(demo: Path, tmp_path: Path) -> Server:
    return stubbed(demo / "overlay", tmp_path / "videos", queue=2)


def test_what_is_deleted_ends_at_its_next_step(server: Server, tmp_path: Path) -> None:
    with server:
        slow = server.post("slow")["id"]
        until(lambda: server.job(slow)["progress"] == 1)
        waiting, last = (server.post(prompt)["id"] for prompt in ("b", "c"))
        assert server.job(slow)["status"] == "in_progress"
        assert server.client.get(f"/videos/{slow}/content").status_code == 409
        full = server.client.post("/videos", json={"prompt": "d"})
        assert full.status_code == 429 and int(full.headers["retry-after"]) > 0
        assert full.json()["error"]["code"] == "rate_limit_exceeded"
        for job_id in (waiting, slow):  # the other way round the worker may have begun it
            gone = server.client.delete(f"/videos/{job_id}").json()
            assert gone == {"id": job_id, "object": "video.deleted", "deleted": True}
            assert server.client.get(f"/videos/{job_id}").status_code == 404
        assert server.ended(last)["status"] == "completed"
        assert logged(tmp_path / "videos", "cancelled") == [[slow]]
        assert [job["id"] for job in server.jobs()] == [last]
        counted = server.metrics()
        for line in ('jobs_ended_total{status="cancelled"} 1', "jobs_refused_total 1", "jobs_accepted_total 3"):
            assert f"ltxpack_{line}" in counted
        server.client.delete(f"/videos/{last}")
    assert not list((tmp_path / "videos").glob("*.mp4"))


def test_what_fails_is_told_and_what_kills_workers_is_given_up(server: Server, tmp_path: Path) -> None:
    with server:
        failed, crashing = server.post("fail")["id"], server.post("crash")["id"]
        assert server.ended(failed)["error"] == {"code": "server_error", "message": "too small a card"}
        assert "3 workers have died" in server.ended(crashing)["error"]["message"]
        assert server.ended(server.post("after it")["id"])["status"] == "completed"
        assert len(logged(tmp_path / "videos", "begin")) == 5
        counted = server.metrics()
        assert 'worker_deaths_total{device="cpu"} 3' in counted and 'jobs_ended_total{status="failed"} 2' in counted
        health = server.client.get(server.address.replace("/v1", "/health"))
        assert health.status_code == 200 and health.json()["workers"][0]["state"] in ("idle", "busy")


def test_a_full_disk_is_waited_for(mount: Mount, demo: Path, tmp_path: Path) -> None:
    """The worker dies of it, and the jobs cannot be written: both go on once there is room."""
    mount(tmp_path / "disk", options="size=1m")
    output, ballast = tmp_path / "disk" / "videos", tmp_path / "disk" / "ballast"
    with stubbed(demo / "overlay", output) as server:
        ids = [server.post("held")["id"], server.post("a boat")["id"]]
        until(lambda: logged(output, "begin"))
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        output.with_suffix(".log.go").touch()
        health = server.address.replace("/v1", "/health")
        until(lambda: server.client.get(health).json()["workers"][0]["state"] == "down")
        assert server.client.post("/videos", json={"prompt": "d"}).status_code == 503
        again = refused(ltxpack("serve", demo / "overlay", "--port=0", "-o", tmp_path / "disk" / "other"), 1)
        assert "database or disk is full" in again and "make room there" in again
        ballast.unlink()
        assert [job["id"] for job in server.all_completed()] == ids
        assert 'worker_deaths_total{device="cpu"} 1' in server.metrics()
    assert server.log.count("the jobs cannot be read or written now") < 9


def test_a_video_that_is_waited_for_is_not_kept(server: Server, tmp_path: Path) -> None:
    with server:
        said = {"prompt": "a boat", "size": "64x64", "num_frames": 9}
        made = server.client.post("/videos/sync", json=said)
        assert made.headers["content-type"] == "video/mp4"
        assert made.text == f"{made.headers['x-video-id']} a boat"
        failed = server.client.post("/videos/sync", json={**said, "prompt": "fail"})
        assert failed.status_code == 500 and failed.json()["error"]["message"] == "too small a card"
        begun = len(logged(tmp_path / "videos", "begin"))
        url = httpx.URL(server.address)
        with contextlib.closing(HTTPConnection(url.host, url.port, timeout=HANG)) as leaving:
            headers = {"Content-Type": "application/json"}
            leaving.request("POST", "/v1/videos/sync", json.dumps({**said, "prompt": "slow"}), headers)
            until(lambda: len(logged(tmp_path / "videos", "begin")) > begun)
        until(lambda: logged(tmp_path / "videos", "cancelled"))
        until(lambda: not server.jobs())
        with contextlib.closing(HTTPConnection(url.host, url.port, timeout=HANG)) as leaving:
            leaving.putrequest("POST", "/v1/videos")
            for header in (("Content-Type", "application/json"), ("Content-Length", "9")):
                leaving.putheader(*header)
            leaving.endheaders(b"{")
        until(lambda: 'route="/v1/videos",status="499"} 1' in server.metrics())
        begun = len(logged(tmp_path / "videos", "begin"))
        with ThreadPoolExecutor(1) as waiting:
            answer = waiting.submit(server.client.post, "/videos/sync", json={**said, "prompt": "slow"})
            until(lambda: len(logged(tmp_path / "videos", "begin")) > begun)
            server.process.send_signal(signal.SIGINT)
        assert answer.result().status_code == 503 and "server ends" in answer.result().json()["error"]["message"]
    assert not list((tmp_path / "videos").glob("*.mp4")) and "Exception in ASGI" not in server.log


def test_a_worker_that_cannot_begin_ends_the_server(demo: Path, tmp_path: Path) -> None:
    with stubbed(demo / "overlay", tmp_path / "videos", STUB_FAULT="no such device") as server:
        server.process.wait(HANG)
    assert server.process.returncode == 1 and "no such device\n  next: choose another device" in server.log


def test_one_server_has_a_folder_and_only_its_own(server: Server, demo: Path, tmp_path: Path) -> None:
    with server:
        again = refused(ltxpack("serve", demo / "overlay", "--port=0", "-o", tmp_path / "videos"), 2)
        assert "another server has this folder" in again
        port = server.address.rpartition(":")[2].removesuffix("/v1")
        busy = refused(ltxpack("serve", demo / "overlay", f"--port={port}", "-o", tmp_path / "other"), 2)
        assert "cannot be listened on" in busy
    inside = refused(ltxpack("serve", demo / "overlay", "--port=0", "-o", demo / "overlay" / "videos"), 2)
    assert "lies in the overlay" in inside
    both = ("serve", demo / "overlay", "--device=cpu", "--devices=0,1", "-o", tmp_path / "other")
    assert "two answers to one question" in refused(ltxpack(*both), 2)
    assert "--api-key is empty" in refused(ltxpack("serve", demo / "overlay", "--api-key="), 2)


def test_the_queue_is_bounded_and_a_foreign_database_is_told(tmp_path: Path) -> None:
    ids = [f"video_{number:032x}" for number in range(3)]
    jobs = Jobs(tmp_path, 2)
    for job_id in ids[:2]:
        jobs.add(job_id, TASK)
    with pytest.raises(QueueFullError):
        jobs.add(ids[2], TASK)
    first = jobs.claim(0)
    assert first is not None and first.id == ids[0] and first.task == TASK
    left = tmp_path / f".{ids[0]}.mp4.{'0' * 16}.tmp"
    left.touch()
    jobs.warn(ids[0], "a long prompt")
    assert jobs.give_back(ids[0]) == "queued"
    again = jobs.claim(0)
    assert not left.exists(), "what a killed worker left"
    jobs.warn(ids[0], "a long prompt")  # the next worker finds it too
    assert again is not None and (again.id, jobs.listed(None, 1, False)[0].warnings) == (ids[0], ["a long prompt"])
    picture = jobs.pictures / f"{ids[0]}-0"
    picture.touch()
    jobs.delete(ids[0])
    assert jobs.give_back(ids[0]) is None and not picture.exists(), "its worker died after it was deleted"
    jobs.add(ids[0], TASK)
    with pytest.raises(UsageError, match="another server has this folder"):
        Jobs(tmp_path, 2)
    jobs.close()
    jobs = Jobs(tmp_path, 2)
    assert [job.status for job in jobs.listed(None, 9, descending=False)] == ["queued", "queued"]
    jobs.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(FormatError, match="is of another version"):
        Jobs(tmp_path, 2)
    (tmp_path / "jobs.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(FormatError, match="the jobs cannot be read or written"):
        Jobs(tmp_path, 2)
