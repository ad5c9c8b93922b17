"""``ltxpack run --prompts --ray``: actors on one machine make the videos of one device; what is left when one ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ray_support import local_ray
from support import Done, Mount, alive, ltxpack, refused, tree, until
from warm_processes import WarmProcess

import ltxpack as package
from ltxpack.errors import DeviceError, LtxpackError, UsageError
from ltxpack.files.reader import hash_file
from ltxpack.runtime.parallel.actors import Actors, LineActor
from ltxpack.runtime.parallel.cluster import SharedDisk, connected
from ltxpack.runtime.parallel.share import Carried, Event, Gone, Told
from ltxpack.runtime.settings import SessionSettings

# Not imported here: Ray reads its variables when it is, see the fixture.
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
FLAGS = ("--dtype", "float32", "--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2")
TWO = ("--devices", "cpu:2", "--ray")


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    with local_ray(2) as found:
        yield found


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


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is in it is called, once, with the process of the actor that begins a video, and says no more of it."""
    waiting: list[Any] = []
    following, ended = Actors.next, set[int]()

    def watched(crew: Actors) -> Event:
        event = following(crew)
        if event.worker in ended and isinstance(event, Carried):
            return watched(crew)
        if isinstance(event, Gone):
            ended.discard(event.worker)
        elif waiting and isinstance(event, Told) and event.message.startswith("line "):
            ended.add(event.worker)
            waiting.pop()(int(crew.names[event.worker].rpartition(" ")[2]))
        return event

    monkeypatch.setattr(Actors, "next", watched)
    return waiting


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

    def kill(pid: int) -> None:
        killed.append(pid)
        os.kill(pid, signal.SIGKILL)

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

    def interrupt(pid: int) -> None:
        at_work.append(pid)
        raise KeyboardInterrupt

    begun.append(interrupt)
    prompts = written(tmp_path, {"prompt": "a boat", "output": "a.mp4", "steps": 6000})
    assert run(demo / "overlay", prompts, *TWO).returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]
    until(lambda: not alive(at_work[0]))


def test_an_actor_that_cannot_begin_says_why(demo: Path, ray: Any) -> None:
    root = demo / "overlay"
    actor = LineActor(3)
    actor.open(SharedDisk(root, "0" * 64, (), package.__version__), SessionSettings(device="cpu"), 1)
    said = actor.next()
    assert isinstance(said, Gone) and "another overlay is at this path there" in said.why
    actor.open(SharedDisk(root, 0, (), package.__version__), None, 1)  # type: ignore[arg-type]
    actor.carry_out(None, None)  # type: ignore[arg-type]
    assert all(isinstance(actor.next(), Gone) for _ in range(2)), "whatever goes wrong, nobody waits for ever"


def test_a_place_that_is_another_on_a_machine(demo: Path, tmp_path: Path) -> None:
    root = demo / "overlay"
    manifest, version = hash_file(root / "ltxpack.json"), package.__version__
    SharedDisk(root, manifest, (root,), version).check()
    for place, problem in (
        (SharedDisk(root, manifest, (root / "none",), version), "another folder is at this path"),
        (SharedDisk(root, manifest, (), "0.0.0"), "another ltxpack"),
        (SharedDisk(root, "0" * 64, (), version), "another overlay"),
        (SharedDisk(tmp_path, manifest, (), version), "ltxpack.json"),
    ):
        with pytest.raises(LtxpackError, match=problem):
            place.check()


def test_a_cluster_without_cards_is_refused(demo: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path, {"prompt": "a boat"})
    assert "the Ray cluster has no GPU" in refused(run(demo / "overlay", prompts, "--ray"), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--device", "cpu", "--ray"), "--device does not go with --ray"),
        (("--devices", "cpu:2", "--parallel", "sequence", "--ray"), "--parallel sequence does not go with --ray"),
        (("--devices", "0,1", "--ray"), "counts workers on CPUs alone"),
        (("--save-activations", "a.safetensors", "--devices", "cpu:2", "--ray"), "--save-activations"),
    ],
)
def test_what_does_not_go_with_a_cluster_is_refused(
    flags: tuple[str, ...], problem: str, demo: Path, tmp_path: Path
) -> None:
    assert problem in refused(run(demo / "overlay", written(tmp_path, {"prompt": "a boat"}), *flags), 2)


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
