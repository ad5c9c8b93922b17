"""Killed at random points, fifty times: the same command always ends in the overlay of an undisturbed run."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from materialize import tiny_source
from support import HANG, ltxpack, tree
from warm_processes import WarmProcess

from ltxpack.manifest import MANIFEST_NAME

# Fifty in all.
MATERIALIZE_KILLS, BAKE_KILLS = 34, 16
# As often a command is killed before it may end: a machine that became slower since it was timed would kill for ever.
IN_A_ROW = 4


def ended(arguments: Sequence[str | Path], seconds: float | None = None) -> int:
    """The exit status of the command, which is killed after ``seconds``; what ends by itself must end well."""
    process = WarmProcess([sys.executable, "-m", "ltxpack", *arguments], stderr=subprocess.PIPE)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    status = process.wait()
    assert process.stderr is not None
    with process.stderr:
        assert status in (0, -signal.SIGKILL), process.stderr.read().decode()
    return status


def seconds_of(*arguments: str | Path) -> float:
    ended(["--version"])  # the process to fork from is there, and its imports are not timed
    begin = time.perf_counter()
    assert ended(arguments) == 0
    return time.perf_counter() - begin


def commands(source: Path, out: Path, shards: str) -> list[list[str | Path]]:
    return [
        ["materialize", source, out, "--max-shard-size", shards, "--copy"],
        ["bake-lora", out, "--strength", "0.25", "--strength", "0.7"],
    ]


class Killer:
    """Kills a command at random moments of the time that it usually takes, which a busy machine makes longer at times:
    the shortest that was seen counts.
    """

    def __init__(self, seed: int, usual: float) -> None:
        self._draw, self._usual = random.Random(seed), usual

    def kills_until_it_ends(self, command: list[str | Path]) -> Iterator[None]:
        """Run the command until it ends by itself, and at last let it; one item for each time it was killed."""
        for _ in range(IN_A_ROW):
            begin = time.perf_counter()
            if ended(command, self._usual * self._draw.uniform(0.05, 1.1)) == 0:
                self._usual = min(self._usual, time.perf_counter() - begin)
                return
            yield
        self._usual = min(self._usual, seconds_of(*command))


def test_materialize(tmp_path: Path) -> None:
    """The miniature takes a tenth of the demo's time; its LoRA is written in two steps."""
    source, whole = tiny_source.make_source(tmp_path / "source"), tmp_path / "whole"
    tiny_source.write_tensors(source / tiny_source.LORA, tiny_source.lora_shapes({}, rank=50_000), {})
    killer, kills = Killer(0, seconds_of(*commands(source, whole, "20kB")[0])), 0
    expected = tree(whole)
    for trial in range(10 * MATERIALIZE_KILLS):
        if kills >= MATERIALIZE_KILLS:
            break
        out = tmp_path / f"{trial}" / "out"
        out.parent.mkdir()
        if trial % 2:  # then it is filled file by file, else it appears by one rename
            out.mkdir()
        for _ in killer.kills_until_it_ends(commands(source, out, "20kB")[0]):
            kills += 1
            assert not (out / MANIFEST_NAME).exists() or ltxpack("verify", out).returncode == 0
        assert tree(out) == expected
        assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing is left beside it"
    assert kills >= MATERIALIZE_KILLS


def test_bake_lora(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base, command = commands(demo / "source", out, "200kB")
    assert ltxpack(*base).returncode == 0
    manifest = (out / MANIFEST_NAME).read_bytes()
    killer, kills = Killer(1, seconds_of(*command)), 0
    expected = tree(out)
    for _ in range(10 * BAKE_KILLS):
        if kills >= BAKE_KILLS:
            break
        shutil.rmtree(out / "bakes")
        (out / MANIFEST_NAME).write_bytes(manifest)
        for _ in killer.kills_until_it_ends(command):
            kills += 1
            assert ltxpack("verify", out).returncode == 0, "a failed bake leaves the overlay valid"
        assert tree(out) == expected
        assert sorted(path.name for path in (out / "bakes").iterdir()) == ["distilled-0.25", "distilled-0.7"]
    assert kills >= BAKE_KILLS


def test_export(demo: Path, tmp_path: Path) -> None:
    """A file of that name is whole, and at the end there is nothing beside it."""
    output, expected = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    command = ["export", demo / "overlay", "-o"]
    unfinished = tmp_path / ".x.safetensors.ltxpack" / "unfinished.safetensors"
    assert ended([*command, expected]) == 0
    for size in (0, 1, 10_000_000):
        process = WarmProcess([sys.executable, "-m", "ltxpack", *command, output])
        while process.poll() is None and not written(unfinished, size):
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not output.exists() or output.read_bytes() == expected.read_bytes()
        output.unlink(missing_ok=True)
    assert ended([*command, output]) == 0
    assert output.read_bytes() == expected.read_bytes()
    assert sorted(tmp_path.iterdir()) == [output, expected]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_a_signal_ends_leaves_no_temporary_file(number: int, demo: Path, tmp_path: Path) -> None:
    """Those of timeout, a scheduler or a closed terminal."""
    command = ["run", demo / "overlay", "--prompt", "a boat", "--device=cpu", "--recipe=distilled", "--no-cache"]
    size = ["--dtype=float32", "--height=256", "--width=384", "--num-frames=49", "-o", tmp_path / "x.mp4"]
    pipe = subprocess.PIPE
    process = WarmProcess([sys.executable, "-m", "ltxpack", *command, *size], stdout=pipe, stderr=pipe)
    assert process.stderr is not None
    assert b"decode\n" in iter(process.stderr.readline, b"") and list(tmp_path.glob(".x.mp4.*.tmp"))
    process.send_signal(number)
    assert "error: interrupted" in process.communicate()[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ignored", "status"), [(False, -signal.SIGTERM), (True, 0)])
def test_a_command_ends_by_the_signal_that_came(ignored: bool, status: int) -> None:
    """Its parent looks for that. Under nohup it does not end."""
    code = (
        "import signal; from ltxpack import cli\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "cli.cli.main = lambda **_: signal.raise_signal(signal.SIGHUP)\n"
        "cli.main()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=HANG).returncode == status


def test_a_second_ctrl_c_ends_a_command_that_ends_already() -> None:
    """Python waits for threads and cleans up, for a second with torch: each Ctrl-C showed a traceback."""
    code = (
        "import atexit, signal; from ltxpack import cli\n"
        "atexit.register(signal.raise_signal, signal.SIGINT)\n"
        "cli.cli.main = lambda **_: signal.raise_signal(signal.SIGINT)\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.startswith("error: interrupted") and done.stderr.count("\n") == 1


def written(path: Path, size: int) -> bool:
    """Whether so many bytes of ``path`` are on the disk."""
    try:
        return path.stat().st_blocks * 512 >= size
    except OSError:  # not yet, or not any more
        return False
