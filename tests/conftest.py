"""Fixtures shared by all rooms."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import parity
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from next_commands import Recorder
from support import DATA, Mount, golden_folders, ltxpack, waited_fsync
from warm_processes import WARM

from ltxpack.runtime.parallel import process
from ltxpack.runtime.parallel.crew import Elsewhere
from ltxpack.runtime.parallel.share import Carried, Event, Gone, Told
from ltxpack.runtime.text import gemma, prompt_cache
from ltxpack.runtime.weights import machine

# Nothing that is imported or collected is garbage; looking for it takes a fifth of the start.
gc.disable()
# A worker a core: more threads, here or in a process of a test, would wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Timings of a shared machine are not what these tests are about; CI draws the same examples every time.
settings.register_profile("suite", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("suite")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``golden``: a full fixture each; only where there is none is the test skipped.

    ``latents_golden``: the fixture that travels with the repository (no codecs), and every full one.
    """
    folders = golden_folders()
    if "golden" in metafunc.fixturenames:
        absent = pytest.param(None, marks=pytest.mark.skipif(True, reason="no golden folder on this machine"))
        names = [folder.name for folder in folders] or ["absent"]
        metafunc.parametrize("golden", folders or [absent], ids=names, scope="session")
    if "latents_golden" in metafunc.fixturenames:
        found = [DATA / "tiny", *folders]
        names = ["data", *(folder.name for folder in folders)]
        metafunc.parametrize("latents_golden", found, ids=names, scope="session")


# Whole files go to the workers: a long one begun last would keep one of them waiting.
LONG = (
    "test_ray.py",
    "test_dit_compile.py",
    "test_end_to_end.py",
    "test_pretend_card.py",
    "test_guard.py",
    "test_lora_resume.py",
    "test_plan_page_browser.py",
    "test_gpu_bench.py",
    "test_many_videos.py",
    "test_staging_resume.py",
    "test_sequence.py",
    "test_api.py",
    "test_residency.py",
    "test_kills.py",
    "test_parallel.py",
    "test_residency_slots.py",
    "test_crew.py",
    "test_lora_bake.py",
    "test_quantised_runs.py",
    "test_plan_page.py",
    "test_torchrun.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the Makefile tells xdist to keep this order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """What was imported stays and is not looked through again; what tests leave is looked through a tenth as often."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(7_000)


def pytest_sessionfinish() -> None:
    """``LTXPACK_PARITY=FILE`` writes the errors met into FILE."""
    parity.write()


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for caches, so that nothing is written to the user's own."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LTXPACK_CACHE", str(folder / "session"))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def same_memory() -> Iterator[None]:
    """Plans of this process find the same free memory on every machine, however much others use of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "free_host", lambda: 20_000_000_000)
        patch.setattr(machine, "free_in_container", lambda: None)
        yield


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is such a thing, for tests that would wait for the disk thousands of times."""
    place = Path("/dev/shm")
    usual = tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else usual) as folder:
        yield Path(folder)


_numbers = itertools.count()


@pytest.fixture(autouse=True)
def cache(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ltxpack keeps between runs, empty at the start of every test."""
    folder = caches / str(next(_numbers))
    monkeypatch.setenv("LTXPACK_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def fsync_waits() -> Iterator[None]:
    """For tests of what is on the disk itself, or no longer in the page cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", waited_fsync)
        yield


_nexts = Recorder()


@pytest.fixture(autouse=True)
def every_next_can_be_typed() -> Iterator[None]:
    """Fails the test that made an error whose ``next`` is a command that does not parse."""
    _nexts.taken()
    yield
    faults = _nexts.taken()
    assert not faults, "\n".join(faults)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``ltxpack demo`` leaves: source/, overlay/ with two bakes, the video, its tensors. Not to be changed.

    The workers of one run share it: whoever needs it first makes it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "video.mp4").exists():
            done = ltxpack("demo", folder)
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines()[-1] == str(folder / "video.mp4")
    return folder


@pytest.fixture
def overlay(demo: Path, tmp_path: Path) -> Path:
    """The demo's overlay by hard links: its files may be replaced or removed, never written in place."""
    return Path(shutil.copytree(demo / "overlay", tmp_path / "overlay", symlinks=True, copy_function=os.link))


@pytest.fixture(scope="module")
def warm_workers() -> Iterator[None]:
    """The other processes of a video, or of many, are forks: that they start for real is shown by whole commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "subprocess", WARM)
        yield


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Elsewhere, int], object]]:
    """What is in it is called, once, with the crew and the number of a worker that begins a video.

    The worker says no more of that video.
    """
    waiting: list[Callable[[Elsewhere, int], object]] = []
    following, ended = Elsewhere.next, set[int]()

    def watched(crew: Elsewhere) -> Event:
        event = following(crew)
        if event.worker in ended and isinstance(event, Carried):
            return watched(crew)
        if isinstance(event, Gone):
            ended.discard(event.worker)
        elif waiting and isinstance(event, Told) and event.message.startswith("line "):
            ended.add(event.worker)
            waiting.pop()(crew, event.worker)
        return event

    monkeypatch.setattr(Elsewhere, "next", watched)
    return waiting


@pytest.fixture(scope="module")
def short_prompts(caches: Path) -> Iterator[None]:
    """The model reads 128 tokens of a prompt: 1024 take most of the time of a small video.

    For tests about other things than text; those against the recorded official runs read all.
    """
    with pytest.MonkeyPatch.context() as patch:
        for reads in (gemma, prompt_cache):
            patch.setattr(reads, "TEXT_TOKENS", 128)
        patch.setenv("LTXPACK_CACHE", str(caches / "short"))
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that remembers nothing of other tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def mount() -> Iterator[Mount]:
    """``mount(folder, kind, options)``; the test is skipped where mounting is not allowed."""
    mounted: list[Path] = []

    def made(folder: Path, kind: str = "tmpfs", options: str = "size=64m", source: str | Path = "none") -> None:
        if not folder.exists():
            folder.mkdir(parents=True)
        flags = ["--bind"] if kind == "bind" else ["-t", kind, "-o", options]
        done = subprocess.run(["mount", *flags, str(source), str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no {kind} can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    yield made
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)
