"""Ray: actors make the videos of a prompts file or of a server; a server as an application of Ray Serve.

All with one Ray, which takes seconds to start; whatever becomes of an actor, no video is lost or made twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image
from serving import Asking, Server
from support import HANG, Done, Mount, Notes, alive, ltxpack, refused, tree, until
from warm_processes import WarmProcess

import ltxpack as package
from ltxpack.errors import DeviceError, LtxpackError, UsageError
from ltxpack.runtime.parallel import cluster
from ltxpack.runtime.parallel.actors import ActorWorker, WorkerActor
from ltxpack.runtime.parallel.cluster import SharedDisk, connected
from ltxpack.runtime.parallel.contract import Opening
from ltxpack.runtime.parallel.crew import LINE_WORKER
from ltxpack.runtime.parallel.devices import RAY_HERE
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings
from ltxpack.serve import worker
from ltxpack.serve.jobs import Jobs
from ltxpack.serve.limits import ServeLimits
from ltxpack.serve.links import WORKER, Died, Workplace
from ltxpack.serve.metrics import Metrics
from ltxpack.serve.ray_workers import ActorLink, ray_place
from ltxpack.serve.server import ServeOptions, service_of
from ltxpack.serve.workers import OnFault, Workers

# Not imported here: Ray reads its variables when it is, see the fixture.
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
FLAGS = ("--dtype", "float32", "--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2")
TWO = ("--devices", "cpu:2", "--ray")
SESSION = SessionSettings(dtype="float32", cache=False)
SMALL = {"size": "64x64", "num_frames": 9, "model": "ltx-2.3-distilled"}
# Videos in whose middle a kill comes, and which is deleted before it can be done: 3 and 60 seconds of a processor.
LONG = {"size": "64x64", "num_frames": 9, "steps": 100}
ENDLESS = {"size": "384x384", "num_frames": 97, "steps": 100}
ENVIRONMENT = {
    "RAY_AUTH_TOKEN": "0" * 64,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray asks a cloud's own address which cloud this is, whether or not it is to report that.
    "http_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost",
}


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    """Ray with two CPUs, as ``--ray`` starts it; what this process connects to takes it. It asks nobody outside.

    What shows Ray to people, and what would start more machines, is left out.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        node = importlib.import_module("ray._private.node").Node
        for name in ("start_api_server", "start_log_monitor", "start_monitor"):
            patch.setattr(node, name, lambda *_, **__: None)
        utils = importlib.import_module("ray._private.utils")
        patch.setattr(utils, "get_dashboard_dependency_error", lambda: "its agent does what Ray needs, and no more")
        with connected(RAY_HERE, 2) as found:
            yield found


# The videos of a prompts file


