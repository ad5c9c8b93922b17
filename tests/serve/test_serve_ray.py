"""``ltxpack serve`` with workers on a Ray cluster: the same jobs and rules, whatever becomes of the actors."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image
from ray_support import local_ray
from serving import Server
from support import HANG, ltxpack, refused, until

from ltxpack.errors import UsageError
from ltxpack.reporter import Reporter
from ltxpack.runtime.parallel import cluster
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings
from ltxpack.serve import ray_workers, worker
from ltxpack.serve.app import make_app
from ltxpack.serve.jobs import Jobs
from ltxpack.serve.limits import ServeLimits
from ltxpack.serve.links import Died, Opening, Workplace
from ltxpack.serve.metrics import Metrics
from ltxpack.serve.ray_workers import ActorLink, VideoActor, ray_place
from ltxpack.serve.server import ServeOptions, service_of
from ltxpack.serve.workers import OnFault, Workers

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
SESSION = SessionSettings(dtype="float32", cache=False)
SMALL = {"size": "64x64", "num_frames": 9, "model": "ltx-2.3-distilled"}
# Videos in whose middle a kill comes, and which is deleted before it can be done: 3 and 60 seconds of a processor.
LONG = {"size": "64x64", "num_frames": 9, "steps": 100}
ENDLESS = {"size": "384x384", "num_frames": 97, "steps": 100}


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    with local_ray(2) as found:
        yield found


class Heard(Reporter):
    """What the server told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def processes(self) -> dict[str, int]:
        """The actors and their processes, as they became ready."""
        found = re.findall(r"^(actor \d): a worker is ready on .*, process (\d+)$", "\n".join(self.notes), re.MULTILINE)
        return {device: int(pid) for device, pid in found}


class Ask:
    """Speaks to a server in this process, whose workers run."""

    def __init__(self, options: ServeOptions, place: Callable[[], Workplace], on_fault: OnFault = None) -> None:
        self.heard = Heard()
        self.service = service_of(options, self.heard, on_fault, place)
        self.workers, self.jobs = self.service.workers, self.service.jobs
        self._app = make_app(self.service)

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url="http://localhost") as http:
                return await http.request(method, path, **more)

        return asyncio.run(go())

    def post(self, prompt: str, **more: Any) -> str:
        answer = self.ask("POST", "/v1/videos", **(more or {"json": {**SMALL, "prompt": prompt}}))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.ask("GET", f"/v1/videos/{job_id}").json())

    def completed(self, job_id: str) -> bytes:
        """The video of a job, once it is there."""
        ended = until(lambda: job if (job := self.job(job_id))["status"] in ("completed", "failed") else None)
        assert ended["status"] == "completed", ended
        return self.ask("GET", f"/v1/videos/{job_id}/content").content

    def begun(self, job_id: str) -> None:
        until(lambda: self.job(job_id)["progress"] > 0)


@contextmanager
def serving(demo: Path, output: Path, ray: Any, workers: int = 1, on_fault: OnFault = None) -> Iterator[Ask]:
    root = demo / "overlay"
    options = ServeOptions(root, output, session=SESSION)
    asked = Ask(options, lambda: ray_place(ray, root, SESSION, f"cpu:{workers}"), on_fault)
    asked.workers.start()
    try:
        yield asked
    finally:
        asked.workers.stop()
        asked.jobs.close()


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (80, 64), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def test_what_actors_are_killed_at_or_a_server_leaves_is_made(demo: Path, tmp_path: Path, ray: Any) -> None:
    """The videos are those of a process; what is deleted ends. The next server is the command, by the address."""
    output = tmp_path / "videos"
    with serving(demo, output, ray, 2) as server:
        form = {"data": {**SMALL, "prompt": "a boat", "seed": 3}, "files": {"input_reference": ("a.png", png())}}
        with_picture = server.post("", **form)
        content = server.completed(with_picture)
        until(lambda: 'jobs_ended_total{status="completed"} 1' in server.ask("GET", "/metrics").text)
        gone = server.post("", json={**ENDLESS, "prompt": "a cat"})
        before = until(lambda: found if len(found := server.heard.processes()) == 2 else None)
        slow = server.post("", json={**LONG, "prompt": "a dog"})
        _killed_at(server, slow, before)
        assert server.ask("DELETE", f"/v1/videos/{gone}").status_code == 200
        until(lambda: 'jobs_ended_total{status="cancelled"} 1' in server.ask("GET", "/metrics").text)
        assert not [*(output / "pictures").iterdir()]
        waiting = [server.post(prompt) for prompt in ("a dog", "a cow", "a pig")]
    address = ray.get_runtime_context().gcs_address
    flags = ["--dtype=float32", "--port=0", "--devices=cpu:1", "-o", output, "--ray", address]
    command = [sys.executable, "-m", "ltxpack", "serve", demo / "overlay", *flags]
    with Server(command, LTXPACK_API_KEY="a key") as again:
        assert [job["id"] for job in again.all_completed()] == [with_picture, slow, *waiting]
        assert again.client.get(f"/videos/{slow}/content").content == (output / f"{slow}.mp4").read_bytes()
    # A shell that starts the tests in the background has them, and all they start, ignore Ctrl-C.
    hears = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    assert again.process.returncode == (130 if hears else 0) and f"connecting to Ray ({address})" in again.log
    assert content == _alone(demo, tmp_path)


