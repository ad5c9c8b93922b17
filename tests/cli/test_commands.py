"""The command line itself: help, wrong use, exit statuses; through the console script."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, ltxpack, refused

COMMANDS = ("materialize", "bake-lora", "plan", "run", "verify", "inspect", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_a_place_in_the_readme(command: str) -> None:
    done = ltxpack(command, "--help")
    assert done.returncode == 0
    assert f"ltxpack {command}" in done.stdout
    assert f"ltxpack {command}" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_version() -> None:
    assert ltxpack("--version").stdout.startswith("ltxpack, version ")


def test_python_m_ltxpack_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ltxpack", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ltxpack("verify", tmp_path).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["run"],
        ["bake-lora"],
        ["bake-lora", "--strength", "much"],
        ["materialize", "source"],
        ["run", "out", "--prompt", "x", "--no-such-flag"],
    ],
)
def test_wrong_use_exits_2(arguments: list[str], tmp_path: Path) -> None:
    refused(ltxpack(*arguments, cwd=tmp_path), 2)


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf"])
def test_a_strength_must_be_finite(strength: str, tmp_path: Path) -> None:
    message = refused(ltxpack("bake-lora", str(tmp_path), f"--strength={strength}"), 2)
    assert "finite" in message


RUN = ("run", "overlay", "--prompt", "x")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--height", "100"], ["height", "multiple of 64", "100", "choose --height 64 or 128"]),
        (["--width", "96"], ["width", "multiple of 64", "96"]),
        (["--num-frames", "24"], ["frames", "8", "24"]),
        (["--steps", "1"], ["steps", "2 or more", "1"]),
        (["--fps", "0"], ["frame rate", "0"]),
        (["--image", "nowhere.png"], ["image", "nowhere.png"]),
        (["--image", "here.png@121"], ["121", "frame from 0 to 120"]),
        (["--image", "here.png@0:1.5"], ["1.5", "0 to 1"]),
        (["--image", "here.png@-1"], ["-1", "frame from 0 to 120"]),
        (["--image-crf", "99"], ["99"]),
        (["--video-cfg", "nan"], ["cfg", "finite"]),
        (["--residency", "elsewhere"], ["elsewhere", "stream"]),
        (["--reads", "fast"], ["fast", "cached"]),
        (["--decode", "whole"], ["whole", "official", "fast"]),
        (["--output", "video.txt"], ["video.txt"]),
        (["--output", "my films/a.txt"], ["choose -o 'my films/a.mp4'"]),
        (["--output", "a.mp4", "--save-tensors", "./a.mp4"], ["--save-tensors and -o are one file"]),
        (["--save-tensors", "nowhere/t.safetensors"], ["nowhere/t.safetensors", "folder that exists"]),
    ],
)
def test_values_no_run_could_use_are_refused_before_loading(flags: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "here.png").write_bytes(b"")
    done = ltxpack(*RUN, *flags, cwd=tmp_path)
    message = refused(done, 2)
    assert all(word in message for word in words), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.png"]


def test_the_help_names_every_attention_kernel() -> None:
    from ltxpack.runtime.dit.kernels import AUTO, KERNELS

    told = " ".join(ltxpack("run", "--help").stdout.split())
    assert all(name in told.partition("--attention")[2].partition("--compile")[0] for name in (AUTO, *KERNELS))


@pytest.mark.parametrize("command", [["run", "nowhere", "--prompt", "x"], ["verify", "nowhere"]])
def test_a_folder_that_is_no_overlay(command: list[str], tmp_path: Path) -> None:
    message = refused(ltxpack(*command, cwd=tmp_path), 1)
    assert "nowhere" in message
    assert "ltxpack materialize" in message


def test_without_anywhere_to_tell_progress(demo: Path) -> None:
    """Standard error is closed: Python has None in its place then."""
    command = [sys.executable, "-m", "ltxpack", "verify", str(demo / "overlay")]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0 and "every file as written" in done.stdout


def test_the_next_command_can_be_typed_as_it_is(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "my overlay"
    done = ltxpack("materialize", demo / "source", out)
    assert done.returncode == 0
    told = next(line for line in done.stdout.splitlines() if line.startswith("next: "))
    assert shlex.split(told)[1:4] == ["ltxpack", "bake-lora", str(out)]
    message = refused(ltxpack("run", out, "--prompt", "x", "--device", "cpu"), 1)
    assert shlex.split(message.partition("next: ")[2])[:3] == ["ltxpack", "bake-lora", str(out)]
