"""The lines of a prompts file shared out over processes: the files of one device; what is left when one ends."""

from __future__ import annotations

import io
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from support import HANG, Done, Notes, alive, ltxpack, until
from warm_processes import WarmProcess

from ltxpack.runtime.lines import DONE, Encode, Make
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.overlay import Overlay
from ltxpack.runtime.parallel import crew as crews
from ltxpack.runtime.parallel.contract import Next
from ltxpack.runtime.parallel.crew import goes_by_stages, processes
from ltxpack.runtime.parallel.process import messages
from ltxpack.runtime.parallel.schemes import STAGES, counted
from ltxpack.runtime.parallel.share import Sharing
from ltxpack.runtime.prompts_file import read_lines
from ltxpack.runtime.request import Request
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings, SettingsGiven
from ltxpack.runtime.weights.machine import CONTEXT, Machine
from ltxpack.runtime.weights.sizes import model_sizes, read_configs

pytestmark = pytest.mark.usefixtures("warm_workers")
SMALL = ("--dtype", "float32", "--height", "64", "--width", "64", "--num-frames", "9")
LINES: list[dict[str, Any]] = [
    {"prompt": "a boat", "seed": 1, "steps": 2},
    {"prompt": "a vast boat", "num_frames": 8 * 10**8 + 1},
    {"prompt": "a dog", "recipe": "distilled"},
    {"prompt": "a boat", "seed": 2, "steps": 2, "images": [{"path": "a.png"}, {"path": "a.png", "frame": "last"}]},
]


def prompts(folder: Path, *lines: dict[str, Any]) -> Path:
    Image.linear_gradient("L").convert("RGB").save(folder / "a.png")
    path = folder / "boats.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def many(demo: Path, folder: Path, *flags: str) -> Done:
    return ltxpack("run", demo / "overlay", "--prompts", prompts(folder, *LINES), *SMALL, *flags)


def videos(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".mp4"}


def table(done: Done, folder: Path) -> list[list[str]]:
    """Number, status and file of each line, as the table has them."""
    rows = [row.split() for row in done.stdout.splitlines() if row.endswith(".mp4")]
    return [[*row[:2], str(Path(row[-1]).relative_to(folder))] for row in rows]


@pytest.fixture(scope="module")
def alone(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The videos of one device."""
    folder = tmp_path_factory.mktemp("alone")
    many(demo, folder, "--device", "cpu")
    return videos(folder)


@pytest.mark.parametrize("recipe", ["hq", "distilled"])
def test_what_goes_from_stage_to_stage_is_what_is_counted(recipe: str, demo: Path, tmp_path: Path) -> None:
    path = prompts(tmp_path, {"prompt": "a boat", "recipe": recipe, "num_frames": 17})
    [line] = read_lines(path, SettingsGiven(height=64, width=128), None)
    with Session(demo / "overlay", SessionSettings(device="cpu", dtype="float32", cache=False)) as session:
        [begin] = Encode((line,), by_stages=True).carry_out(session).tasks
        [task] = begin.carry_out(session).tasks
        work = line.request.work(session.transformers(line.request.recipe).stages)
        found = counted(STAGES, session.transformer_config, work, 2, itemsize=4)
    assert isinstance(task, Make) and task.halfway is not None and found is not None
    parts = [part for pair in (*task.contexts, *task.halfway.made) for part in (pair.video, pair.audio)]
    assert sum(part.nbytes for part in parts) == found.received


def test_two_processes_make_the_files_of_one_device(demo: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    done = many(demo, tmp_path, "--devices", "cpu:2")
    assert done.returncode == 1 and "1 of 4 videos were not made" in done.stderr
    statuses = ["done", "failed", "done", "done"]
    assert table(done, tmp_path) == [
        [str(number), status, f"boats-000{number}.mp4"] for number, status in enumerate(statuses, 1)
    ]
    # One of them may have made all before the other had started.
    assert "worker 0 on cpu: peak memory: " in done.stdout or "worker 1 on cpu: peak memory: " in done.stdout
    assert len(alone) == 3 and videos(tmp_path) == alone
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a.png", "boats.jsonl", *alone, *(f"{name}.json" for name in alone)]
    )
    again = many(demo, tmp_path, "--device", "cpu")
    assert [row[1] for row in table(again, tmp_path)] == ["skipped", "failed", "skipped", "skipped"]


def test_who_is_told_to_end_in_order_does_so_however_soon_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before it asks for more; if the other end is gone without that word, it ends at once, also if idle."""
    abandoned: list[bool] = []

    def heard(*said: Any) -> Next:
        data = io.BytesIO(b"".join(map(pickle.dumps, said)))
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=data))
        following = messages(lambda: abandoned.append(True))
        until(lambda: data.tell() == len(data.getvalue()))
        return following

    following = heard("a task", None)
    assert [following(), following()] == ["a task", None] and not abandoned
    heard("a task")
    assert until(lambda: abandoned) == [True]


