"""Ranks that torchrun started, for real and as it starts them: the files of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
from support import HANG, Done, load, ltxpack, refused
from warm_processes import WarmProcess

from ltxpack.runtime.parallel.devices import Launched, launched

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TINY = ("--height", "64", "--width", "64", "--num-frames", "9", "--dtype", "float32", "--device", "cpu", "--no-cache")
STARTED = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def torchrun(*arguments: str | Path) -> Done:
    """Two ranks as torchrun starts them: forks that meet at a store of this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command, pipes = [sys.executable, "-m", "ltxpack", *arguments], dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    ranks = [
        WarmProcess(command, env={**os.environ, **STARTED, **at, "RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in ("0", "1")
    ]
    with ThreadPoolExecutor(2) as pool:
        told = [*pool.map(lambda rank: rank.communicate(), ranks)]
    out, err = ("".join(texts) for texts in zip(*told, strict=True))
    return Done(max(abs(rank.wait()) for rank in ranks), out, err)


def test_two_ranks_make_the_tensors_of_one_device(demo: Path, tmp_path: Path) -> None:
    overlay, prompt = demo / "overlay", ("--prompt", "A paper boat", "--steps", "2", *TINY)
    tensors = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two")}
    alone = ltxpack("run", overlay, *prompt, "-o", tmp_path / "one.mp4", "--save-tensors", tensors["one"])
    assert alone.returncode == 0, alone.stderr
    way = ("--parallel", "guidance")
    done = torchrun("run", overlay, *prompt, *way, "-o", tmp_path / "two.mp4", "--save-tensors", tensors["two"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("parallel guidance: stage 1") == 1
    assert done.stdout.splitlines()[-1:] == [str(tmp_path / "two.mp4")] and done.stdout.count("two.mp4") == 1
    found, expected = load(tensors["two"]), load(tensors["one"])
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
    assert (tmp_path / "two.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()


# Rank 1 is killed when it begins its share of the second video.
KILLED = """
import os, signal, sys
from pathlib import Path
from ltxpack.cli import main
from ltxpack.runtime.parallel import worker
made = worker.latents_of
def killed(*work):
    if Path(sys.argv[sys.argv.index("--prompts") + 1]).with_name("many-0001.mp4").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return made(*work)
worker.latents_of = killed
main()
"""


def test_many_videos_and_a_rank_that_dies(demo: Path, tmp_path: Path) -> None:
    """By torchrun itself, which ends the other rank; the next run goes on."""
    prompts, program = tmp_path / "many.jsonl", tmp_path / "killed.py"
    prompts.write_text("".join(json.dumps({"prompt": text, "steps": 2}) + "\n" for text in ("a boat", "a dog")))
    program.write_text(KILLED)
    command = [*TORCHRUN, program, "run", demo / "overlay", "--prompts", prompts, *TINY]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=HANG, check=False)
    assert ended.returncode != 0 and "Signal 9 (SIGKILL)" in ended.stderr
    assert (tmp_path / "many-0001.mp4").exists() and not (tmp_path / "many-0002.mp4").exists()
    done = torchrun("run", demo / "overlay", "--prompts", prompts, *TINY)
    assert done.returncode == 0, done.stderr
    assert "1 done, 1 skipped, 0 failed" in done.stdout and (tmp_path / "many-0002.mp4").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--prompt", "x", "--devices", "0,1"), "leave --devices out"),
        (("--prompt", "x", "--parallel", "none"), "--parallel none does not go with torchrun"),
        (("--prompts", "many.txt", "--parallel", "data"), "--parallel data does not go with torchrun"),
        (("--prompts", "many.txt", "--ray"), "leave --ray out"),
        (("--prompt", "x", "--device", "cuda:1"), "--device names one card for all ranks"),
        (("--prompt", "x", "--save-activations", "x"), "--save-activations goes with one device"),
    ],
)
def test_what_does_not_go_with_torchrun_is_refused(
    typed: tuple[str, ...], said: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "many.txt").write_text("a boat\na dog\n")
    for name, value in (STARTED | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert said in refused(ltxpack("run", demo / "overlay", *typed, cwd=tmp_path), 2)


def test_who_was_started_by_torchrun() -> None:
    assert launched(STARTED) == Launched(rank=1, size=2, local=1, here=2)
    assert launched({"RANK": "1", "WORLD_SIZE": "2"}) is None, "of another launcher, and of another program's"
