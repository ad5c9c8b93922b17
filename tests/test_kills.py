"""Killed at random points, fifty times: the same command always ends in the overlay of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from materialize import tiny_source
from support import FORKS, ltxpack, tree

from ltxpack.cli import main
from ltxpack.manifest import MANIFEST_NAME

# Fifty in all.
MATERIALIZE_KILLS, BAKE_KILLS = 34, 16
# As often a command is killed before it may end: a machine that became slower since it was timed would kill for ever.
IN_A_ROW = 4


def run_quietly(arguments: list[str], errors: str) -> None:
    """The command line in a process of its own; what it says goes to the file ``errors``."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = Path(errors).open("w")  # noqa: SIM115 (until the process ends)
    sys.argv = ["ltxpack", *arguments]
    main()


def ended(arguments: Sequence[str | Path], errors: Path, seconds: float | None = None) -> int:
    """The exit status of the command, which is killed after ``seconds``; what ends by itself must end well."""
    process = FORKS.Process(target=run_quietly, args=([*map(str, arguments)], str(errors)))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), errors.read_text()
    return process.exitcode


def seconds_of(errors: Path, *arguments: str | Path) -> float:
    ended(["--version"], errors)  # the process to fork from is there, and its imports are not timed
    begin = time.perf_counter()
    assert ended(arguments, errors) == 0
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

    def __init__(self, seed: int, usual: float, errors: Path) -> None:
        self._draw, self._usual, self._errors = random.Random(seed), usual, errors

    def kills_until_it_ends(self, command: list[str | Path]) -> Iterator[None]:
        """Run the command until it ends by itself, and at last let it; one item for each time it was killed."""
        for _ in range(IN_A_ROW):
            begin = time.perf_counter()
            if ended(command, self._errors, self._usual * self._draw.uniform(0.05, 1.1)) == 0:
                self._usual = min(self._usual, time.perf_counter() - begin)
                return
            yield
        self._usual = min(self._usual, seconds_of(self._errors, *command))


def test_materialize(tmp_path: Path) -> None:
    """The miniature takes a tenth of the demo's time; its LoRA is written in two steps."""
    source, whole, errors = tiny_source.make_source(tmp_path / "source"), tmp_path / "whole", tmp_path / "errors"
    tiny_source.write_tensors(source / tiny_source.LORA, tiny_source.lora_shapes({}, rank=50_000), {})
    killer, kills = Killer(0, seconds_of(errors, *commands(source, whole, "20kB")[0]), errors), 0
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
    out, errors = tmp_path / "out", tmp_path / "errors"
    base, command = commands(demo / "source", out, "200kB")
    assert ltxpack(*base).returncode == 0
    manifest = (out / MANIFEST_NAME).read_bytes()
    killer, kills = Killer(1, seconds_of(errors, *command), errors), 0
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