def _killed_at(server: Ask, job_id: str, before: dict[str, int]) -> None:
    """Kill the actor that is in the middle of a job; another one starts, and the job begins again."""
    server.begun(job_id)
    (device,) = [one["device"] for one in server.workers.states if one["job"] == job_id]
    os.kill(before[device], signal.SIGKILL)
    until(lambda: server.heard.processes()[device] != before[device])
    (died,) = [note for note in server.heard.notes if "another worker is started" in note]
    assert re.match(rf"{device}: The actor .*; another", died)
    server.begun(job_id)
    assert f'ltxpack_worker_deaths_total{{device="{device}"}} 1' in server.ask("GET", "/metrics").text


def _alone(demo: Path, folder: Path) -> bytes:
    """The video with a picture, of this process."""
    task = {"id": "a", "prompt": "a boat", "stages": ["distilled-0.5"] * 2, "images": [["a.png", 0, 1.0]]}
    settings = {"recipe": "distilled", "width": 64, "height": 64, "num_frames": 9, "seed": 3}
    (folder / "a.png").write_bytes(png())
    paths = {"pictures": str(folder), "output": str(folder / "alone.mp4")}
    with Session(demo / "overlay", SessionSettings(device="cpu", dtype="float32", cache=False)) as session:
        assert worker.make(session, {**task, **paths, "settings": settings}, set(), lambda message: None)
    return (folder / "alone.mp4").read_bytes()


def test_an_actor_that_cannot_begin_says_why_and_another_is_tried(demo: Path, tmp_path: Path, ray: Any) -> None:
    root, heard = demo / "overlay", Heard()
    right = cluster.SharedDisk.of(root)
    wrong = iter([replace(right, version="0.0.0"), replace(right, root=tmp_path)])
    place = Workplace([Opening.of("actor 0", "cpu", root, SESSION, 1)], lambda one: ActorLink(ray, next(wrong), 1, one))
    jobs = Jobs(tmp_path / "videos", 1)
    workers = Workers(place, jobs, Metrics(), heard, None)
    workers.start()
    until(lambda: any("ltxpack.json" in note for note in heard.notes))
    workers.stop()
    jobs.close()
    assert "another ltxpack is installed there" in heard.notes[0] and "another worker is started" in heard.notes[1]
    actor = VideoActor()
    actor.open(right, {"none": 1}, 1)
    actor.open(right, {"dtype": "none"}, 1)
    assert all("fault" in actor.next() for _ in range(2)), "whatever goes wrong, nobody waits for ever"