def written(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def run(overlay: Path, prompts: Path, *flags: str | Path) -> Done:
    return ltxpack("run", overlay, "--prompts", prompts, *FLAGS, *flags)


def statuses(table: str) -> list[str]:
    return re.findall(r"^ +\d+  (done|skipped|failed) ", table, re.MULTILINE)


def digest(video: Path) -> str:
    return str(json.loads(video.with_name(f"{video.name}.json").read_text())["video_blake3"])


def process_of(crew: Any, worker: int) -> int:
    return int(crew.names[worker].rpartition(" ")[2])


def test_two_workers_make_the_videos_of_one_device_from_a_read_only_overlay(
    demo: Path, tmp_path: Path, mount: Mount, ray: Any
) -> None:
    """By the address of a cluster that runs already, from another folder than its actors are in."""
    overlay = Path(shutil.copytree(demo / "overlay", tmp_path / "overlay", symlinks=True))
    before = tree(overlay)
    for folder in (overlay, *filter(Path.is_dir, overlay.rglob("*"))):
        folder.chmod(0o555)
    with contextlib.suppress(pytest.skip.Exception):  # where it is allowed, root cannot write there either
        mount(overlay, "bind", source=overlay)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(overlay)], check=True)
    lines = [{"prompt": "a boat", "output": f"{seed}.mp4", "seed": seed} for seed in range(3)]
    folders = [tmp_path / name for name in ("shared", "alone")]
    for folder in folders:
        folder.mkdir()
    first, alone = (written(folder, *lines) for folder in folders)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ltxpack", "run", "overlay", "--prompts", "shared/prompts.jsonl", *FLAGS, *TWO]
    running = WarmProcess([*command, address], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = running.communicate()
    done = Done(running.wait(), out, err)
    assert done.returncode == 0, done.stderr
    assert statuses(done.stdout) == ["done"] * 3 and "3 done, 0 skipped, 0 failed" in done.stdout
    assert f"connecting to Ray ({address})" in done.stderr and done.stderr.count("residency resident") == 1
    # One of them may have made all before the other had started; and may take its time to answer at the end.
    told = r"^actor [01] on 127\.0\.0\.1, process \d+: (peak memory: |did not answer at its end$)"
    assert len(re.findall(told, done.stdout, re.MULTILINE)) in (1, 2)
    assert run(overlay, alone, "--device", "cpu").returncode == 0
    for line in lines:
        assert digest(first.parent / line["output"]) == digest(alone.parent / line["output"])
    names = {path.name for path in first.parent.iterdir()}
    assert names == {"prompts.jsonl", *(f"{n}.mp4{end}" for n in range(3) for end in ("", ".json"))}
    assert tree(overlay) == before
    again = run(overlay, first, *TWO)
    assert statuses(again.stdout) == ["skipped"] * 3 and "Ray" not in again.stderr, "nothing starts for nothing"


def test_an_actor_that_is_killed_in_the_middle_of_a_video(demo: Path, tmp_path: Path, begun: list[Any]) -> None:
    killed: list[int] = []

    def kill(crew: Any, worker: int) -> None:
        killed.append(process_of(crew, worker))
        os.kill(killed[0], signal.SIGKILL)

    begun.append(kill)
    prompts = written(tmp_path, *({"prompt": "a boat", "output": f"{n}.mp4", "steps": 12} for n in range(2)))
    done = run(demo / "overlay", prompts, *TWO)
    assert done.returncode == 0, done.stderr
    assert killed and statuses(done.stdout) == ["done", "done"]
    (told,) = [line for line in done.stderr.splitlines() if " ended: " in line]
    assert re.match(rf"warning: actor [01] on 127\.0\.0\.1, process {killed[0]} ended: The actor .*", told)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.mp4", "0.mp4.json", "1.mp4", "1.mp4.json", "prompts.jsonl",
    ]  # fmt: skip


def test_an_interrupted_run_leaves_no_actor_and_nothing_half_written(
    demo: Path, tmp_path: Path, begun: list[Any]
) -> None:
    at_work: list[int] = []

    def interrupt(crew: Any, worker: int) -> None:
        at_work.append(process_of(crew, worker))
        raise KeyboardInterrupt

    begun.append(interrupt)
    prompts = written(tmp_path, {"prompt": "a boat", "output": "a.mp4", "steps": 6000})
    assert run(demo / "overlay", prompts, *TWO).returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]
    until(lambda: not alive(at_work[0]))


@pytest.mark.parametrize("module", [LINE_WORKER, "ltxpack.serve.worker"])
def test_an_actor_that_cannot_begin_says_why(module: str, demo: Path, ray: Any) -> None:
    """Whatever goes wrong, nobody waits for ever."""
    actor, root, settings = WorkerActor(), demo / "overlay", SessionSettings(device="cpu")
    right, opening = SharedDisk.of(root), Opening(0, "actor 0", root, settings)
    wrong: Any = replace(right, manifest=0)
    for disk, begins, told in (
        (replace(right, manifest="0" * 64), opening, "another overlay is at this path there"),
        (wrong, opening, "another overlay is at this path there"),
        (right, replace(opening, settings=replace(settings, dtype="none")), "unknown dtype"),
        (right, None, "AttributeError"),
    ):
        actor.run(module, disk, begins)  # type: ignore[arg-type]
        assert told in actor.next().why and actor.next() is None


def test_a_place_that_is_another_on_a_machine(demo: Path, tmp_path: Path) -> None:
    root = demo / "overlay"
    manifest, version = SharedDisk.of(root).manifest, package.__version__
    SharedDisk(root, manifest, (root,), version).check()
    for place, problem in (
        (SharedDisk(root, manifest, (root / "none",), version), "another folder is at this path"),
        (SharedDisk(root, manifest, (), "0.0.0"), "another ltxpack"),
        (SharedDisk(root, "0" * 64, (), version), "another overlay"),
        (SharedDisk(tmp_path, manifest, (), version), "ltxpack.json"),
    ):
        with pytest.raises(LtxpackError, match=problem):
            place.check()