def test_the_line_of_a_killed_process_is_made_by_another(
    demo: Path, alone: dict[str, bytes], tmp_path: Path, begun: list[Any]
) -> None:
    given = SettingsGiven(height=64, width=64, num_frames=9)
    lines = read_lines(prompts(tmp_path, LINES[0], LINES[3]), given)
    killed: list[int] = []

    def kill(crew: Any, worker: int) -> None:
        killed.append(worker)
        crew._workers[worker].process.kill()

    begun.append(kill)
    crew, notes = processes(demo / "overlay", SessionSettings(dtype="float32"), ("cpu", "cpu")), Notes()
    sharing = Sharing(crew, lines, notes)
    sharing.run()
    assert [outcome.status for outcome in sharing.outcomes.values()] == [DONE, DONE]
    assert f"worker {killed[0]} on cpu ended: its process was ended by signal 9" in notes.warnings
    made = videos(tmp_path)
    assert [made["boats-0001.mp4"], made["boats-0002.mp4"]] == [alone["boats-0001.mp4"], alone["boats-0004.mp4"]]
    assert len([*tmp_path.iterdir()]) == 6, "nothing half written"
    assert all(worker.has_ended for worker in crew._workers.values())


# A shell that starts the tests in the background has them, and all they start, ignore Ctrl-C.
HEARING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from ltxpack.cli import main
main()
"""


def test_an_interrupt_ends_all_processes_and_leaves_nothing_half_written(demo: Path, tmp_path: Path) -> None:
    path = prompts(tmp_path, *({**LINES[0], "seed": seed, "steps": 900} for seed in (1, 2)))
    command = [sys.executable, "-c", HEARING, "run", demo / "overlay", "--prompts", path, *SMALL, "--devices", "cpu:2"]
    process = WarmProcess(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    with io.TextIOWrapper(process.stderr) as errors:
        begun = next(line for line in errors if line.startswith("line "))
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        told = errors.read()
    process.wait(timeout=HANG)
    assert begun and len(workers) == 2
    assert process.returncode == 130
    assert "goes on from where it stopped" in told and "Traceback" not in told
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "boats.jsonl"]
    assert not any(alive(int(worker)) for worker in workers)


def test_two_processes_of_a_stage_each_make_the_files_of_one_device(
    demo: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    done = many(demo, tmp_path, "--devices", "cpu:2", "--parallel", "stages")
    assert done.returncode == 1 and "1 of 4 videos were not made" in done.stderr
    assert [row[1] for row in table(done, tmp_path)] == ["done", "failed", "done", "done"]
    assert videos(tmp_path) == alone
    phases = ["text", "images", "stage 1", "upsample", "stage 2", "audio", "video"]
    assert [*json.loads((tmp_path / "boats-0001.mp4.json").read_text())["seconds"]] == phases
    assert "parallel stages: each device makes a stage" in done.stderr and done.stderr.count("\nline ") == 3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--prompts", "--devices", "cpu:3", "--parallel", "stages"), "goes with two devices"),
        (("--prompts", "--devices", "cpu:2", "--parallel", "stages", "--recipe", "one-stage"), "a recipe of one stage"),
        (("--prompts", "--parallel", "data"), "goes with several devices"),
        (("--prompt", "--devices", "cpu:2", "--parallel", "data"), "for the many videos of a prompts file"),
    ],
)
def test_what_does_not_go_together_is_refused(flags: tuple[str, ...], told: str, demo: Path, tmp_path: Path) -> None:
    done = ltxpack("run", demo / "overlay", flags[0], prompts(tmp_path, *LINES[:1]), *flags[1:], *SMALL)
    assert done.returncode == 2 and told in done.stderr


@pytest.mark.parametrize(
    ("card", "host", "count", "by_stages"),
    [
        (48, 64, 2, True),  # neither card nor host has room for both transformers
        (48, 512, 2, False),  # they wait in the memory of the host
        (141, 64, 2, False),  # each card holds both
        (24, 64, 2, False),  # no card holds one
        (48, 64, 3, False),
    ],
)
def test_a_stage_each_where_no_transformer_could_stay_otherwise(
    card: int, host: int, count: int, by_stages: bool, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "model_sizes", lambda _, *names: model_sizes(None, *names))
    config = DiTConfig.from_dict(read_configs(None)["transformer"])
    monkeypatch.setattr(crews, "read_dit_config", lambda *_: config)
    monkeypatch.setattr(crews, "this_machine", lambda *_, cards: Machine(host * 10**9, card * 10**9, CONTEXT))
    overlay, devices = Overlay.open(demo / "overlay"), [f"cuda:{number}" for number in range(count)]
    requests = [Request.of("a boat")] * 2
    assert goes_by_stages(overlay, SessionSettings(), requests, devices) == by_stages
    assert not goes_by_stages(overlay, SessionSettings(), [*requests, Request.of("", recipe="one-stage")], devices)
