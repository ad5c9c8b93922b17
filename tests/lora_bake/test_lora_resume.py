"""Killed anywhere, the same command ends in the bytes of an undisturbed run; memory is bounded."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_support import change_byte, linears, low_rank, make_overlay, official_keys, random_weights, save
from support import FORKS, HANG, dying_at, in_fresh_process, tree

from ltxpack.errors import OverlayError
from ltxpack.lora_bake import BakeOptions, bake
from ltxpack.lora_bake.fuse import cpu_has_bf16_unit
from ltxpack.manifest import read_manifest
from ltxpack.repack.verify import verify
from ltxpack.reporter import SilentReporter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a server and sends signals")
BASE = random_weights()
# Of a fifth of the linears, so that each shard has weights to copy too.
FACTORS = low_rank(linears()[::5])


def bake_until_killed(overlay: Path, options: dict[str, Any], kill_at: int, answer: Connection) -> None:
    """Bake; before the ``kill_at``-th change of the disk the process ends. Sends the changes if it gets through."""
    calls = dying_at(kill_at, "fsync", "rename", "replace", "unlink", "symlink")
    bake(BakeOptions(overlay, **options), SilentReporter())
    answer.send(next(calls) - 1)


def spawn(*arguments: Any) -> int | None:
    """Runs ``bake_until_killed`` in a fresh process: the number of changes, or None if it was killed."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=bake_until_killed, args=(*arguments, theirs))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = None
    process.join(HANG)
    assert process.exitcode == (0 if answer is not None else -signal.SIGKILL)
    return answer


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay with one bake to be kept and one to be replaced."""
    overlay = make_overlay(
        tmp_path_factory.mktemp("pristine") / "out", BASE, shards=4, distilled=official_keys(FACTORS)
    )
    bake(BakeOptions(overlay, (0.25,)), SilentReporter())
    bake(BakeOptions(overlay, (0.9,), name="mine"), SilentReporter())
    return overlay


@pytest.fixture
def overlay(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out", symlinks=True))


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """From now on no bake fuses more than so many shards: then it raises. None: no limit. Returns the shards' names."""
    engine = importlib.import_module("ltxpack.lora_bake.stream").Engine
    real = engine.fuse_shard

    def limit(count: int | None, error: BaseException | None = None) -> list[str]:
        fused: list[str] = []

        def counted(self: Any, shard: Any, outputs: Any) -> Any:
            if len(fused) == count:
                raise error or OverlayError("stopped")
            fused.append(shard.name)
            return real(self, shard, outputs)

        monkeypatch.setattr(engine, "fuse_shard", counted)
        return fused

    return limit


def faults_but_strays(overlay: Path) -> list[str]:
    return [fault.path for fault in verify(overlay, SilentReporter()) if fault.problem != "is not in the manifest"]


JOBS = {
    "two strengths in two forms": {"strengths": (0.5, 1.0), "formats": ("bf16", "fp8")},
    "official": {"strengths": (0.7,), "rule": "official"},
    "replacing": {"strengths": (0.6,), "name": "mine", "force": True},
}


@pytest.mark.parametrize("job", JOBS)
def test_killed_anywhere_the_same_command_finishes(job: str, overlay: Path, pristine: Path, tmp_path: Path) -> None:
    options = JOBS[job]
    total = spawn(overlay, options, 0)
    expected = tree(overlay)
    order = random.Random(job)
    # The last calls move everything into its place: a third of the kills fall there.
    points = sorted(order.sample(range(1, total - 30), 4) + order.sample(range(total - 30, total + 1), 3))
    for point in points:
        overlay = tmp_path / f"killed-{point}"
        shutil.copytree(pristine, overlay, symlinks=True)
        assert spawn(overlay, options, point) is None
        manifest = read_manifest(overlay)
        assert "distilled-0.25" in manifest.bakes and faults_but_strays(overlay) == []
        assert spawn(overlay, options, order.randrange(1, total)) in (None, *range(total + 30))
        assert spawn(overlay, options, 0) is not None
        assert tree(overlay) == expected
        shutil.rmtree(overlay)