@pytest.mark.parametrize(
    ("command", "flags", "problem", "status"),
    [
        ("run", "--ray", "the Ray cluster has no GPU", 1),
        ("run", "--device cpu --ray", "--device does not go with --ray", 2),
        ("run", "--devices cpu:2 --parallel sequence --ray", "--parallel sequence does not go with --ray", 2),
        ("run", "--devices 0,1 --ray", "counts workers on CPUs alone", 2),
        ("run", "--save-activations a.safetensors --devices cpu:2 --ray", "--save-activations", 2),
        ("serve", "--ray", "the Ray cluster has no GPU", 1),
        ("serve", "--device cpu --ray", "--device does not go with --ray", 2),
        ("serve", "--devices 0,1 --ray", "counts workers on CPUs alone", 2),
        ("serve", "--devices cpu:2 --workers 3 --ray", "two answers to one question", 2),
        ("serve", "--workers 3", "--workers goes with --ray", 2),
    ],
)
def test_what_does_not_go_with_a_cluster_is_refused(
    command: str, flags: str, problem: str, status: int, demo: Path, tmp_path: Path
) -> None:
    prompts = written(tmp_path, {"prompt": "a boat"})
    typed = {"run": ("--prompts", prompts), "serve": ("--port=0", "-o", tmp_path / "videos")}[command]
    assert problem in refused(ltxpack(command, demo / "overlay", *typed, *flags.split()), status)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_one_video_is_made_on_one_machine(demo: Path) -> None:
    assert "--ray goes with --prompts" in refused(ltxpack("run", demo / "overlay", "--prompt", "a", "--ray"), 2)


