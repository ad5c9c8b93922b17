"""benchmarks/offline.py goes through to its table; what it measures with and on is what it says."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import _measure
import _report
import accuracy
import offline
import pytest
import torch
from _checkpoint import KEPT_BITS, REAL, TINY, config, lora_shapes, shapes_of, write_random
from _marks import Findings, Flat
from support import REPOSITORY, benchmark, until
from warm_processes import WARM

from ltxpack.files.tensorfile import read_tensorfile

pytestmark = pytest.mark.usefixtures("fsync_waits")


def quiet(_: str) -> None: ...


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bench forks what is in Python; its real processes, and what they cost, are those of the tests below."""

    def run(bench: _measure.Bench, command: Sequence[str]) -> _measure.Cost:
        if command[0] != sys.executable:
            return real(bench, command)
        began = time.monotonic()
        done = WARM.run(command)
        assert done.returncode == 0, done.stderr
        return _measure.Cost(time.monotonic() - began, 0.1, 10**8)

    real = _measure.Bench.run
    monkeypatch.setattr(_measure.Bench, "run", run)
    monkeypatch.setattr(offline, "subprocess", WARM)


@pytest.mark.usefixtures("forked")
def test_the_dry_run_ends_in_a_dated_table_of_everything(tmp_path: Path) -> None:
    scratch, results = tmp_path / "scratch", tmp_path / "results"
    scratch.mkdir()
    done = benchmark(offline, "--quick", "--scratch", scratch, "--results", results)
    assert done.returncode == 0, done.stderr
    assert not list(scratch.iterdir())
    [table, figures] = sorted(results.iterdir(), reverse=True)
    assert table.stem == figures.stem == f"offline-{json.loads(figures.read_text())['machine']['date']}"
    text = table.read_text()
    assert done.stdout == text + "\n"
    assert str(tmp_path) not in text and str(REPOSITORY) not in text
    document = json.loads(figures.read_text())
    assert set(document["costs"]) == set(document["payload"]) == {
        *("cp", "ours", "mapped", "load-all", "cat", "verify", "export floor", "export"),
        *("fp8 floor", "export fp8"),
        *("floor 1", "ours 1", "floor 2", "ours 2", "diffusers", "official"),
        *("floor 1 of 2 blocks", "ours 1 of 2 blocks"),
    }  # fmt: skip
    for key, runs in document["costs"].items():
        assert len(runs) == 1, key
        assert all(run["wall"] > 0 and run["cpu"] > 0 and run["peak"] > 1e6 for run in runs.values()), key
    assert [one["blocks"] for one in document["memory"]] == [1, 2]
    assert len(document["marks"]) == 20 and document["accuracy"]
    assert document["arithmetic"].keys() == {"export fp8", "ours 1", "ours 2", "ours 1 of 2 blocks"}
    assert all(seconds > 0 for seconds in document["arithmetic"].values())
    for part in ("Copy of", "Verify", "Export", "Bake of 96 linears", "Memory by size", "Accuracy", "Marks"):
        assert f"### {part}" in text


def test_the_widths_are_those_of_the_model_and_a_tiny_checkpoint_has_its_blocks() -> None:
    """Spec 02, section 6: 1660 linears, and the payload of the published distilled LoRA to the byte."""
    shapes = lora_shapes(shapes_of(config(48, REAL)))
    assert len(shapes) == 2 * 1660
    assert 2 * sum(math.prod(shape) for shape in shapes.values()) == 7_604_994_048
    two, three = (
        {name.split(".")[3] for name in shapes_of(config(count, TINY)) if ".transformer_blocks." in name}
        for count in (2, 3)
    )
    assert three - two == {"2"}


def test_random_weights_are_normal_numbers(tmp_path: Path) -> None:
    path = tmp_path / "random.safetensors"
    write_random(path, {"a": (300, 70), "b": (11,)}, {"format": "pt"}, seed=3)
    file = read_tensorfile(path)
    assert {name: info.shape for name, info in file.tensors.items()} == {"a": (300, 70), "b": (11,)}
    data = bytearray(path.read_bytes()[file.tensors["a"].start :][: file.tensors["a"].nbytes])
    values = torch.frombuffer(data, dtype=torch.bfloat16).float()
    assert values.abs().min() >= 2**-7 and values.abs().max() < 2**-3
    assert abs(values.mean()) < 0.002 and len(values.unique()) > KEPT_BITS.bit_count() ** 2
    again = tmp_path / "again.safetensors"
    write_random(again, {"a": (300, 70), "b": (11,)}, {"format": "pt"}, seed=3)
    assert again.read_bytes() == path.read_bytes()


def test_the_cost_of_a_command_is_its_own_and_a_failed_one_has_none(tmp_path: Path) -> None:
    """Not that of this process, which holds torch: the peak begins at what the starter holds."""
    bench = _measure.Bench(tmp_path, quiet)
    assert bench.run([sys.executable, "-I", "-S", "-c", "pass"]).peak < 40e6
    big = bench.run([sys.executable, "-I", "-S", "-c", "data = b'x' * 200_000_000"])
    assert 200e6 < big.peak < 240e6
    slept = bench.run(["sleep", "0.3"])
    assert slept.wall >= 0.3 and slept.cpu < 0.2
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytes(10**8).hex()'])"
    assert bench.run([sys.executable, "-c", child]).peak > 200e6
    with pytest.raises(RuntimeError, match=r"ended with 3:\nwhy"):
        bench.run(["sh", "-c", "echo why; exit 3"])


