"""benchmarks/gpu.py: every section goes through on the CPU, time limits hold, and its counts are those of the spec."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _gpu_cards
import _gpu_checks
import _gpu_residency
import _loading
import gpu
import pytest
import torch
from _flops import run_flops, shared_flops
from _gpu_bench import Bench
from _gpu_clock import Clock, OutOfTime, at_most
from _gpu_models import forward_inputs, random_dit
from _gpu_sizes import REAL, TINY, TRANSFORMER
from dit_parts import LTX23
from support import HANG, REPOSITORY
from warm_processes import WARM

from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.parallel.schemes import Lengths, forward_flops, forward_parts
from ltxpack.runtime.sampling.recipes import HQ
from ltxpack.runtime.weights.placed import STRETCH

CPU = torch.device("cpu")
CONFIG = DiTConfig.from_dict(TRANSFORMER)
# Spec 07, section 5, in TFLOP: a part of ours -> stage 1, stage 2.
COUNTED = {
    "video self-attention linears": (52.7, 210.7),
    "video text linears": (29.7, 108.9),
    "video feed-forward": (105.1, 420.6),
    "a2v and v2a linears": (26.6, 105.8),
    "audio linears": (1.5, 1.5),
    "video self-attention": (52.4, 837.8),
    "text attention": (6.6, 26.3),
    "a2v and v2a attention": (0.8, 3.2),
    "audio attention": (0.06, 0.06),
}


@pytest.mark.parametrize(("stage", "whole", "isolated"), [(1, 275.4, 248.0), (2, 1714.8, 1605.8)])
def test_operations_are_those_of_the_spec(stage: int, whole: float, isolated: float) -> None:
    lengths = REAL.lengths(stage)
    assert lengths == Lengths({1: 8160, 2: 32640}[stage], 126, 1024)
    parts = forward_parts(CONFIG, lengths)
    assert parts.keys() == COUNTED.keys()
    for part, counted in COUNTED.items():
        digits = 2 if counted[0] < 0.1 else 1
        assert round(parts[part] / 1e12, digits) == counted[stage - 1], part
    assert round(forward_flops(CONFIG, lengths) / 1e12, 1) == whole
    assert round(forward_flops(CONFIG, lengths, isolated=True) / 1e12, 1) == isolated


def test_operations_of_the_recipe() -> None:
    """24,766 and 12,004 TFLOP by the spec; ours leave out what the passes of a step share."""
    assert DiTConfig.from_dict(LTX23) == CONFIG
    assert [stage.evaluations(REAL.steps) for stage in HQ.stages] == [31, 7]
    found = run_flops(CONFIG, {"stage 1": (REAL.lengths(1), 31, True), "stage 2": (REAL.lengths(2), 7, False)})
    shared = 31 * shared_flops(CONFIG, REAL.lengths(1))
    assert round((found["stage 1"] + shared) / 1e12) == 24766
    assert round(found["stage 2"] / 1e12) == 12004
    assert shared / 1e12 == pytest.approx(217, abs=0.5)


def arguments(results: Path, *more: str) -> list[str]:
    return ["--dry-run", "--results", str(results), *more]


def test_a_dry_run_goes_through_every_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_gpu_residency, _gpu_cards):
        monkeypatch.setattr(module, "subprocess", WARM)
    monkeypatch.setattr(_gpu_residency, "PINNED", 2 * STRETCH)
    assert gpu.main(arguments(tmp_path, "--compiler", "none")) == 0
    text, document = kept(tmp_path)
    assert capsys.readouterr().out == text + "\n", "the tables are printed last, and alone"
    assert [section["name"] for section in document["sections"]] == [section.name for section in gpu.SECTIONS]
    assert {section["outcome"] for section in document["sections"]} == {"done"}
    titles = [table["title"] for table in document["tables"]]
    assert all(table["rows"] for table in document["tables"]), "no section left an empty table"
    assert len(titles) == len(set(titles)) == 23
    found = document["found"]
    for stage in (1, 2):
        for key in ("ours.eager", "ours.compiled", "diffusers.eager", "diffusers.compiled"):
            assert found[f"{key}.stage {stage}"] > 0
        assert found[f"agreement.video.stage {stage}"] < 1e-4
    assert found["rates.matrix"] > 0 and found["rates.copy"] > 0
    assert found["run.total"] == pytest.approx(
        sum(found[f"run.{phase}"] for phase in ("stage 1", "upsample", "stage 2", "audio", "video"))
    )
    assert all(found[f"loading.{way}"] > 0 for way in (*_loading.OURS.values(), *_loading.FLOORS))
    assert found["residency.swap.stage 2"]["planned"] > 0 and found["residency.swap.wait.stage 2"] > 0
    for stage, way in ((1, "guidance over 2"), (1, "sequence over 2"), (2, "sequence over 2")):
        assert found[f"cards.stage {stage}.{way}"] > 0 and found[f"cards.apart.stage {stage}.{way}"] < 1e-5
    assert found["cards.wrong.broadcast"] == found["cards.wrong.all-to-all, sequence over 2"] == 0
    assert found["cards.death"] < 30
    for form in ("bf16", "fp8, token", "fp8, static", "int8, token"):
        assert all(found[f"codes.{what}.{form}.stage 2"] > 0 for what in ("block", "linear 32 x 128"))
    for recipe in ("distilled", "hq"):
        for what in ("video", "frames"):
            apart = [found[f"codes.{recipe}.{form}.{what}"] for form in ("bf16", "int8, token", "fp8, token")]
            assert apart[0] == 0 and 1e-5 < apart[1] < apart[2] < 0.6, (recipe, what, apart)
    assert document["failures"] == []
    assert "dry run: no measurement" in text
    assert str(tmp_path) not in text + json.dumps(document) and str(REPOSITORY) not in text


def test_a_dry_run_of_the_distilled_recipe(tmp_path: Path) -> None:
    assert gpu.main(arguments(tmp_path, "--compiler", "none", "--only", "video", "--recipe", "distilled")) == 0
    text, document = kept(tmp_path)
    assert "A whole video, distilled, warm" in text
    assert all(document["found"][f"run.{phase}"] > 0 for phase in ("stage 1", "upsample", "stage 2", "audio", "video"))


def test_compiled_sections_trace_in_whole_graphs(tmp_path: Path) -> None:
    assert gpu.main(arguments(tmp_path, "--only", "forward", "--compiler", "trace")) == 0
    assert kept(tmp_path)[1]["sections"][0]["outcome"] == "done"


def kept(folder: Path) -> tuple[str, dict]:
    (table,) = folder.glob("gpu-*.md")
    return table.read_text(), json.loads(table.with_suffix(".json").read_text())


ABSENT = ("diffusers", "av", "blake3", "click", "jsonschema", "peft", "transformers", "accelerate", "tqdm")
WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Fewer:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in {absent!r} else PathFinder.find_spec(name, path, target)
sys.meta_path = [Fewer if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = [{script!r}, *{arguments!r}]
sys.path.insert(0, {folder!r})
import runpy
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_machine_with_torch_and_little_else_is_enough(tmp_path: Path) -> None:
    script = str(REPOSITORY / "benchmarks" / "gpu.py")
    sections = ("rates", "video", "codes", "diffusers", "decode", "residency", "cards")
    given = arguments(tmp_path, "--compiler", "none", "--only", *sections)
    code = WITHOUT.format(absent=ABSENT, script=script, folder=str(Path(script).parent), arguments=given)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text, document = kept(tmp_path)
    assert text.count("diffusers is not installed here") == 3
    assert "not installed here: blake3, jsonschema" in text
    assert document["found"]["run.total"] > 0
    assert {section["outcome"] for section in document["sections"]} == {"done"}


def stub(name: str, work: object, seconds: float = HANG) -> gpu.Section:
    return gpu.Section(name, seconds, work)


def patient(bench: Bench) -> None:
    bench.table("Begun", ("what",)).rows.append(("before",))
    signal.setitimer(signal.ITIMER_REAL, 0.001)  # its time is over now
    time.sleep(HANG)
    bench.tables[-1].rows.append(("after",))


def broken(bench: Bench) -> None:
    bench.table("Half", ("what",)).rows.append(("kept",))
    raise RuntimeError("the cable\nhas come off")


def test_a_section_that_takes_too_long_or_fails_is_told_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = (stub("slow", patient, 99), stub("broken", broken), stub("rates", gpu.SECTIONS[0].run))
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    limits: list[float] = []
    monkeypatch.setattr(gpu, "at_most", lambda seconds: (limits.append(seconds), at_most(seconds))[1])
    assert gpu.main(arguments(tmp_path, "--seconds", str(2 * HANG))) == 1
    assert limits == [99, HANG, HANG]
    text, document = kept(tmp_path)
    outcomes = ["stopped: its time was over", "failed: RuntimeError: the cable", "done"]
    assert [section["outcome"] for section in document["sections"]] == outcomes
    assert [table["rows"] for table in document["tables"][:2]] == [[["before"]], [["kept"]]]
    assert "| slow | 0 | stopped" in text


def test_blocks_that_do_not_compile_leave_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch, "compile", lambda function, **options: refuse)
    assert gpu.main(arguments(tmp_path, "--only", "forward", "video")) == 1
    text, document = kept(tmp_path)
    assert [what for what, why in document["failures"]] == ["compiled blocks", "a video with compiled blocks"]
    assert {section["outcome"] for section in document["sections"]} == {"done"}
    assert document["found"]["ours.eager flash.stage 2"] > 0
    assert "A whole video, hq, warm, eager" in text
    assert "RuntimeError: no such instruction" in text


def test_the_whole_never_takes_longer_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RESERVE", 0.0)
    monkeypatch.setattr(gpu, "WORTHWHILE", 1.0)
    now, limits = [0.0], list[float]()
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu, "at_most", lambda seconds: (limits.append(seconds), at_most(seconds))[1])

    def whole(bench: Bench) -> None:
        now[0] += 999
        patient(bench)

    monkeypatch.setattr(gpu, "SECTIONS", (stub("slow", whole, 1000), stub("never", broken)))
    gpu.main(arguments(tmp_path, "--seconds", "999.5"))
    assert limits == [999.5]
    assert [one["outcome"] for one in kept(tmp_path)[1]["sections"]] == ["stopped: its time was over", "no time left"]


def test_wrong_numbers_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_checks, "LIMITS", {torch.float32: 0.0})
    assert gpu.main(arguments(tmp_path, "--only", "checks", "--compiler", "none")) == 1
    text, document = kept(tmp_path)
    assert "WRONG" in text
    assert "float32, math" in [what for what, why in document["failures"]]


CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--dry-run"], "usage:"),
        (["--only", "nothing"], "usage:"),
        (["--seconds", "soon"], "usage:"),
        pytest.param([], "--dry-run", marks=CARD, id="no card"),
    ],
)
def test_wrong_use(wrong: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main(wrong)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_random_weights_keep_activations_in_range() -> None:
    dit = random_dit(TINY.transformer | {"num_layers": 48}, CPU, torch.bfloat16)
    assert not any(value.isnan().any() or (value == 0).all() for value in dit.state_dict().values())
    found = dit(forward_inputs(dit, TINY, 2).streams)
    assert all(0.01 < float(value.float().std()) < 100 for value in (found.video, found.audio))


def test_the_clock() -> None:
    clock = Clock(CPU, patience=0.0)
    calls: list[int] = []
    assert clock.median(lambda: calls.append(time.sleep(0.01)), seconds=HANG, warm_ups=2) >= 10
    assert len(calls) == 4
    calls.clear()
    Clock(CPU).median(lambda: calls.append(0), seconds=HANG)
    assert len(calls) == 21
    assert clock.peak() is None
    with pytest.raises(OutOfTime), at_most(0.05):
        time.sleep(HANG)
    with at_most(HANG):
        pass
    time.sleep(0.01)


def test_a_variant_that_fails_does_not_end_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    move, failed = _gpu_checks._moved, []

    def once(*arguments: Any) -> DiT:
        if not failed:
            failed.append(arguments[-1])
            raise TypeError("no such kernel")
        return move(*arguments)

    monkeypatch.setattr(_gpu_checks, "_moved", once)
    bench = Bench(TINY, CPU, torch.float32, gpu.COMPILERS["none"], lambda line: None)
    _gpu_checks.checks(bench)
    rows = bench.tables[0].rows
    assert [row[3] for row in rows] == ["WRONG"] + ["right"] * (len(rows) - 1)
    assert len(rows) > 3 and len(bench.tables) == 2
    assert all(name == str(failed[0]) for name, _ in bench.failures) and bench.failures