def test_without_ray_the_command_to_install_it_is_told(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    message = refused(run(demo / "overlay", written(tmp_path, {"prompt": "a boat"}), *TWO), 2)
    assert "next: pip install 'ltxpack[ray]'" in message


@pytest.mark.parametrize(
    ("address", "error", "problem"),
    [
        ("127.0.0.1:9", DeviceError, "cannot be reached: .*refused"),
        ("auto", DeviceError, "cannot be reached: nobody is there"),
        ("ray://somewhere:10001", UsageError, "no such address"),
        ("overlay", UsageError, "no such address"),
    ],
)
def test_a_cluster_that_is_not_there(
    address: str, error: type[LtxpackError], problem: str, ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("nobody is there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(error, match=problem), connected(address, 0):
        raise AssertionError("never connected")


# The videos of a server


def processes(heard: Notes) -> dict[str, int]:
    """The actors and their processes, as they became ready."""
    found = re.findall(r"^(actor \d): a worker is ready on .*, process (\d+)$", "\n".join(heard.notes), re.MULTILINE)
    return {device: int(pid) for device, pid in found}


class Ask(Asking):
    """Speaks to a server whose workers run."""

    def __init__(self, options: ServeOptions, place: Callable[[], Workplace], on_fault: OnFault = None) -> None:
        self.heard = Notes()
        service = service_of(options, self.heard, on_fault, place)
        super().__init__(service)
        self.workers, self.jobs = service.workers, service.jobs

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
        asked.close()


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
        before = until(lambda: found if len(found := processes(server.heard)) == 2 else None)
        slow = server.post("", json={**LONG, "prompt": "a dog"})
        _killed_at(server, slow, before)
        assert server.ask("DELETE", f"/v1/videos/{gone}").status_code == 200
        until(lambda: 'jobs_ended_total{status="cancelled"} 1' in server.ask("GET", "/metrics").text)
        assert not [*(output / "pictures").iterdir()]
        waiting = [server.post(prompt) for prompt in ("a dog", "a cow")]
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
    until(lambda: processes(server.heard)[device] != before[device])
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
    root, heard = demo / "overlay", Notes()
    right = cluster.SharedDisk.of(root)
    wrong = iter([replace(right, version="0.0.0"), replace(right, root=tmp_path)])
    opening = Opening(0, "actor 0", root, replace(SESSION, device="cpu"))
    place = Workplace([opening], lambda one: ActorLink(partial(ActorWorker, ray, next(wrong), True, WORKER), one))
    jobs = Jobs(tmp_path / "videos", 1)
    workers = Workers(place, jobs, Metrics(), heard, None)
    workers.start()
    until(lambda: any("ltxpack.json" in note for note in heard.notes))
    workers.stop()
    jobs.close()
    assert "another ltxpack is installed there" in heard.notes[0] and "another worker is started" in heard.notes[1]


def test_actors_wait_for_cards_that_join_later(demo: Path, ray: Any) -> None:
    place = ray_place(ray, demo / "overlay", SESSION, workers=3)
    assert [(one.name, one.settings.device, one.sharers) for one in place.openings] == [
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


# Ray Serve

# Each look takes the proxy, the server and its controller some 30 ms of a processor.
eventually = partial(until, every=0.25)


class Deployed:
    """The application of Ray Serve, with two workers on CPUs."""

    def __init__(self, ray: Any, client: httpx.Client) -> None:
        self._ray, self._client = ray, client

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        return eventually(
            lambda: found if (found := self._client.request(method, path, **more)).status_code < 500 else None
        )

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
        eventually(lambda: server.metric('jobs{status="queued"} 3'))
        _all_begun(server, pair)
        assert second in server.replicas("VideoWorker")
        (head,) = server.replicas("VideoServer")
        os.kill(head, signal.SIGKILL)
        eventually(lambda: head not in server.replicas("VideoServer"))
        _all_begun(server, pair)
        assert [server.job(path)["status"] for path in waiting] == ["queued"] * 2, "the others have their old places"
        assert second in server.replicas("VideoWorker")
        for path in pair:
            assert server.ask("DELETE", path).status_code == 200
        eventually(lambda: server.metric('jobs_ended_total{status="cancelled"} 2'))
        eventually(lambda: all(server.job(path)["status"] == "completed" for path in waiting))
        _answers_at_once(server, waiting)
    assert {f"/v1/videos/{video.stem}" for video in tmp_path.glob("*.mp4")} == {*waiting}


def _all_begun(server: Deployed, jobs: list[str]) -> None:
    """All of ``jobs`` are being made, at once."""
    eventually(
        lambda: all((job := server.job(path))["status"] == "in_progress" and job["progress"] > 0 for path in jobs)
    )


def _answers_at_once(server: Deployed, kept: list[str]) -> None:
    """Ranges, and videos as the answer of a request, which ends if its client leaves."""
    fetched = server.ask("GET", f"{kept[0]}/content", headers={"Range": "bytes=0-9"})
    assert fetched.status_code == 206 and len(fetched.content) == 10
    made = server.ask("POST", "/v1/videos/sync", json={**SMALL, "prompt": "a dog"})
    assert made.status_code == 200 and made.headers["content-type"] == "video/mp4"
    with pytest.raises(httpx.ReadTimeout):
        server.ask("POST", "/v1/videos/sync", json={**ENDLESS, "prompt": "a cat"}, timeout=1)
    eventually(lambda: server.metric('jobs_ended_total{status="cancelled"} 3'))
    assert len(server.ask("GET", "/v1/videos").json()["data"]) == len(kept)


def test_a_replica_that_cannot_work_says_why_and_ends(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no task then, nor can its server give it one."""
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    from ltxpack.serve import replicas

    ended: list[int] = []
    monkeypatch.setattr(replicas.os, "_exit", ended.append)
    monkeypatch.setattr(replicas, "UNFIT", 0.0)
    right = cluster.SharedDisk.of(demo / "overlay")
    opening = Opening(0, "worker 0", right.root, replace(SESSION, device="cpu"))

    async def alive() -> None:
        """The server is."""

    async def said() -> list[Any]:
        server = SimpleNamespace(__ray_ready__=SimpleNamespace(remote=alive))
        wrong = replace(right, version="0.0.0")
        return [message async for message in replicas.VideoWorker().work(server, wrong, opening, {"id": "a"})]

    answer = asyncio.run(said())
    assert ended == [1] and len(answer) == 1 and "another ltxpack is installed there" in answer[0].why
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