def test_what_cannot_be_written_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The video where the server is, and the pictures where the actor is."""
    link = ActorLink.__new__(ActorLink)
    link._output = tmp_path / "none" / "a.mp4"
    said = link._kept({"done": {}, "video": b"v"})
    assert said["code"] == "server_error" and str(tmp_path) in said["log"] and str(tmp_path) not in said["failed"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    actor = VideoActor()
    actor.make({}, {"a-0": b""})
    assert "cannot be written" in actor.next()["failed"]


def test_what_a_killed_worker_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what another one uses, nor a folder that may get its lock yet, nor where a link leads."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, used, young, linked, others = (tmp_path / f"{ray_workers.FOLDER}{name}" for name in "abcde")
    for folder in (left, used, young, tmp_path / "kept"):
        folder.mkdir()
        (folder / "video.mp4").touch()
        os.utime(folder, (0, 0))
    os.utime(young)
    linked.symlink_to(tmp_path / "kept")
    others.touch()
    with ray_workers._locked(used), ray_workers._own_folder() as own:
        assert Path(own).parent == tmp_path and not left.exists()
        assert (used / "video.mp4").exists() and (young / "video.mp4").exists() and (linked / "video.mp4").exists()
        os.utime(own, (0, 0))
        with ray_workers._own_folder() as another:
            assert Path(own).exists() and Path(another).exists()
    assert not Path(own).exists() and used.exists() and others.exists()


class Deployed:
    """The application of Ray Serve, with two workers on CPUs."""

    def __init__(self, ray: Any, client: httpx.Client) -> None:
        self._ray, self._client = ray, client

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        return until(lambda: found if (found := self._client.request(method, path, **more)).status_code < 500 else None)

    def post(self, said: dict[str, Any]) -> str:
        answer = self.ask("POST", "/v1/videos", json=said)
        assert answer.status_code == 200, answer.text
        return f"/v1/videos/{answer.json()['id']}"

    def job(self, path: str) -> dict[str, Any]:
        return dict(self.ask("GET", path).json())

    def metric(self, line: str) -> bool:
        return f"ltxpack_{line}\n" in self.ask("GET", "/metrics").text

    def replicas(self, name: str) -> set[int]:
        """The processes of a deployment that live."""
        actors = self._ray._private.state.actors().values()
        return {one["Pid"] for one in actors if f"#{name}#" in one["Name"] and one["State"] == "ALIVE"}


@contextmanager
def deployed(ray: Any, args: dict[str, Any]) -> Iterator[Deployed]:
    from ray import serve

    from ltxpack.serve.ray_serve import app

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app(args), name="ltxpack")
        headers = {"Authorization": "Bearer a key"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=HANG) as client:
            yield Deployed(ray, client)
    finally:
        serve.shutdown()


def test_ray_serve_has_the_same_server_and_killed_replicas_lose_nothing(demo: Path, tmp_path: Path, ray: Any) -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    args = {"overlay": str(demo / "overlay"), "output": str(tmp_path), "devices": "cpu:2", "api_key": "a key"}
    with deployed(ray, {**args, "session": {"dtype": "float32"}}) as server:
        another = {"Authorization": "Bearer another"}
        assert server.ask("GET", "/v1/videos", headers=another).status_code == 401
        pair = [server.post({**ENDLESS, "prompt": prompt}) for prompt in ("a boat", "a fox")]
        _all_begun(server, pair)
        waiting = [server.post({**SMALL, "prompt": prompt}) for prompt in ("a dog", "a cat")]
        first, second = server.replicas("VideoWorker")
        os.kill(first, signal.SIGKILL)
        until(lambda: server.metric('jobs{status="queued"} 3'))
        _all_begun(server, pair)
        assert second in server.replicas("VideoWorker")
        (head,) = server.replicas("VideoServer")
        os.kill(head, signal.SIGKILL)
        until(lambda: head not in server.replicas("VideoServer"))
        _all_begun(server, pair)
        assert [server.job(path)["status"] for path in waiting] == ["queued"] * 2, "the others have their old places"
        assert second in server.replicas("VideoWorker")
        for path in pair:
            assert server.ask("DELETE", path).status_code == 200
        until(lambda: server.metric('jobs_ended_total{status="cancelled"} 2'))
        until(lambda: all(server.job(path)["status"] == "completed" for path in waiting))
        _answers_at_once(server, waiting)
    assert {f"/v1/videos/{video.stem}" for video in tmp_path.glob("*.mp4")} == {*waiting}


def _all_begun(server: Deployed, jobs: list[str]) -> None:
    """All of ``jobs`` are being made, at once."""
    until(lambda: all((job := server.job(path))["status"] == "in_progress" and job["progress"] > 0 for path in jobs))


def _answers_at_once(server: Deployed, kept: list[str]) -> None:
    """Ranges, and videos as the answer of a request, which ends if its client leaves."""
    fetched = server.ask("GET", f"{kept[0]}/content", headers={"Range": "bytes=0-9"})
    assert fetched.status_code == 206 and len(fetched.content) == 10
    made = server.ask("POST", "/v1/videos/sync", json={**SMALL, "prompt": "a dog"})
    assert made.status_code == 200 and made.headers["content-type"] == "video/mp4"
    with pytest.raises(httpx.ReadTimeout):
        server.ask("POST", "/v1/videos/sync", json={**ENDLESS, "prompt": "a cat"}, timeout=1)
    until(lambda: server.metric('jobs_ended_total{status="cancelled"} 3'))
    assert len(server.ask("GET", "/v1/videos").json()["data"]) == len(kept)


def test_a_replica_that_cannot_work_says_why_and_ends(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no task then, nor can its server give it one."""
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    from ltxpack.serve import replicas

    ended: list[int] = []
    monkeypatch.setattr(replicas.os, "_exit", ended.append)
    monkeypatch.setattr(replicas, "UNFIT", 0.0)
    right = cluster.SharedDisk.of(demo / "overlay")
    opening = Opening.of("worker 0", "cpu", right.root, SESSION, 1)

    async def alive() -> None:
        """The server is."""

    async def said() -> list[Any]:
        server = SimpleNamespace(__ray_ready__=SimpleNamespace(remote=alive))
        wrong = replace(right, version="0.0.0")
        return [message async for message in replicas.VideoWorker().work(server, wrong, opening, ({"id": "a"}, {}))]

    answer = asyncio.run(said())
    assert ended == [1] and len(answer) == 1 and "another ltxpack is installed there" in answer[0]["fault"]
    handle = SimpleNamespace(work=SimpleNamespace(remote=lambda *_: iter(answer)))
    link = replicas.ReplicaLink(replicas.Replicas(handle, None, right), opening)
    with pytest.raises(Died, match="another ltxpack"), link.free():
        raise AssertionError("no task is taken from the queue")
    assert not link.is_missing
    monkeypatch.setattr(replicas, "PATIENCE", -1.0)
    link._replicas.waiting_since = time.monotonic()
    assert link.is_missing