def test_items_take_turns(tmp_path: Path) -> None:
    said: list[str] = []
    prepared: list[str] = []

    def item(key: str, every: int = 1) -> _measure.Item:
        return _measure.Item(key, key, ("true",), (), 1, lambda: prepared.append(key), every=every)

    costs = _measure.Bench(tmp_path, said.append).in_turn([item("a"), item("b", every=2), item("c")], 3)
    assert prepared == ["a", "b", "c", "a", "c", "a", "b", "c"] and len(said) == 8
    assert {key: list(runs) for key, runs in costs.items()} == {"a": [0, 1, 2], "b": [0, 2], "c": [0, 1, 2]}


def test_cold_files_are_out_of_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 40_000)
    until(lambda: path.read_bytes() and _measure.resident(path) == 1.0)
    how = _measure.make_cold([path])
    if how == _measure.NOT_COLD:
        pytest.skip("this filesystem keeps its files in memory")
    assert _measure.resident(path) <= _measure.STILL_COLD
    # A full machine may drop it again before it is looked at.
    until(lambda: path.read_bytes() and _measure.resident(path) == 1.0)


@pytest.mark.parametrize("unit", [True, False])
def test_ratios_are_taken_within_a_round(unit: bool) -> None:
    labels = {"ours 1": "ltxpack bake-lora, one strength", "ours 2": "ltxpack bake-lora, two strengths"}

    def items(key: str, floor: str | None) -> _measure.Item:
        return _measure.Item(key, labels.get(key, key), (), (), 10**9, lambda: None, floor)

    def cost(wall: float) -> _measure.Cost:
        return _measure.Cost(wall, 0.4, 60_000_000)

    walls = {"cp": [1.0, 2.0, 4.0], "ours": [0.9, 2.2, 3.0], "floor 1": [1.0] * 3, "ours 1": [2.0] * 3}
    walls |= {"floor 2": [2.0] * 3, "ours 2": [2.5, 1.5, 1.0]}
    floors = {"ours": "cp", "ours 1": "floor 1", "ours 2": "floor 2"}
    found = Findings(
        {key: items(key, floors.get(key)) for key in walls},
        {key: {turn: cost(wall) for turn, wall in enumerate(runs)} for key, runs in walls.items()},
        {"ours 1": 1.2},
        [Flat(2, 1, 60_000_000, 1, 1), Flat(8, 1, 69_000_000, 1, 1)],
        5e7,
        0.0,
        real=True,
        arithmetic={"ours 1": 1.6, "ours 2": 3.2},
        matrix_unit=unit,
    )
    assert found.ratios("ours") == pytest.approx([0.9, 1.1, 0.75])
    met = {mark.what: (mark.found, mark.met) for mark in found.marks()}
    assert met["copy: wall to cp"] == ("0.90 (0.75-1.10) ×", True)
    assert met["copy: CPU per GB"] == ("0.40 s", True)
    assert met["copy: growth of memory from 2 to 8 blocks"] == ("9.0 MB", False)
    assert met["bake, one strength: wall to the floor"] == ("2.00 ×", False if unit else None)
    assert met["bake, one strength: the same less 1.2 s of start-up"] == ("0.80 ×", None)
    larger = "bake, one strength: wall to the larger of the floor and 1.6 s"
    assert met[larger] == ("1.25 ×", None if unit else False)
    assert met["bake, two strengths: wall to the floor"] == ("0.75 (0.50-1.25) ×", True if unit else None)
    larger = "bake, two strengths: wall to the larger of the floor and 3.2 s"
    assert met[larger] == ("0.47 (0.31-0.78) ×", None if unit else True)
    assert met["bake, two strengths: peak memory"] == ("60 MB", False)


def test_the_reference_is_rounded_once() -> None:
    """Against exact fractions, with values that lie half way between two bf16 after a first rounding to float32."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3000, generator=generator, dtype=torch.float64)
    half = 1 + 2**-8 + torch.tensor([0.0, 2**-40, -(2**-40), 2**-7, 2**-7 + 2**-40], dtype=torch.float64)
    values = torch.cat([values, half, -half, values * 2**-100])
    rounded = accuracy.round_to_bf16(values)
    up = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=torch.bfloat16))
    down = torch.nextafter(rounded, torch.tensor(-torch.inf, dtype=torch.bfloat16))
    for value, *near in zip(values.tolist(), rounded.tolist(), up.tolist(), down.tolist(), strict=True):
        distances = [abs(Fraction(value) - Fraction(one)) for one in near]
        assert distances[0] == min(distances)
    even = accuracy.round_to_bf16(half[[0, 3]]).view(torch.int16)
    assert (even & 1 == 0).all()


def test_the_kernels_are_exact_where_the_official_rule_is_not() -> None:
    rows = {(row.way, row.ratio): row.off for row in accuracy.measure(accuracy.QUICK) if row.target.startswith("att")}
    for ratio in accuracy.RATIOS:
        assert rows["fp32 (rule fp32)", ratio] < 2e-4
        assert rows.get(("addmm (rule fp32)", ratio), 0) < 4e-4
        assert rows["official", ratio] > 0.02
    assert rows["two LoRAs, fp32", accuracy.RATIOS[-1]] < 4e-4 < rows["two LoRAs, official", accuracy.RATIOS[-1]]


@pytest.mark.parametrize(("mount", "kind"), [("{}", "xfs"), ("{}x", "ext4")])
def test_the_filesystem_is_that_of_the_nearest_mount(mount: str, kind: str, tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    table.write_text(f"/dev/a / ext4 rw 0 0\n/dev/b {mount.format(tmp_path)} xfs rw 0 0\n")
    assert _report.filesystem(tmp_path / "deeper", table) == kind
    assert _report.filesystem(tmp_path, tmp_path / "absent") == "unknown"
