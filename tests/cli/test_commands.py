"""The command line itself: help, wrong use, exit statuses; through the console script."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from support import REPOSITORY, in_fresh_process, ltxpack, refused

from ltxpack.cli import COMMANDS, _what_again, cli
from ltxpack.runtime.model.kernels import AUTO, KERNELS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_a_place_in_the_readme(command: str) -> None:
    done = ltxpack(command, "--help")
    assert done.returncode == 0
    assert f"ltxpack {command}" in done.stdout
    assert f"ltxpack {command}" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    told = " ".join(done.stdout.split()).partition("--attention")[2].partition("--compile")[0]
    assert command != "run" or all(name in told for name in (AUTO, *KERNELS))


def test_python_m_ltxpack_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ltxpack", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ltxpack("verify", tmp_path).stderr
    assert ltxpack("--version").stdout.startswith("ltxpack, version ")


@pytest.mark.parametrize(
    "arguments",
    ["no-such-command", "run", "bake-lora", "bake-lora --strength much", "materialize source",
     "run out --prompt x --no-such-flag"],
)  # fmt: skip
def test_wrong_use_exits_2(arguments: str, tmp_path: Path) -> None:
    refused(ltxpack(*arguments.split(), cwd=tmp_path), 2)


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "1e19", "-1e39", "1e300"])
def test_a_strength_must_be_finite(strength: str, tmp_path: Path) -> None:
    message = refused(ltxpack("bake-lora", str(tmp_path), f"--strength={strength}"), 2)
    assert "finite" in message and "at most 1e+18" in message
    assert not any(tmp_path.iterdir())


def test_every_path_may_begin_with_a_tilde_that_no_shell_expands(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    planned = ltxpack("export", demo / "overlay", "--output=~/x.safetensors", "--plan", "--json").stdout
    assert json.loads(planned)["files"][0]["path"] == str(tmp_path / "x.safetensors")
    assert f"{tmp_path}/none.jsonl" in refused(ltxpack("run", "~/out", "--prompts=~/none.jsonl"), 2)


def test_what_is_there_already_is_told_once_and_planned(demo: Path) -> None:
    done, planned = (ltxpack("materialize", demo / "source", demo / "overlay", *f) for f in ([], ["--plan", "--json"]))
    assert done.returncode == planned.returncode == 0
    assert (done.stdout + done.stderr).count("nothing to do") == 1
    assert json.loads(planned.stdout)["files"] and "is there already" in planned.stderr


def test_inspect_shows_what_is_unknown_as_a_dash(demo: Path) -> None:
    done = ltxpack("inspect", demo / "overlay")
    assert done.returncode == 0
    assert "None" not in done.stdout and ": -" in done.stdout


def test_a_file_of_somebody_else_is_no_work_for_a_repair(overlay: Path) -> None:
    (overlay / "mine.txt").write_text("mine")
    for flags in ([], ["--repair"]):
        done = ltxpack("verify", overlay, *flags)
        assert done.returncode == 1
        assert "mine.txt: is not in the manifest" in done.stdout
        assert "move files that are not in the manifest out of the overlay" in done.stdout
        assert "next: ltxpack verify" not in done.stdout
    (overlay / "scheduler" / "scheduler_config.json").unlink()
    assert f"next: ltxpack verify {overlay} --repair" in ltxpack("verify", overlay).stdout


def test_without_a_folder_for_temporary_files_the_way_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the import of torch's compiler, or what starts other processes, looks for one."""
    lost = FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
    monkeypatch.setattr(cli, "main", mock.Mock(side_effect=lost))
    told = refused(ltxpack("run", "out"), 1)
    assert told.startswith(f"error: temporary files: {lost.strerror}\n") and "set TMPDIR" in told


def test_what_becomes_of_an_interrupted_command() -> None:
    many = ("run out --prompts p", "run out --prompts=p")
    for arguments in (*many, "materialize a b", "export out -o x", "demo", "verify out --repair"):
        assert _what_again(arguments.split()) == "goes on from where it stopped"
    assert _what_again(["run", "out", "--prompt", "x"]) == "starts again from the beginning"


RUN = ("run", "overlay", "--prompt", "x")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--height", "100"], ["height", "multiple of 64", "100", "choose --height 64 or 128"]),
        (["--width", "96"], ["width", "multiple of 64", "96"]),
        (["--num-frames", "24"], ["frames", "8", "24"]),
        (["--num-frames", "9999999999993"], ["too many frames", "at most"]),
        (["--steps", "1"], ["steps", "2 or more", "1"]),
        (["--keep-steps", "9" * 5000], ["--keep-steps", "numbers from 1"]),
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
        (["--save-tensors", "no where/t.safetensors"], ["folder that exists", "mkdir -p 'no where'"]),
        (["--save-tensors", "."], ["is a folder", "choose --save-tensors video.safetensors"]),
        (["--output", "no where/a.mp4"], ["no such folder", "mkdir -p 'no where'"]),
    ],
)
def test_values_no_run_could_use_are_refused_before_loading(flags: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "here.png").write_bytes(b"")
    done = ltxpack(*RUN, *flags, cwd=tmp_path)
    message = refused(done, 2)
    assert all(word in message for word in words), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.png"]


def test_wrong_settings_of_a_video_are_told_before_torch_is_imported() -> None:
    code = """
    import sys
    from ltxpack.cli import cli
    try:
        cli.main(["run", "overlay", "--prompt", "x", "--num-frames", "24"], standalone_mode=False)
    except Exception as error:
        answer = [type(error).__name__, *sorted({"torch", "diffusers", "transformers"} & set(sys.modules))]
    """
    assert in_fresh_process(code)[0] == ["UsageError"]


@pytest.mark.parametrize("command", [["run", "nowhere", "--prompt", "x"], ["verify", "nowhere"]])
def test_a_folder_that_is_no_overlay(command: list[str], tmp_path: Path) -> None:
    message = refused(ltxpack(*command, cwd=tmp_path), 1)
    assert "nowhere" in message
    assert "ltxpack materialize" in message


def test_without_anywhere_to_tell_progress(demo: Path) -> None:
    """Standard error is closed: Python has None in its place then."""
    command = [sys.executable, "-m", "ltxpack", "verify", str(demo / "overlay")]
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    done = subprocess.run(closed, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0 and "every file as written" in done.stdout


def test_the_next_command_can_be_typed_as_it_is(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "my overlay"
    done = ltxpack("materialize", demo / "source", out)
    assert done.returncode == 0
    told = next(line for line in done.stdout.splitlines() if line.startswith("next: "))
    assert shlex.split(told)[1:4] == ["ltxpack", "bake-lora", str(out)]
    message = refused(ltxpack("run", out, "--prompt", "x", "--device", "cpu"), 1)
    assert shlex.split(message.partition("next: ")[2])[:3] == ["ltxpack", "bake-lora", str(out)]