def test_what_ray_serve_is_told_are_the_flags_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    from pydantic import ValidationError

    from ltxpack.serve.ray_serve import ServeArguments

    monkeypatch.setenv("LTXPACK_API_KEY", "a key")
    typed = {"overlay": "/out", "output": "/videos", "workers": "8", "queue": "5", "allow_hosts": "gpu1"}
    found = ServeArguments(**typed, keep_videos="24h", keep_bytes="50GB", session={"format": "fp8"}).options()
    assert found == ServeOptions(
        Path("/out"), Path("/videos"), api_key="a key", allow_hosts=["gpu1"], workers=8,
        session=SessionSettings(format="fp8"), limits=ServeLimits(queue=5, keep_seconds=86400.0, keep_bytes=50 * 10**9),
    )  # fmt: skip
    for wrong in (
        {"session": {"none": 1}},
        {"session": {"devices": "0,1"}},
        {"overlay": "out"},
        {"workers": "0"},
        {"api_key": ""},
        {"keep": "24h"},
    ):
        with pytest.raises(ValidationError):
            ServeArguments(**{**typed, **wrong})
    with pytest.raises(UsageError, match="unknown format"):
        ServeArguments(**typed, session={"format": "fp9"}).options()
    with pytest.raises(UsageError, match="keep_videos is no such time"):
        ServeArguments(**typed, keep_videos="24").options()


@pytest.mark.parametrize(
    ("flags", "problem", "status"),
    [
        (("--ray",), "the Ray cluster has no GPU", 1),
        (("--device", "cpu", "--ray"), "--device does not go with --ray", 2),
        (("--devices", "0,1", "--ray"), "counts workers on CPUs alone", 2),
        (("--devices", "cpu:2", "--workers", "3", "--ray"), "two answers to one question", 2),
        (("--workers", "3"), "--workers goes with --ray", 2),
    ],
)
def test_what_does_not_go_with_a_cluster_is_refused(
    flags: tuple[str, ...], problem: str, status: int, demo: Path, tmp_path: Path
) -> None:
    command = ("serve", demo / "overlay", "--port=0", "-o", tmp_path / "videos", *flags)
    assert problem in refused(ltxpack(*command), status)
    assert not (tmp_path / "videos").exists()


def test_actors_wait_for_cards_that_join_later(demo: Path, ray: Any) -> None:
    place = ray_place(ray, demo / "overlay", SESSION, workers=3)
    assert [(one.device, one.settings["device"], one.sharers) for one in place.openings] == [
        (f"actor {number}", "cuda", 3) for number in range(3)
    ]
    link = place.start(place.openings[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "PATIENCE", 0.1)
        assert next(link.messages()) == {"note": cluster.NOT_STARTED}
    link.check()
    link.end()
    with pytest.raises(Died):
        until(link.check)