def test_a_stopped_bake_goes_on_with_its_kernel(
    overlay: Path, stopped_after: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltxpack.lora_bake.fuse.cpu_has_bf16_unit", lambda: False)
    stopped_after(1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bake(BakeOptions(overlay, (0.5,), device="cpu"), SilentReporter())
    stopped_after(None)
    monkeypatch.setattr("ltxpack.lora_bake.fuse.cpu_has_bf16_unit", lambda: True)
    [report] = bake(BakeOptions(overlay, (0.5, 0.75), device="cpu"), SilentReporter())[:1]
    assert report.document["kernel"] == "fp32"
    bakes = read_manifest(overlay).bakes
    assert (bakes["distilled-0.5"].kernel, bakes["distilled-0.75"].kernel) == ("fp32", "addmm")


def spoil_notes(work: Path) -> None:
    """Of what the journal noted of two shards, one lacks a figure and one is of another."""
    lines = [json.loads(line) for line in (work / "journal.jsonl").read_text().splitlines()]
    first, *_, second = (line["note"] for line in lines if "note" in line)
    first[1].pop()
    second[0][1] = "another"
    (work / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "none": lambda work: None,
    "notes": spoil_notes,
    "journal": lambda work: (work / "journal.jsonl").write_bytes(b"\0\1 nonsense"),
    "shard": lambda work: change_byte(next((work / "files/bakes/distilled-0.5").glob("*.safetensors"))),
}


@pytest.fixture(scope="module")
def whole(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the overlay holds after another bake, made in peace."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    bake(BakeOptions(Path(shutil.copytree(pristine, folder, symlinks=True)), (0.5,)), SilentReporter())
    return tree(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_stopped_bake_left_is_kept_once_it_is_checked(
    damage: str, overlay: Path, whole: dict[str, bytes], stopped_after: Callable[..., Any]
) -> None:
    """After a failure in the third shard the first two are not fused again, and their figures are in the report."""
    fused = []
    for count in (2, 1):
        names = stopped_after(count)
        with pytest.raises(OverlayError, match="stopped"):
            bake(BakeOptions(overlay, (0.5,)), SilentReporter())
        fused += names
    assert len(set(fused)) == 3
    stopped_after(None)
    DAMAGES[damage](overlay / ".ltxpack" / "distilled-0.5.partial")
    bake(BakeOptions(overlay, (0.5,)), SilentReporter())
    assert tree(overlay) == whole


ROWS, COLUMNS, RANK, COUNT = 4096, 4096, 8, 8


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay with 8 weights of real width, 270 MB."""
    weight = (torch.rand(ROWS, COLUMNS) - 0.5).bfloat16()
    down, up = (torch.rand(RANK, COLUMNS) * 0.01).bfloat16(), (torch.rand(ROWS, RANK) * 0.01).bfloat16()
    names = [f"transformer_blocks.{i}.attn1.to_q" for i in range(COUNT)]
    lora = official_keys(dict.fromkeys(names, (down, up)))
    folder = tmp_path_factory.mktemp("wide")
    yield make_overlay(folder / "out", {f"{name}.weight": weight for name in names}, shards=2, distilled=lora)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [("addmm", {"strengths": (0.7, 0.3)}), ("fp32-bf16", {"strengths": (0.7, 0.3)}),
     ("official", {"strengths": (0.7,), "rule": "official"})],
)  # fmt: skip
def test_memory_stays_bounded(kernel: str, options: dict[str, Any], wide: Path, tmp_path: Path) -> None:
    largest, lora = ROWS * COLUMNS * 2, (ROWS + COLUMNS) * RANK * 2
    if kernel == "fp32-bf16":
        factors = {
            "transformer_blocks.0.attn1.to_q": (torch.zeros(1, COLUMNS).bfloat16(), torch.zeros(ROWS, 1).bfloat16())
        }
        style = save(tmp_path / "style.safetensors", official_keys(factors))
        options = {**options, "added": ((str(style), 1.0),)}
    overlay = tmp_path / "out"
    shutil.copytree(wide, overlay, copy_function=os.link)
    code = """
    import json, sys
    from pathlib import Path
    from ltxpack.lora_bake import BakeOptions, bake, stream
    from ltxpack.reporter import SilentReporter
    answer = 1024 * int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
    bake(BakeOptions(Path(sys.argv[1]), device="cpu", **json.loads(sys.argv[2])), SilentReporter())
    """
    before, peak = in_fresh_process(code, overlay, json.dumps(options))
    manifest = read_manifest(overlay)
    chosen = kernel if cpu_has_bf16_unit() or kernel == "official" else "fp32"
    assert {made.kernel for made in manifest.bakes.values()} == {chosen}
    # torch itself takes 240 MB, or 600 MB if it is for CUDA.
    assert peak - before < 110e6 + 3 * (largest + lora) < COUNT * largest
    shutil.rmtree(overlay)
